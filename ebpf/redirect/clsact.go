package redirect

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Kernels before 6.6 have no TCX: there the packet gates are filters of a clsact
// qdisc. The qdisc holds them instead of a pin, and ends with its interface.
const (
	// The first filters to see a packet: an earlier one could let it pass.
	gatePriority = 1
	// Names our filter among those of others with that priority ("amb").
	gateHandle = 0x616d62
	gateName   = "ambit_gate"
)

func clsactQdisc(index int) *netlink.GenericQdisc {
	return &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
}

func gateFilter(index int, parent uint32, prog *ebpf.Program) *netlink.BpfFilter {
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: parent, Handle: gateHandle, Priority: gatePriority, Protocol: unix.ETH_P_ALL},
		Name:        gateName, DirectAction: true, Fd: -1,
	}
	if prog != nil {
		f.Fd = prog.FD()
	}
	return f
}

// placeClsact attaches prog; a filter of ours that is there is replaced by it at once.
func placeClsact(ns *netns.NS, index int, parent uint32, prog *ebpf.Program) error {
	ipv6 := false
	nl, err := routeNetlink(ns, &ipv6)
	if err != nil {
		return err
	}
	defer nl.Close()
	if err := nl.QdiscAdd(clsactQdisc(index)); err != nil && !errors.Is(err, unix.EEXIST) {
		return &UnsupportedError{Feature: "packet gates (TCX, Linux 6.6; or CONFIG_NET_CLS_ACT)", Err: err}
	}
	if err := nl.FilterReplace(gateFilter(index, parent, prog)); err != nil {
		return fmt.Errorf("add filter with priority %d (is one of another kind there?): %w", gatePriority, err)
	}
	return nil
}

// hasClsact reports whether our filter is there.
func hasClsact(ns *netns.NS, index int, parent uint32) (bool, error) {
	ipv6 := false
	nl, err := routeNetlink(ns, &ipv6)
	if err != nil {
		return false, err
	}
	defer nl.Close()
	ours, _, err := gateFilters(nl, index, parent)
	return ours, err
}

// gateFilters looks for our filter and counts those of others.
func gateFilters(nl *netlink.Handle, index int, parent uint32) (ours bool, others int, err error) {
	filters, err := nl.FilterList(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: index}}, parent)
	if err != nil {
		return false, 0, fmt.Errorf("list filters: %w", err)
	}
	for _, f := range filters {
		// What offload or a chain adds has handle 0.
		if f.Attrs().Handle == 0 {
			continue
		}
		if b, ok := f.(*netlink.BpfFilter); ok && b.Handle == gateHandle && b.Priority == gatePriority {
			ours = true
			continue
		}
		others++
	}
	return ours, others, nil
}

// removeClsact takes our filters of an interface away, and the qdisc if nobody else
// uses it. An interface without is no error.
func removeClsact(ns *netns.NS, index int) error {
	ipv6 := false
	nl, err := routeNetlink(ns, &ipv6)
	if err != nil {
		return err
	}
	defer nl.Close()
	found, rest := false, 0
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		ours, others, err := gateFilters(nl, index, parent)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
			continue // no such qdisc, or no such interface any more
		} else if err != nil {
			return err
		}
		rest += others
		if !ours {
			continue
		}
		found = true
		if err := nl.FilterDel(gateFilter(index, parent, nil)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete the packet gate: %w", err)
		}
	}
	if !found || rest > 0 {
		return nil
	}
	if err := nl.QdiscDel(clsactQdisc(index)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("delete clsact qdisc: %w", err)
	}
	return nil
}

// removeFilter takes one of ours away, if it is there.
func removeFilter(ns *netns.NS, index int, parent uint32) error {
	ipv6 := false
	nl, err := routeNetlink(ns, &ipv6)
	if err != nil {
		return err
	}
	defer nl.Close()
	if ours, _, err := gateFilters(nl, index, parent); err != nil || !ours {
		return err
	}
	return nl.FilterDel(gateFilter(index, parent, nil))
}

// removeGates takes filters away from the pod's ends of its cables, and from the
// node's.
func (h *Hooks) removeGates(ns *netns.NS) error {
	p, err := inspect(ns)
	if err != nil {
		return err
	}
	for _, l := range p.links {
		if err := removeClsact(ns, l.Attrs().Index); err != nil {
			return err
		}
		peer, err := h.peer(p, l)
		if err != nil {
			return err
		}
		if peer == 0 {
			continue
		}
		if err := removeClsact(h.cfg.Node, peer); err != nil {
			return err
		}
	}
	return nil
}
