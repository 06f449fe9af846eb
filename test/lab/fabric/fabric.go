// Package fabric is the lab's network: one switch, the machines plugged into it,
// and the pods behind the machines.
//
//	pod eth0 ── veth ── node-1 eth0 ── bridge ── eth0 node-2 ── veth ── eth0 pod
//	10.244.1.2          172.30.0.11             172.30.0.12          10.244.2.2
//
// Pods have host routes (one /32 and one /128 each) and no netfilter rule of the
// lab's: what plays kube-proxy stands in the node's namespace. A Network's methods
// may be called from any goroutine.
package fabric

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// ControlName is the machine on which the control plane runs.
const ControlName = "control"

// Machine is one host on the switch.
type Machine struct {
	*netlab.Host
	Addrs   []netip.Addr   // IPv4 first
	PodNets []netip.Prefix // IPv4 first; none for the control machine

	mu    sync.Mutex
	taken map[uint16]bool // pod numbers in use; guarded by mu
	next  uint16          // guarded by mu
}

// Pod is a pod's place in the network.
type Pod struct {
	*netlab.Host
	Addrs []netip.Addr
	Link  string // the machine's end of the cable

	machine *Machine
	number  uint16
}

// Network is the whole of it.
type Network struct {
	dir     string
	fabric  *netlab.Host
	Control *Machine
	Nodes   []*Machine
	IPv6    bool
}

// New builds the network with n nodes. Namespaces are mounted below dir.
func New(dir string, n int) (*Network, error) {
	if n < 1 || n > 200 {
		return nil, fmt.Errorf("%d nodes: want 1 to 200", n)
	}
	net := &Network{dir: dir, IPv6: netlab.IPv6()}
	var err error
	if net.fabric, err = netlab.New("fabric", filepath.Join(dir, "fabric")); err != nil {
		return nil, err
	}
	if err := net.fabric.Bridge("br0"); err != nil {
		return nil, err
	}
	if net.Control, err = net.machine(ControlName, 5, 0); err != nil {
		return nil, err
	}
	for i := 1; i <= n; i++ {
		m, err := net.machine(fmt.Sprintf("node-%d", i), byte(10+i), byte(i))
		if err != nil {
			return nil, err
		}
		net.Nodes = append(net.Nodes, m)
	}
	return net, net.routes()
}

// machine makes a host and plugs it in. Its number is the last byte of its
// addresses and, for nodes, cidr the number of its pod networks.
func (n *Network) machine(name string, number, cidr byte) (*Machine, error) {
	h, err := netlab.New(name, filepath.Join(n.dir, name))
	if err != nil {
		return nil, err
	}
	m := &Machine{Host: h, taken: map[uint16]bool{}, next: 2}
	m.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{172, 30, 0, number})}
	if cidr != 0 {
		m.PodNets = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, cidr, 0}), 24)}
	}
	if n.IPv6 {
		m.Addrs = append(m.Addrs, netip.MustParseAddr(fmt.Sprintf("fd00:172:30::%d", number)))
		if cidr != 0 {
			m.PodNets = append(m.PodNets, netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", cidr)))
		}
	}
	port := "to-" + name
	if len(port) > 15 { // the kernel's bound on names
		port = port[:15]
	}
	if err := errors.Join(netlab.Cable(h, "eth0", n.fabric, port), n.fabric.Attach(port, "br0"),
		n.fabric.Up(port), h.Up("eth0"), h.Forward()); err != nil {
		return nil, err
	}
	for i, a := range m.Addrs {
		if err := h.Addr("eth0", netip.PrefixFrom(a, []int{24, 64}[i])); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// routes tells every machine behind which node each pod network is.
func (n *Network) routes() error {
	for _, m := range append([]*Machine{n.Control}, n.Nodes...) {
		for _, to := range n.Nodes {
			if to == m {
				continue
			}
			for i, p := range to.PodNets {
				if err := m.Route(netlab.Route{Dst: p, Via: to.Addrs[i], Link: "eth0"}); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// Node returns a node by name.
func (n *Network) Node(name string) (*Machine, bool) {
	for _, m := range n.Nodes {
		if m.Name == name {
			return m, true
		}
	}
	return nil, false
}

// Machine returns a node or the control machine by name.
func (n *Network) Machine(name string) (*Machine, bool) {
	if name == ControlName {
		return n.Control, true
	}
	return n.Node(name)
}

// Hosts are the network's own namespaces: the switch and all machines. Whatever a
// pod sends to others passes one of them.
func (n *Network) Hosts() []*netlab.Host {
	out := []*netlab.Host{n.fabric, n.Control.Host}
	for _, m := range n.Nodes {
		out = append(out, m.Host)
	}
	return out
}

// Close takes the network apart.
func (n *Network) Close() {
	for _, m := range append([]*Machine{n.Control}, n.Nodes...) {
		m.Close()
	}
	n.fabric.Close()
}

// AddPod makes a pod's namespace, cables it to the node and gives it addresses.
func (n *Network) AddPod(m *Machine, name string) (*Pod, error) {
	number, err := m.take()
	if err != nil {
		return nil, err
	}
	h, err := netlab.New(name, filepath.Join(n.dir, name))
	if err != nil {
		m.release(number)
		return nil, err
	}
	p := &Pod{Host: h, Link: fmt.Sprintf("pod%d", number), machine: m, number: number}
	for _, net := range m.PodNets {
		p.Addrs = append(p.Addrs, nth(net, number))
	}
	if err := n.connect(m, p); err != nil {
		p.Remove()
		return nil, err
	}
	return p, nil
}

func (n *Network) connect(m *Machine, p *Pod) error {
	if err := errors.Join(netlab.Cable(p.Host, "eth0", m.Host, p.Link), p.Up("eth0"), m.Up(p.Link)); err != nil {
		return err
	}
	for i, a := range p.Addrs {
		gateway := nth(m.PodNets[i], 1)
		all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if a.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
		if err := errors.Join(
			m.Addr(p.Link, host(gateway)), p.Addr("eth0", host(a)),
			p.Route(netlab.Route{Dst: host(gateway), Link: "eth0"}),
			p.Route(netlab.Route{Dst: all, Via: gateway, Link: "eth0"}),
			m.Route(netlab.Route{Dst: host(a), Link: p.Link, Source: gateway}),
		); err != nil {
			return err
		}
	}
	return nil
}

// Remove unplugs the pod and lets go of its namespace and addresses.
func (p *Pod) Remove() {
	_ = p.machine.Unplug(p.Link) // the cable may never have been laid
	p.Close()
	p.machine.release(p.number)
}

// take finds a free pod number. Numbers are used in turn, so that an address is
// not given to another pod at once.
func (m *Machine) take() (uint16, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for range 253 {
		n := m.next
		if m.next++; m.next > 254 {
			m.next = 2
		}
		if !m.taken[n] {
			m.taken[n] = true
			return n, nil
		}
	}
	return 0, fmt.Errorf("%s has no free pod address (253 pods)", m.Name)
}

func (m *Machine) release(n uint16) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.taken, n)
}

// nth returns the n-th address of a network.
func nth(p netip.Prefix, n uint16) netip.Addr {
	b := p.Addr().AsSlice()
	b[len(b)-1] = byte(n)
	b[len(b)-2] |= byte(n >> 8)
	a, _ := netip.AddrFromSlice(b) // of the length it had
	return a
}
