package redirect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// aliases6 stands for captured IPv6 destinations inside a pod; ALIAS6 of maps.h.
var aliases6 = netip.MustParsePrefix("fd16:9254:7127:a15a::/96")

// markSysctls make what answers a marked packet be marked as well: the accepted
// socket, and the kernel's own reset where nobody listens. The proxy's dials to the
// app are marked; without the mark, answers to a dial in a client's name would leave
// the pod and reach the client.
func markSysctls(ipv6 bool) []string {
	names := []string{"/proc/sys/net/ipv4/tcp_fwmark_accept", "/proc/sys/net/ipv4/fwmark_reflect"}
	if ipv6 {
		names = append(names, "/proc/sys/net/ipv6/fwmark_reflect")
	}
	return names
}

// pod is what Apply finds out about a namespace.
type pod struct {
	ns     *netns.NS
	cookie uint64
	v4, v6 netip.Addr
	links  []netlink.Link // where packets leave
	lo     int
	ipv6   bool
}

func inspect(ns *netns.NS) (*pod, error) {
	p := &pod{ns: ns}
	var err error
	if p.cookie, err = ns.Cookie(); err != nil {
		return nil, err
	}
	nl, err := routeNetlink(ns, &p.ipv6)
	if err != nil {
		return nil, err
	}
	defer nl.Close()
	links, err := nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range usable(links) {
		if l.Attrs().Flags&net.FlagLoopback != 0 {
			p.lo = l.Attrs().Index
			continue
		}
		p.links = append(p.links, l)
		addrs, err := nl.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		for _, a := range addrs {
			ip, ok := netip.AddrFromSlice(a.IP)
			if ip = ip.Unmap(); !ok || a.Scope != unix.RT_SCOPE_UNIVERSE {
				continue
			}
			if ip.Is4() && !p.v4.IsValid() {
				p.v4 = ip
			} else if ip.Is6() && !p.v6.IsValid() {
				p.v6 = ip
			}
		}
	}
	return p, nil
}

func routeNetlink(ns *netns.NS, ipv6 *bool) (nl *netlink.Handle, err error) {
	err = ns.Do(func() (err error) {
		*ipv6 = ipv6Enabled()
		nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		if nl != nil {
			nl.Close()
		}
		return nil, fmt.Errorf("open route netlink: %w", err)
	}
	return nl, nil
}

func (p *pod) enrolment(r PodRules) bpf.CgroupEnrolment {
	e := bpf.CgroupEnrolment{Flags: bpf.CgroupEnrolmentFlagENROL_OUTBOUND, V4: address16(p.v4), V6: address16(p.v6)}
	if !r.BypassInbound {
		e.Flags |= bpf.CgroupEnrolmentFlagENROL_INBOUND
	}
	if r.DNS {
		e.Flags |= bpf.CgroupEnrolmentFlagENROL_DNS
	}
	if r.Accelerate {
		e.Flags |= bpf.CgroupEnrolmentFlagENROL_ACCELERATE
	}
	putRanges(&e.Outside, r.ExcludeOutbound)
	putRanges(&e.Inside, r.ExcludeInbound)
	return e
}

func putRanges(to *[MaxPortRanges]bpf.CgroupPortRange, ports Ports) {
	for i, r := range ports.Ranges() {
		to[i] = bpf.CgroupPortRange{First: r.First, Last: r.Last}
	}
}

// address16 writes IPv4 as IPv6 does; the zero Addr is all zeros.
func address16(a netip.Addr) (out bpf.CgroupAddress) {
	if !a.IsValid() {
		return out
	}
	b := a.As16()
	for i := range out.Word {
		out.Word[i] = binary.NativeEndian.Uint32(b[i*4:])
	}
	return out
}

// Apply captures ns's connections. Programs, routes and settings come first; the
// enrolment, one map entry that all programs ask for, puts them in force at once.
func (h *Hooks) Apply(ns *netns.NS, rules PodRules) error {
	p, err := inspect(ns)
	if err != nil {
		return err
	}
	if err := h.refuse(p); err != nil {
		return err
	}
	if rules.IPv6 && !p.v6.IsValid() {
		return &UnsupportedError{Feature: "IPv6 in the pod's network namespace (it has no IPv6 address of global scope)", Err: unix.EAFNOSUPPORT}
	}
	for _, l := range p.links {
		if enc := l.Attrs().EncapType; enc != "ether" {
			return &UnsupportedError{Feature: fmt.Sprintf("the packet gate on %s, a link of type %s", l.Attrs().Name, enc), Err: unix.EOPNOTSUPP}
		}
	}
	if err := h.applySettings(p, rules.IPv6); err != nil {
		return err
	}
	if err := h.applyPrograms(p); err != nil {
		return err
	}
	if err := h.own(p); err != nil {
		return err
	}
	if rules.Accelerate {
		return h.enrolAccelerated(p, rules)
	}
	if err := h.enrol(p.cookie, p.enrolment(rules)); err != nil {
		return err
	}
	h.decelerate(p.cookie, p.ns)
	return nil
}

// own writes whose the pod's addresses are. A pod that had one of them before is
// gone, or its Remove comes later and sees that the address is not its own.
func (h *Hooks) own(p *pod) error {
	for _, a := range []netip.Addr{p.v4, p.v6} {
		if !a.IsValid() {
			continue
		}
		if err := h.maps[bpf.CgroupMapMeshPods].Put(address16(a), p.cookie); err != nil {
			return fmt.Errorf("write address %v: %w", a, err)
		}
	}
	return nil
}

func (h *Hooks) disown(cookie uint64) error {
	pods := h.maps[bpf.CgroupMapMeshPods]
	var (
		a    bpf.CgroupAddress
		c    uint64
		mine []bpf.CgroupAddress
	)
	it := pods.Iterate()
	for it.Next(&a, &c) {
		if c == cookie {
			mine = append(mine, a)
		}
	}
	errs := []error{it.Err()}
	for _, a := range mine {
		if err := pods.Delete(a); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("delete addresses: %w", err)
	}
	return nil
}

func (h *Hooks) applySettings(p *pod, needV6 bool) error {
	if err := applyRoutes(p.ns, needV6); err != nil {
		return err
	}
	migrateQueues(p.ns, h.cfg.Logger)
	for _, name := range markSysctls(p.ipv6) {
		if err := p.ns.Do(func() error { return os.WriteFile(name, []byte("1"), 0) }); err != nil {
			return fmt.Errorf("have answers marked: %w", err)
		}
	}
	if !p.ipv6 {
		return nil
	}
	nl, err := routeNetlink(p.ns, &p.ipv6)
	if err != nil {
		return err
	}
	defer nl.Close()
	if err := nl.RouteReplace(aliasRoute(p.lo)); err != nil {
		return fmt.Errorf("add local route %s: %w", aliases6, err)
	}
	return nil
}

// aliasRoute makes all aliases local addresses: IPv6 has but one loopback address.
func aliasRoute(lo int) *netlink.Route {
	return &netlink.Route{
		Family: unix.AF_INET6, LinkIndex: lo, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL,
		Dst: &net.IPNet{IP: aliases6.Addr().AsSlice(), Mask: net.CIDRMask(aliases6.Bits(), 128)},
	}
}

func (h *Hooks) applyPrograms(p *pod) error {
	pins := h.path(podsDir, strconv.FormatUint(p.cookie, 10))
	if h.isCurrent(p.cookie) && h.checkPins(p) == nil {
		return nil
	}
	spec := h.pod.Copy()
	if err := spec.Variables["pod_netns"].Set(p.cookie); err != nil {
		return err
	}
	replacements := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if m, ok := h.maps[name]; ok {
			replacements[name] = m
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replacements})
	if err != nil {
		return fmt.Errorf("load the pod's programs: %w", explainLoad(err))
	}
	defer coll.Close()
	if err := os.MkdirAll(pins, 0o700); err != nil {
		return err
	}
	lookup := coll.Programs[bpf.PodProgPodLookup]
	err = place(filepath.Join(pins, "lookup"), lookup,
		func(i *link.Info) bool { n := i.NetNs(); return n != nil && uint64(n.NetnsInode) == p.ns.Inode() },
		func() (l link.Link, err error) {
			cerr := p.ns.Control(func(fd int) { l, err = attachNetNs(fd, lookup) })
			return l, errors.Join(cerr, err)
		})
	if err != nil {
		return fmt.Errorf("attach sk_lookup: %w", err)
	}
	if err := h.cfg.step("sk_lookup"); err != nil {
		return err
	}
	if err := h.placeGates(p, pins, coll); err != nil {
		return err
	}
	err = sweep(pins, func(name string) bool {
		return name == "lookup" || strings.HasPrefix(name, "gate-") || strings.HasPrefix(name, "host-") ||
			h.cfg.Probes && strings.HasPrefix(name, "probe-")
	})
	if err != nil {
		return err
	}
	if err := h.cfg.step("gates"); err != nil {
		return err
	}
	h.mu.Lock()
	h.current[p.cookie] = true
	h.mu.Unlock()
	return nil
}

// placeGates attaches the packet gate to both ends of the pod's cables, and at the
// node's ends what knows the node's probes.
func (h *Hooks) placeGates(p *pod, pins string, coll *ebpf.Collection) error {
	blind := true
	for _, l := range p.links {
		index := l.Attrs().Index
		err := h.placeGate(filepath.Join(pins, gatePin(index)), p.ns, index, coll.Programs[bpf.PodProgPodGate], ebpf.AttachTCXEgress)
		if err != nil {
			return fmt.Errorf("attach the packet gate to %s: %w", l.Attrs().Name, err)
		}
		peer, err := h.peer(p, l)
		if err != nil {
			return err
		}
		if peer == 0 {
			continue
		}
		err = h.placeGate(filepath.Join(pins, hostPin(index)), h.cfg.Node, peer, coll.Programs[bpf.PodProgPodGate], ebpf.AttachTCXIngress)
		if err != nil {
			return fmt.Errorf("attach the packet gate to the node's end of %s: %w", l.Attrs().Name, err)
		}
		if err := h.placeProbe(filepath.Join(pins, probePin(index)), peer); err != nil {
			return fmt.Errorf("exempt the node's probes at its end of %s: %w", l.Attrs().Name, err)
		}
		blind = false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if delete(h.blind, p.cookie); blind {
		h.blind[p.cookie] = true
	}
	return nil
}

// placeProbe attaches what knows the node's probes. A pin that is not wanted any more
// is swept, which a filter is not.
func (h *Hooks) placeProbe(pin string, peer int) error {
	if h.cfg.Probes {
		return h.placeGate(pin, h.cfg.Node, peer, h.node[bpf.CgroupProgNodeProbe], ebpf.AttachTCXEgress)
	}
	if h.noTCX.Load() {
		return removeFilter(h.cfg.Node, peer, netlink.HANDLE_MIN_EGRESS)
	}
	return nil
}

// placeGate attaches the gate with TCX, or where the kernel has none as a filter.
func (h *Hooks) placeGate(pin string, ns *netns.NS, index int, prog *ebpf.Program, at ebpf.AttachType) error {
	if !h.noTCX.Load() {
		err := placeTCX(pin, ns, index, prog, at)
		if !errors.Is(err, ebpf.ErrNotSupported) {
			return err
		}
		h.noTCX.Store(true)
	}
	return placeClsact(ns, index, clsactParent(at), prog)
}

func clsactParent(at ebpf.AttachType) uint32 {
	if at == ebpf.AttachTCXIngress {
		return netlink.HANDLE_MIN_INGRESS
	}
	return netlink.HANDLE_MIN_EGRESS
}

func placeTCX(pin string, ns *netns.NS, index int, prog *ebpf.Program, at ebpf.AttachType) error {
	return place(pin, prog,
		func(i *link.Info) bool { t := i.TCX(); return t != nil && int(t.Ifindex) == index },
		func() (l link.Link, err error) {
			derr := ns.Do(func() error {
				l, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: at, Anchor: link.Head()})
				return nil
			})
			return l, errors.Join(derr, err)
		})
}

// peer is the node's end of a veth pair: 0 if the other end is elsewhere. Indexes
// repeat from namespace to namespace, so each end has to name the other's too.
func (h *Hooks) peer(p *pod, l netlink.Link) (int, error) {
	if h.cfg.Node == nil || l.Type() != "veth" {
		return 0, nil
	}
	ipv6 := false
	nl, err := routeNetlink(h.cfg.Node, &ipv6)
	if err != nil {
		return 0, err
	}
	defer nl.Close()
	other, err := nl.LinkByIndex(l.Attrs().ParentIndex)
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
		return 0, nil
	} else if err != nil {
		return 0, fmt.Errorf("find the node's end of %s: %w", l.Attrs().Name, err)
	}
	id := -1
	if cerr := p.ns.Control(func(fd int) { id, err = nl.GetNetNsIdByFd(fd) }); cerr != nil || err != nil {
		return 0, fmt.Errorf("find the node's number of the pod's namespace: %w", errors.Join(cerr, err))
	}
	if other.Type() != "veth" || other.Attrs().ParentIndex != l.Attrs().Index || other.Attrs().NetNsID != id {
		return 0, nil
	}
	return other.Attrs().Index, nil
}

// attachNetNs gives a nil interface, not a nil pointer, when it fails.
func attachNetNs(fd int, p *ebpf.Program) (link.Link, error) {
	l, err := link.AttachNetNs(fd, p)
	if err != nil {
		return nil, err
	}
	return l, nil
}

func gatePin(index int) string { return "gate-" + strconv.Itoa(index) }

func hostPin(index int) string { return "host-" + strconv.Itoa(index) }

func probePin(index int) string { return "probe-" + strconv.Itoa(index) }

func (h *Hooks) isCurrent(cookie uint64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.current[cookie]
}

// checkPins reports the first of the pod's links that is missing or detached.
func (h *Hooks) checkPins(p *pod) error {
	pins := h.path(podsDir, strconv.FormatUint(p.cookie, 10))
	names := []string{"lookup"}
	for _, l := range p.links {
		for _, end := range []struct {
			ns   *netns.NS
			pin  string
			at   ebpf.AttachType
			peer bool
		}{
			{p.ns, gatePin(l.Attrs().Index), ebpf.AttachTCXEgress, false},
			{h.cfg.Node, hostPin(l.Attrs().Index), ebpf.AttachTCXIngress, true},
			{h.cfg.Node, probePin(l.Attrs().Index), ebpf.AttachTCXEgress, true},
		} {
			index := l.Attrs().Index
			if !h.cfg.Probes && end.pin == probePin(index) {
				continue
			}
			if end.peer {
				var err error
				if index, err = h.peer(p, l); err != nil {
					return err
				}
			}
			if index == 0 {
				continue
			}
			if !h.noTCX.Load() {
				names = append(names, end.pin)
				continue
			}
			if there, err := hasClsact(end.ns, index, clsactParent(end.at)); err != nil {
				return err
			} else if !there {
				return fmt.Errorf("%w: no %s filter", ErrDrift, end.pin)
			}
		}
	}
	for _, name := range names {
		l, err := link.LoadPinnedLink(filepath.Join(pins, name), nil)
		if err != nil {
			return fmt.Errorf("%w: no %s program", ErrDrift, name)
		}
		info, err := l.Info()
		_ = l.Close() // only read
		if err != nil {
			return fmt.Errorf("inspect %s program: %w", name, err)
		}
		attached := true
		if n := info.NetNs(); n != nil {
			attached = n.NetnsInode != 0
		} else if t := info.TCX(); t != nil {
			attached = t.Ifindex != 0
		}
		if !attached {
			return fmt.Errorf("%w: %s program is detached", ErrDrift, name)
		}
	}
	return nil
}

func (h *Hooks) enrol(cookie uint64, e bpf.CgroupEnrolment) error {
	if err := h.maps[bpf.CgroupMapMeshEnrolled].Put(cookie, e); err != nil {
		return fmt.Errorf("write enrolment: %w", err)
	}
	return nil
}

// Release stops capturing new connections and keeps what the established ones
// need to find their way, so that the proxy can drain.
func (h *Hooks) Release(ns *netns.NS) error {
	c, err := ns.Cookie()
	if err != nil {
		return err
	}
	var e bpf.CgroupEnrolment
	if err := h.maps[bpf.CgroupMapMeshEnrolled].Lookup(c, &e); errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read enrolment: %w", err)
	}
	e.Flags = 0
	if err := h.enrol(c, e); err != nil {
		return err
	}
	h.retire(c)
	return nil
}

// Check returns nil if Apply would change nothing, and otherwise an ErrDrift that
// says what differs.
func (h *Hooks) Check(ns *netns.NS, rules PodRules) error {
	p, err := inspect(ns)
	if err != nil {
		return err
	}
	var e bpf.CgroupEnrolment
	if err := h.maps[bpf.CgroupMapMeshEnrolled].Lookup(p.cookie, &e); errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("%w: not enrolled", ErrDrift)
	} else if err != nil {
		return fmt.Errorf("read enrolment: %w", err)
	}
	if e != p.enrolment(rules) {
		return fmt.Errorf("%w: enrolled with other flags or addresses", ErrDrift)
	}
	if !h.isCurrent(p.cookie) {
		return fmt.Errorf("%w: programs are of another process", ErrDrift)
	}
	if err := h.checkPins(p); err != nil {
		return err
	}
	if err := checkRoutes(ns, rules.IPv6); err != nil {
		return err
	}
	for _, name := range markSysctls(p.ipv6) {
		var v []byte
		if err := p.ns.Do(func() (err error) { v, err = os.ReadFile(name); return err }); err != nil {
			return fmt.Errorf("see whether answers are marked: %w", err)
		}
		if !bytes.HasPrefix(v, []byte("1")) {
			return fmt.Errorf("%w: %s is %s", ErrDrift, name, bytes.TrimSpace(v))
		}
	}
	return nil
}

// Present reports whether ns has redirection of any sort.
func (h *Hooks) Present(ns *netns.NS) (bool, error) {
	c, err := ns.Cookie()
	if err != nil {
		return false, err
	}
	if _, err := os.Stat(h.path(podsDir, strconv.FormatUint(c, 10))); err == nil {
		return true, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("look for pinned programs: %w", err)
	}
	var e bpf.CgroupEnrolment
	err = h.maps[bpf.CgroupMapMeshEnrolled].Lookup(c, &e)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Prune forgets pods whose namespace is gone, which no Remove can enter any more,
// and proxies whose cgroup is. Their programs went with them; neither cookies nor
// cgroups' numbers are used again.
func (h *Hooks) Prune() error {
	if err := errors.Join(h.pruneProxies(), h.pruneLeaseHooks()); err != nil {
		return err
	}
	dirs, err := os.ReadDir(h.path(podsDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	for _, d := range dirs {
		c, err := strconv.ParseUint(d.Name(), 10, 64)
		if err != nil {
			continue
		}
		l, err := link.LoadPinnedLink(h.path(podsDir, d.Name(), "lookup"), nil)
		if err != nil {
			continue // Apply is at work there, or died: the next one finishes
		}
		info, err := l.Info()
		_ = l.Close() // only read
		if err != nil {
			return fmt.Errorf("inspect sk_lookup program: %w", err)
		}
		if n := info.NetNs(); n == nil || n.NetnsInode != 0 {
			continue
		}
		if err := h.forget(c); err != nil {
			return err
		}
	}
	return nil
}

func (h *Hooks) pruneProxies() error {
	dirs, err := os.ReadDir(h.path(proxyDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("list proxies: %w", err)
	}
	for _, d := range dirs {
		l, err := link.LoadPinnedLink(h.path(proxyDir, d.Name(), proxyHooks[0].program), nil)
		if err != nil {
			continue // Proxy is at work there, or died: the next one finishes
		}
		info, err := l.Info()
		_ = l.Close() // only read
		if err != nil {
			return fmt.Errorf("inspect the proxy's programs: %w", err)
		}
		if c := info.Cgroup(); c == nil || c.CgroupId != 0 {
			continue
		}
		if err := os.RemoveAll(h.path(proxyDir, d.Name())); err != nil {
			return fmt.Errorf("unpin the proxy's programs: %w", err)
		}
	}
	return nil
}

// Remove takes everything away. Doing it twice is no error.
func (h *Hooks) Remove(ns *netns.NS) error {
	c, err := ns.Cookie()
	if err != nil {
		return err
	}
	// Capture ends before the way back does.
	if err := h.forget(c); err != nil {
		return err
	}
	if err := h.removeGates(ns); err != nil {
		return err
	}
	return CleanPod(ns)
}

// removeAliases ends that IPv6 aliases are local addresses of ns.
func removeAliases(ns *netns.NS) error {
	ipv6 := false
	nl, err := routeNetlink(ns, &ipv6)
	if err != nil {
		return err
	}
	defer nl.Close()
	if lo, err := nl.LinkByName("lo"); err == nil && ipv6 {
		if err := nl.RouteDel(aliasRoute(lo.Attrs().Index)); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete local route %s: %w", aliases6, err)
		}
	}
	return nil
}

// detachProbes detaches the program that pods share before its pins go, after which
// it would be some time: a pod that comes back finds it in its place (EEXIST).
func (h *Hooks) detachProbes(c uint64) {
	pins, _ := filepath.Glob(h.path(podsDir, strconv.FormatUint(c, 10), "probe-*"))
	for _, pin := range pins {
		if l, err := link.LoadPinnedLink(pin, nil); err == nil {
			_ = l.Detach() // of an interface that is gone it is
			_ = l.Close()
		}
	}
}

// forget ends a pod's enrolment and unpins its programs.
func (h *Hooks) forget(c uint64) error {
	if err := h.maps[bpf.CgroupMapMeshEnrolled].Delete(c); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete enrolment: %w", err)
	}
	if err := h.disown(c); err != nil {
		return err
	}
	h.decelerate(c, nil)
	h.mu.Lock()
	delete(h.current, c)
	delete(h.blind, c)
	h.mu.Unlock()
	h.detachProbes(c)
	if err := os.RemoveAll(h.path(podsDir, strconv.FormatUint(c, 10))); err != nil {
		return fmt.Errorf("unpin the pod's programs: %w", err)
	}
	return nil
}
