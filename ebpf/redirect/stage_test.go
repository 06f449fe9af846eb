package redirect_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// The suite's bed. Every test that both redirectors have to pass runs in forEach.
//
//	client 10.9.0.2 ── other ── node ┬─ 10.8.0.2 pod
//	fd00:9::2           10.1.0.2     │  fd00:8::2
//	                                 └─ 10.7.0.2 near
//	                                    fd00:7::2
//
// A pod is a namespace; its app's sockets are made in one cgroup, the proxy's in
// another, those of the node's own processes in a third.
type topology struct {
	client, other, node, pod, near *netlab.Host
}

var (
	clientV4, clientV6 = netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd00:9::2")
	podV4, podV6       = netip.MustParseAddr("10.8.0.2"), netip.MustParseAddr("fd00:8::2")
	nodeV4, nodeV6     = netip.MustParseAddr("10.8.0.1"), netip.MustParseAddr("fd00:8::1")
	nearV4, nearV6     = netip.MustParseAddr("10.7.0.2"), netip.MustParseAddr("fd00:7::2")
	vipV4, vipV6       = netip.MustParseAddr("10.96.7.7"), netip.MustParseAddr("fd00:96::7") // nobody has them
)

func newTopology(t testing.TB) *topology {
	t.Helper()
	netlab.Require(t)
	tp := &topology{
		netlab.MustHost(t, "client"), netlab.MustHost(t, "other"), netlab.MustHost(t, "node"),
		netlab.MustHost(t, "pod"), netlab.MustHost(t, "near"),
	}
	wire := func(a *netlab.Host, aName string, b *netlab.Host, bName string, a4, b4, a6, b6 string) {
		t.Helper()
		check(t, netlab.Cable(a, aName, b, bName), a.Up(aName), b.Up(bName),
			a.Addr(aName, netip.MustParsePrefix(a4)), b.Addr(bName, netip.MustParsePrefix(b4)))
		if netlab.IPv6() {
			check(t, a.Addr(aName, netip.MustParsePrefix(a6)), b.Addr(bName, netip.MustParsePrefix(b6)))
		}
	}
	wire(tp.client, "eth0", tp.other, "client", "10.9.0.2/24", "10.9.0.1/24", "fd00:9::2/64", "fd00:9::1/64")
	wire(tp.other, "eth0", tp.node, "eth0", "10.1.0.2/24", "10.1.0.1/24", "fd00:1::2/64", "fd00:1::1/64")
	wire(tp.pod, "eth0", tp.node, "pod", "10.8.0.2/24", "10.8.0.1/24", "fd00:8::2/64", "fd00:8::1/64")
	wire(tp.near, "eth0", tp.node, "near", "10.7.0.2/24", "10.7.0.1/24", "fd00:7::2/64", "fd00:7::1/64")
	check(t, tp.node.Forward(), tp.other.Forward(),
		// Distributions' default: a strict source check in the pod must not matter.
		tp.pod.Sysctl("net/ipv4/conf/all/rp_filter", "1"))
	for _, r := range []struct {
		h         *netlab.Host
		via, via6 string
	}{
		{tp.client, "10.9.0.1", "fd00:9::1"}, {tp.other, "10.1.0.1", "fd00:1::1"}, {tp.node, "10.1.0.2", "fd00:1::2"},
		{tp.pod, "10.8.0.1", "fd00:8::1"}, {tp.near, "10.7.0.1", "fd00:7::1"},
	} {
		check(t, r.h.Route(netlab.Route{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr(r.via)}))
		if netlab.IPv6() {
			check(t, r.h.Route(netlab.Route{Dst: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr(r.via6)}))
		}
	}
	return tp
}

func check(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// kind names a redirector in the suite's tables.
type kind string

const (
	byRules kind = "nftables"
	byMarks kind = "nftables by mark" // where the kernel compares no cgroups
	byHooks kind = "eBPF"
)

// redirector is what an agent needs of either.
type redirector interface {
	Apply(*netns.NS, redirect.PodRules) error
	Check(*netns.NS, redirect.PodRules) error
	Release(*netns.NS) error
	Remove(*netns.NS) error
	Present(*netns.NS) (bool, error)
	Uncaptured(*netns.NS, redirect.PodRules) (redirect.Uncaptured, error)
	Reset(*netns.NS, []sockdiag.Socket) (int, error)
	Limits() []redirect.Limit
}

// stage is a topology whose pods are steered by a redirector. The cgroups are nil
// where rules do it that know the proxy by its mark.
type stage struct {
	*topology
	kind             kind
	redirector       redirector
	app, proxy, host *netlab.Cgroup

	hooks *redirect.Hooks // if it is they
	cfg   redirect.HooksConfig
	rules *redirect.Dataplane // if it is they
	probe *redirect.Host
}

var everything = redirect.PodRules{DNS: true, IPv6: netlab.IPv6()}

// forEach runs f on a stage of each redirector.
func forEach(t *testing.T, f func(t *testing.T, s *stage)) {
	if netlab.EBPF() == nil {
		t.Run(string(byRules), func(t *testing.T) { f(t, newRulesStage(t)) })
	} else {
		t.Run(string(byMarks), func(t *testing.T) { f(t, newMarkStage(t)) })
	}
	t.Run(string(byHooks), func(t *testing.T) { f(t, newStage(t)) })
}

// forAll is forEach that has rules which know the proxy by its mark, too.
func forAll(t *testing.T, f func(t *testing.T, s *stage)) {
	if netlab.EBPF() == nil {
		t.Run(string(byMarks), func(t *testing.T) { f(t, newMarkStage(t)) })
	}
	forEach(t, f)
}

// limits are what redirectors cannot do, which their Limits name.
type limits map[kind]redirect.Limit

// newStage is one with hooks.
func newStage(t testing.TB) *stage {
	t.Helper()
	s := quietStage(t)
	s.open(t)
	t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
	return s
}

// quietStage is a stage for hooks without them. The proxy is not below the pods'
// root, as when it is a service of the node's; see TestHooksProxyAmongPods.
func quietStage(t testing.TB) *stage {
	t.Helper()
	cg := netlab.MustCgroups(t, "pods", "proxy", "host")
	s := &stage{topology: newTopology(t), kind: byHooks, app: cg[0], proxy: cg[1], host: cg[2]}
	s.cfg = redirect.HooksConfig{
		CgroupRoot: s.app.Path, Dir: netlab.MustBPFFS(t), Node: s.node.NS, Probes: true,
	}
	return s
}

// open starts the hooks, or takes over those that are there.
func (s *stage) open(t testing.TB) {
	t.Helper()
	h, err := redirect.OpenHooks(s.cfg)
	check(t, err)
	check(t, h.Proxy(s.proxy.Path))
	s.hooks, s.redirector = h, h
}

// newRulesStage is one with rules that know the proxy by its cgroup.
func newRulesStage(t testing.TB) *stage {
	t.Helper()
	cg := netlab.MustCgroups(t, "pods", "proxy", "host")
	s := newMarkStage(t)
	s.kind, s.app, s.proxy, s.host = byRules, cg[0], cg[1], cg[2]
	if changed, err := s.rules.Proxy(s.proxy.Path); err != nil || !changed {
		t.Fatalf("the proxy's cgroup is known: %t, %v; limits are %q", changed, err, s.rules.Limits())
	}
	return s
}

// newMarkStage is one with rules as they are where the kernel compares no cgroups.
func newMarkStage(t testing.TB) *stage {
	t.Helper()
	s := &stage{topology: newTopology(t), kind: byMarks}
	var err error
	s.rules, err = redirect.New(redirect.Config{})
	check(t, err)
	s.redirector = s.rules
	s.probe, err = redirect.NewHost(redirect.Config{}, s.node.NS)
	check(t, err)
	return s
}

// enrol captures the stage's pod, or those given.
func (s *stage) enrol(t testing.TB, pods ...*netlab.Host) {
	t.Helper()
	if len(pods) == 0 {
		pods = []*netlab.Host{s.pod}
	}
	for _, p := range pods {
		check(t, s.redirector.Apply(p.NS, everything), s.redirector.Check(p.NS, everything))
	}
	if s.probe != nil {
		check(t, s.probe.Set([]netip.Addr{podV4, podV6, nearV4, nearV6}))
	}
}

// nodeProbe is the address that a connection of the node's own seems to come from.
func (s *stage) nodeProbe(pod netip.Addr) netip.Addr {
	switch {
	case s.kind != byHooks && pod.Is4():
		return netip.MustParseAddr("169.254.7.127")
	case s.kind != byHooks:
		return netip.MustParseAddr("fd16:9254:7127:1337:ffff:ffff:ffff:ffff")
	case pod.Is4():
		return nodeV4
	}
	return nodeV6
}

// family is one set of the topology's addresses.
type family struct {
	name                         string
	pod, near, client, node, vip netip.Addr
	loopback, any                netip.Addr
}

func families() []family {
	all := []family{{"IPv4", podV4, nearV4, clientV4, nodeV4, vipV4, netip.MustParseAddr("127.0.0.1"), netip.IPv4Unspecified()}}
	if netlab.IPv6() {
		all = append(all, family{"IPv6", podV6, nearV6, clientV6, nodeV6, vipV6, netip.IPv6Loopback(), netip.IPv6Unspecified()})
	}
	return all
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

func mapped(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }
