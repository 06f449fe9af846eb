package redirect_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// filters returns what a host's interface has at its clsact qdisc, and whether it
// has one.
func filters(t *testing.T, h *netlab.Host, name string) (names []string, qdisc bool) {
	t.Helper()
	check(t, h.NS.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		qdiscs, err := netlink.QdiscList(l)
		if err != nil {
			return err
		}
		for _, q := range qdiscs {
			qdisc = qdisc || q.Type() == "clsact"
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			list, err := netlink.FilterList(l, parent)
			if err != nil && qdisc {
				return err
			}
			for _, f := range list {
				if f.Attrs().Handle != 0 {
					names = append(names, f.Type())
				}
			}
		}
		return nil
	}))
	return names, qdisc
}

// TestHooksWithoutTCX has packet gates as filters of a clsact qdisc, which another
// program uses at one of the interfaces.
func TestHooksWithoutTCX(t *testing.T) {
	s := quietStage(t)
	s.cfg.WithoutTCX()
	s.open(t)
	t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
	foreign, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Apache-2.0",
		// TC_ACT_OK: nobody behind it is asked.
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	check(t, err)
	defer foreign.Close()
	check(t, s.pod.NS.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(
			netlink.QdiscAdd(&netlink.GenericQdisc{
				QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
				QdiscType:  "clsact",
			}),
			netlink.FilterAdd(&netlink.BpfFilter{
				FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL},
				Fd:          foreign.FD(), Name: "foreign", DirectAction: true,
			}))
	}))
	want := func(when string, pod, node int, qdisc bool) {
		t.Helper()
		if have, _ := filters(t, s.pod, "eth0"); len(have) != pod {
			t.Errorf("%s: filters in the pod are %v, want %d", when, have, pod)
		}
		if have, q := filters(t, s.node, "pod"); len(have) != node || q != qdisc {
			t.Errorf("%s: filters at the node's end are %v (qdisc %v), want %d (%v)", when, have, q, node, qdisc)
		}
	}
	w := s.watch(t)
	s.listenProxy(t)
	s.enrol(t)
	s.wantCaptured(t, "enrolled")
	want("enrolled", 2, 2, true)
	sent := uint32(0)
	dropped := func(when string) {
		t.Helper()
		for _, row := range packetRows() {
			sent++
			mark := binary.BigEndian.AppendUint32(nil, 0x7eed0000+sent)
			fr := row(mark)
			s.row(t, when+": "+fr.name, fr.limits, func() error {
				if err := contained(s.app, s.pod.NS, func() error { return both(fr.send(w, mark), w.last(mark)) }); err != nil {
					return err
				}
				if arrived, err := w.saw(mark); err != nil || arrived {
					return fmt.Errorf("the SYN reached the other node: %v, %w", arrived, err)
				}
				return nil
			})
		}
	}
	dropped("enrolled")
	// The next agent replaces what is there.
	check(t, s.hooks.Close())
	s.open(t)
	dropped("with nobody there")
	s.enrol(t)
	want("upgraded", 2, 2, true)
	s.wantCaptured(t, "upgraded")
	for _, end := range []struct {
		h    *netlab.Host
		name string
		at   uint32
	}{{s.pod, "eth0", netlink.HANDLE_MIN_EGRESS}, {s.node, "pod", netlink.HANDLE_MIN_INGRESS}, {s.node, "pod", netlink.HANDLE_MIN_EGRESS}} {
		check(t, end.h.NS.Do(func() error {
			l, err := netlink.LinkByName(end.name)
			if err != nil {
				return err
			}
			list, err := netlink.FilterList(l, end.at)
			for _, f := range list {
				if b, ok := f.(*netlink.BpfFilter); ok && b.Name == "ambit_gate" {
					err = errors.Join(err, netlink.FilterDel(f))
				}
			}
			return err
		}))
		if err := s.hooks.Check(s.pod.NS, everything); !errors.Is(err, redirect.ErrDrift) {
			t.Errorf("without the filter of %s Check says %v, want ErrDrift", end.name, err)
		}
		s.enrol(t)
	}
	dropped("repaired")
	check(t, s.hooks.Remove(s.pod.NS), s.hooks.Remove(s.pod.NS))
	want("removed", 1, 0, false)
	// Uninstalled without Remove, as by a cleanup that knows no pods: all pass.
	s.enrol(t)
	check(t, s.hooks.Uninstall())
	for _, row := range packetRows()[:1] {
		sent++
		mark := binary.BigEndian.AppendUint32(nil, 0x7eed0000+sent)
		check(t, contained(s.app, s.pod.NS, func() error { return both(row(mark).send(w, mark), w.last(mark)) }))
		if arrived, err := w.saw(mark); err != nil || !arrived {
			t.Errorf("uninstalled: a gate still drops: %v", err)
		}
	}
	check(t, redirect.CleanPod(s.pod.NS))
	want("cleaned", 1, 2, true)
}
