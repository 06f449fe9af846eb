// Package netlab builds small networks out of Linux network namespaces: hosts,
// the cables (veth pairs) and bridges between them, addresses and routes. Tests
// use it directly; the lab uses it to build a cluster's machines.
//
//	a := netlab.MustHost(t, "a"); b := netlab.MustHost(t, "b")
//	netlab.Cable(a, "eth0", b, "eth0")
//	a.Addr("eth0", netip.MustParsePrefix("10.0.0.1/24")); a.Up("eth0")
//
// A namespace lives as long as its Host is open, its file is mounted or a process
// is in it; nothing is written outside. Methods of one Host may be called from any
// goroutine; each does its work in the namespace and returns.
package netlab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Host is one network namespace with a handle for its links and routes.
type Host struct {
	Name string
	NS   *netns.NS

	path string // where the namespace is mounted, "" when it is not
	nl   *netlink.Handle
}

// New makes a namespace with its loopback up. With a path the namespace is
// mounted there, so that other programs (`nsenter --net=PATH`) can enter it.
func New(name, path string) (*Host, error) {
	ns, err := create(path)
	if err != nil {
		return nil, fmt.Errorf("create network namespace %s: %w", name, err)
	}
	h := &Host{Name: name, NS: ns, path: path}
	if err := h.init(); err != nil {
		h.Close()
		return nil, fmt.Errorf("prepare network namespace %s: %w", name, err)
	}
	return h, nil
}

// create unshares a thread's network namespace and keeps a descriptor of it. The
// thread is never unlocked, so the runtime ends it with the goroutine.
func create(path string) (*netns.NS, error) {
	type result struct {
		ns  *netns.NS
		err error
	}
	donec := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			donec <- result{err: err}
			return
		}
		self := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if path != "" {
			if err := mountAt(self, path); err != nil {
				donec <- result{err: err}
				return
			}
		}
		ns, err := netns.Open(self)
		donec <- result{ns, err}
	}()
	r := <-donec
	return r.ns, r.err
}

func mountAt(self, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	_ = f.Close() // nothing was written
	if err := unix.Mount(self, path, "none", unix.MS_BIND, ""); err != nil {
		_ = os.Remove(path)
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

func (h *Host) init() error {
	if err := h.NS.Do(func() error {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		h.nl = nl
		return err
	}); err != nil {
		return err
	}
	// Addresses are usable at once instead of after duplicate address detection.
	for _, scope := range []string{"all", "default"} {
		_ = h.Sysctl("net/ipv6/conf/"+scope+"/accept_dad", "0") // a kernel without IPv6 has no such file
	}
	return h.Up("lo")
}

// Close lets go of the namespace and unmounts its file.
func (h *Host) Close() {
	if h.nl != nil {
		h.nl.Close()
	}
	if h.path != "" {
		_ = unix.Unmount(h.path, unix.MNT_DETACH) // best effort: the mount may be gone with its parent
		_ = os.Remove(h.path)
	}
	_ = h.NS.Close() // a descriptor that was only read
}

// Path is the file under which other processes find the namespace.
func (h *Host) Path() string { return h.path }

// IPv6 reports whether the kernel speaks IPv6 in namespaces.
func IPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}

// Sysctl writes one setting of the namespace; name is the path below /proc/sys.
func (h *Host) Sysctl(name, value string) error {
	return h.NS.Do(func() error {
		return os.WriteFile("/proc/sys/"+name, []byte(value), 0o644)
	})
}

// Cable joins two hosts with a veth pair. Both ends are down.
func Cable(a *Host, aName string, b *Host, bName string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = aName
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: bName, PeerNamespace: netlink.NsFd(b.NS.FD())}
	if err := a.nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("join %s:%s and %s:%s: %w", a.Name, aName, b.Name, bName, err)
	}
	return nil
}

// Bridge makes a bridge and raises it.
func (h *Host) Bridge(name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := h.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("make bridge %s:%s: %w", h.Name, name, err)
	}
	return h.Up(name)
}

// Attach makes a link a port of a bridge.
func (h *Host) Attach(link, bridge string) error {
	l, err := h.link(link)
	if err != nil {
		return err
	}
	b, err := h.link(bridge)
	if err != nil {
		return err
	}
	if err := h.nl.LinkSetMaster(l, b); err != nil {
		return fmt.Errorf("attach %s:%s to %s: %w", h.Name, link, bridge, err)
	}
	return nil
}

// Up raises a link.
func (h *Host) Up(link string) error {
	l, err := h.link(link)
	if err != nil {
		return err
	}
	if err := h.nl.LinkSetUp(l); err != nil {
		return fmt.Errorf("raise %s:%s: %w", h.Name, link, err)
	}
	return nil
}

// Down lowers a link.
func (h *Host) Down(link string) error {
	l, err := h.link(link)
	if err != nil {
		return err
	}
	if err := h.nl.LinkSetDown(l); err != nil {
		return fmt.Errorf("lower %s:%s: %w", h.Name, link, err)
	}
	return nil
}

// Unplug removes a link; its peer goes with it. A link that is gone is no error.
func (h *Host) Unplug(link string) error {
	l, err := h.link(link)
	if _, gone := errors.AsType[netlink.LinkNotFoundError](err); gone {
		return nil
	}
	if err != nil {
		return err
	}
	if err := h.nl.LinkDel(l); err != nil {
		return fmt.Errorf("remove %s:%s: %w", h.Name, link, err)
	}
	return nil
}

// Addr gives a link an address.
func (h *Host) Addr(link string, p netip.Prefix) error {
	l, err := h.link(link)
	if err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := h.nl.AddrAdd(l, addr); err != nil {
		return fmt.Errorf("give %s:%s the address %s: %w", h.Name, link, p, err)
	}
	if p.Addr().Is6() {
		return h.awaitLocal(link, p.Addr())
	}
	return nil
}

// awaitLocal waits for the local route of an IPv6 address. The kernel adds it later,
// in a work queue that waits its turn on a busy machine, even where nothing is to be
// detected; until then whatever the host sends to its own address leaves on the wire
// and is lost, a proxy's answer to the app beside it for one.
func (h *Host) awaitLocal(link string, a netip.Addr) error {
	want := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: ipNet(netip.PrefixFrom(a, a.BitLen()))}
	for deadline := time.Now().Add(localGrace); ; time.Sleep(time.Millisecond) {
		routes, err := h.nl.RouteListFiltered(netlink.FAMILY_V6, want, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		if err != nil {
			return fmt.Errorf("list the local routes of %s: %w", h.Name, err)
		}
		if len(routes) > 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the address %s of %s:%s has no local route after %v", a, h.Name, link, localGrace)
		}
	}
}

// localGrace is more than a work queue takes on any machine.
const localGrace = 30 * time.Second

// Route is one entry of a host's main table. Without a Via the destination is on
// the link; Source is the address used when the host itself sends.
type Route struct {
	Dst    netip.Prefix
	Via    netip.Addr
	Link   string
	Source netip.Addr
}

// Route adds or replaces a route.
func (h *Host) Route(r Route) error {
	nr := netlink.Route{Dst: ipNet(r.Dst)}
	if r.Link != "" {
		l, err := h.link(r.Link)
		if err != nil {
			return err
		}
		nr.LinkIndex = l.Attrs().Index
	}
	if r.Via.IsValid() {
		nr.Gw = r.Via.AsSlice()
	} else if r.Dst.Addr().Is4() {
		nr.Scope = netlink.SCOPE_LINK
	}
	if r.Source.IsValid() {
		nr.Src = r.Source.AsSlice()
	}
	if err := h.nl.RouteReplace(&nr); err != nil {
		return fmt.Errorf("route %s on %s: %w", r.Dst, h.Name, err)
	}
	return nil
}

// Forward turns the host into a router for both families.
func (h *Host) Forward() error {
	if err := h.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return fmt.Errorf("let %s forward: %w", h.Name, err)
	}
	for _, scope := range []string{"all", "default"} {
		// Replies may leave by another link than the request's: pods are reached
		// by host routes, and the mesh spoofs client addresses.
		if err := h.Sysctl("net/ipv4/conf/"+scope+"/rp_filter", "0"); err != nil {
			return err
		}
	}
	if IPv6() {
		return h.Sysctl("net/ipv6/conf/all/forwarding", "1")
	}
	return nil
}

// Links names the host's links.
func (h *Host) Links() ([]string, error) {
	links, err := h.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links of %s: %w", h.Name, err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return names, nil
}

func (h *Host) link(name string) (netlink.Link, error) {
	l, err := h.nl.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find %s:%s: %w", h.Name, name, err)
	}
	return l, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// TB is what netlab needs of *testing.T, so that programs can link this package
// without linking the testing package.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// Required reports whether AMBIT_TEST_REQUIRE makes a missing capability a failure.
func Required() bool {
	v := os.Getenv("AMBIT_TEST_REQUIRE")
	return v == "all" || strings.Contains(v, "netns")
}

// Require skips the test where network namespaces cannot be made, naming the
// reason; where AMBIT_TEST_REQUIRE has "netns" or is "all" the test fails instead.
func Require(t TB) {
	t.Helper()
	h, err := New("probe", "")
	if err == nil {
		h.Close()
		return
	}
	if Required() {
		t.Fatalf("AMBIT_TEST_REQUIRE wants network namespaces: %v", err)
	}
	t.Skipf("needs network namespaces (run `make test`, or as root): %v", err)
}

// MustHost makes a host that ends with the test.
func MustHost(t TB, name string) *Host {
	t.Helper()
	Require(t)
	h, err := New(name, "")
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(h.Close)
	return h
}
