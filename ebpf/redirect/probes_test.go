package redirect_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// from binds a socket that leaves nothing behind when it is closed.
func from(a netip.AddrPort) func(int) error {
	return func(fd int) error {
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), unix.Bind(fd, sockaddr(a)))
	}
}

// translation is a NAT rule of the node's: what leaves for match, or comes from it,
// does so for or from to.
type translation struct {
	source    bool
	match, to netip.AddrPort
}

func (r translation) add(t *testing.T, ns *netns.NS) (remove func()) {
	t.Helper()
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "lab"}
	check(t, ns.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		c.AddTable(table)
		chain := &nftables.Chain{Name: "c", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest}
		kind, offset, length, port, family := expr.NATTypeDestNAT, uint32(16), uint32(4), uint32(2), uint32(unix.NFPROTO_IPV4)
		if r.match.Addr().Is6() {
			offset, length, family = 24, 16, unix.NFPROTO_IPV6
		}
		if r.source {
			chain.Hooknum, chain.Priority = nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource
			kind, offset, port = expr.NATTypeSourceNAT, offset-length, 0
		}
		ports := func(a netip.AddrPort) []byte { return binary.BigEndian.AppendUint16(nil, a.Port()) }
		c.AddRule(&nftables.Rule{Table: table, Chain: c.AddChain(chain), Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{byte(family)}},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: r.match.Addr().AsSlice()},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ports(r.match)},
			&expr.Immediate{Register: 1, Data: r.to.Addr().AsSlice()},
			&expr.Immediate{Register: 2, Data: ports(r.to)},
			&expr.NAT{Type: kind, Family: family, RegAddrMin: 1, RegProtoMin: 2, Specified: true},
		}})
		return c.Flush()
	}))
	return func() {
		t.Helper()
		check(t, ns.Do(func() error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			c.DelTable(table)
			return c.Flush()
		}))
	}
}

// stranger opens a connection to a pod that looks there as a probe did a moment ago.
type stranger struct {
	name  string
	cg    *netlab.Cgroup
	ns    *netns.NS
	probe netip.AddrPort // each has a port to itself, which the node may go on tracking
	by    func(fd int) error
	to    netip.AddrPort
	nat   *translation
	blind bool // answers go to the node, which knows nothing of it
}

func (s *stage) strangers(t *testing.T, name string, pod netip.AddrPort, all []stranger) {
	for _, f := range all {
		t.Run(name+" "+f.name, func(t *testing.T) {
			if c, err := connect(s.host, s.node.NS, pod, from(f.probe)); err != nil || c.line != fmt.Sprintf("app %s %s", pod, f.probe.Addr()) {
				t.Fatalf("the probe was answered %q, %v", c.line, err)
			}
			if n, err := s.hooks.Probes(); err != nil || n != 1 {
				t.Fatalf("%d probes are known, %v", n, err)
			}
			if f.nat != nil {
				// Only now: what the node tracks has its ports to itself.
				defer f.nat.add(t, s.node.NS)()
			}
			c, err := connect(f.cg, f.ns, f.to, func(fd int) error { return both(f.by(fd), impatient(fd)) })
			if f.blind {
				if err == nil {
					t.Errorf("answered %q", c.line)
				}
			} else if err := refused(c, err); err != nil {
				t.Error(err)
			}
			if n, err := s.hooks.Probes(); err != nil || n != 0 {
				t.Errorf("%d probes are known after a stranger came with the same addresses and ports, %v", n, err)
			}
		})
	}
}

// TestHooksProbesOfOthers has strangers with the addresses and ports of a probe, at a
// pod that takes no plaintext from anybody else.
func TestHooksProbesOfOthers(t *testing.T) {
	for _, noTCX := range []bool{false, true} {
		t.Run(fmt.Sprintf("without TCX %t", noTCX), func(t *testing.T) {
			s := quietStage(t)
			if noTCX {
				s.cfg.WithoutTCX()
			}
			s.open(t)
			t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
			// Otherwise the node itself drops what comes with an address of its own.
			check(t, s.node.Sysctl("net/ipv4/conf/all/accept_local", "1"), s.node.Sysctl("net/ipv4/conf/near/accept_local", "1"))
			s.carry(t, s.pod, true)
			answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
			s.enrol(t)
			for _, a := range families() {
				pod, vip, client, other := at(a.pod, 8080), at(a.vip, 80), at(a.client, 20200), at(a.node, 20300)
				probe := func(i uint16) netip.AddrPort { return at(a.node, 20100+i) }
				s.strangers(t, a.name, pod, []stranger{
					{name: "pod in the node's namespace", cg: s.app, probe: probe(1), ns: s.node.NS, by: from(probe(1)), to: pod},
					{name: "pod in the node's namespace by a service", cg: s.app, probe: probe(2), ns: s.node.NS, by: from(probe(2)), to: vip, nat: &translation{match: vip, to: pod}},
					{name: "node's process by a service", cg: s.host, probe: probe(3), ns: s.node.NS, by: from(probe(3)), to: vip, nat: &translation{match: vip, to: pod}},
					{name: "node's process from another port", cg: s.host, probe: probe(4), ns: s.node.NS, by: from(other), to: pod,
						nat: &translation{source: true, match: other, to: probe(4)}},
					{name: "stranger in the node's name", cg: s.host, probe: probe(5), ns: s.client.NS, by: from(client), to: pod,
						nat: &translation{source: true, match: client, to: probe(5)}},
					{name: "pod with the node's address", cg: s.app, probe: probe(6), ns: s.near.NS, to: pod, blind: true,
						by: func(fd int) error { return both(transparent(fd), from(probe(6))(fd)) }},
				})
			}
		})
	}
}

// TestHooksProbesOverABridge has pods on a bridge of the node's, which forwards frames
// with the sockets that they are from.
func TestHooksProbesOverABridge(t *testing.T) {
	s := newStage(t)
	pods := [2]*netlab.Host{netlab.MustHost(t, "one"), netlab.MustHost(t, "two")}
	addrs := [2]netip.Addr{netip.MustParseAddr("10.6.0.2"), netip.MustParseAddr("10.6.0.3")}
	bridge := netip.MustParseAddr("10.6.0.1")
	check(t, s.node.Bridge("cni0"), s.node.Up("cni0"), s.node.Addr("cni0", netip.PrefixFrom(bridge, 24)))
	for i, p := range pods {
		name := fmt.Sprint("cni", i+1)
		check(t, netlab.Cable(p, "eth0", s.node, name), s.node.Attach(name, "cni0"), p.Up("eth0"), s.node.Up(name),
			p.Addr("eth0", netip.PrefixFrom(addrs[i], 24)), p.Route(netlab.Route{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: bridge}))
	}
	s.carry(t, pods[0], true)
	answer(t, listen(t, s.app, pods[0].NS, "0.0.0.0:8080", nil), "app")
	rules := redirect.PodRules{DNS: true}
	check(t, s.hooks.Apply(pods[0].NS, rules), s.hooks.Check(pods[0].NS, rules))
	probe, pod := at(bridge, 20100), at(addrs[0], 8080)
	s.strangers(t, "IPv4", pod, []stranger{
		{name: "pod in the node's namespace", cg: s.app, probe: probe, ns: s.node.NS, by: from(probe), to: pod},
		{name: "process of the node in another pod, with the node's address", cg: s.host, probe: probe, ns: pods[1].NS, to: pod, blind: true,
			by: func(fd int) error { return both(transparent(fd), from(probe)(fd)) }},
		{name: "pod with the node's address", cg: s.app, probe: probe, ns: pods[1].NS, to: pod, blind: true,
			by: func(fd int) error { return both(transparent(fd), from(probe)(fd)) }},
	})
	if c, err := connect(s.app, pods[1].NS, pod, nil); refused(c, err) != nil {
		t.Error("another pod: ", refused(c, err))
	}
}

// TestHooksWithoutProbes treats the node as a stranger where it is told to, and where
// it cannot know it, which it says.
func TestHooksWithoutProbes(t *testing.T) {
	for _, tc := range []struct {
		name  string
		first func(*redirect.HooksConfig)
		then  func(*redirect.HooksConfig)
		limit bool
	}{
		{name: "not wanted any more", then: func(c *redirect.HooksConfig) { c.Probes = false }},
		{name: "not wanted any more, without TCX", first: (*redirect.HooksConfig).WithoutTCX, then: func(c *redirect.HooksConfig) { c.Probes = false }},
		{name: "no end of the cable at the node", first: func(c *redirect.HooksConfig) { c.Node = nil }, limit: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := quietStage(t)
			if tc.first != nil {
				tc.first(&s.cfg)
			}
			s.open(t)
			t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
			s.carry(t, s.pod, true)
			answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
			s.enrol(t)
			if tc.then != nil {
				if c, err := connect(s.host, s.node.NS, at(podV4, 8080), nil); err != nil {
					t.Errorf("a probe was answered %q, %v", c.line, err)
				}
				check(t, s.hooks.Close())
				tc.then(&s.cfg)
				s.open(t)
				s.enrol(t)
			}
			if err := refused(connect(s.host, s.node.NS, at(podV4, 8080), nil)); err != nil {
				t.Error(err)
			}
			if limits := s.hooks.Limits(); slices.Contains(limits, redirect.LimitProbes) != tc.limit {
				t.Errorf("limits are %q", limits)
			}
			check(t, s.hooks.Remove(s.pod.NS))
			if limits := s.hooks.Limits(); slices.Contains(limits, redirect.LimitProbes) {
				t.Errorf("without pods limits are %q", limits)
			}
		})
	}
}
