package redirect_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// A pod's container has CAP_NET_RAW unless somebody took it away. Nothing that it
// sets on a socket gets a connection past the proxy, or has it come from somebody
// else.
func TestSocketsOfAttackers(t *testing.T) {
	forAll(t, func(t *testing.T, s *stage) {
		answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "client")
		for _, port := range proxyPorts {
			answer(t, listen(t, s.proxy, s.near.NS, fmt.Sprintf("[::]:%d", port), proxyOptions), fmt.Sprintf("near's %d", port))
		}
		s.listenProxy(t)
		s.enrol(t, s.pod, s.near)
		mark := func(mark int) func(family) func(int) error {
			return func(family) func(int) error {
				return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark) }
			}
		}
		foreign := func(of func(family) netip.Addr, more func(int) error) func(family) func(int) error {
			return func(a family) func(int) error {
				return func(fd int) error {
					if more != nil {
						if err := more(fd); err != nil {
							return err
						}
					}
					return errors.Join(impatient(fd), transparent(fd), unix.Bind(fd, sockaddr(at(of(a), 0))))
				}
			}
		}
		byMark := limits{byMarks: redirect.LimitMark}
		marked := mark(redirect.MarkProxy)(family{})
		near := func(a family) netip.Addr { return a.near }
		client := func(a family) netip.Addr { return a.client }
		for _, a := range families() {
			for _, tc := range []struct {
				name    string
				to      netip.AddrPort
				prepare func(family) func(int) error
				limits  limits
			}{
				{"the proxy's mark", at(a.client, 8080), mark(redirect.MarkProxy), byMark},
				{"the proxy's mark among other bits", at(a.client, 8080), mark(0xabc000 | redirect.MarkProxy), byMark},
				{"the mark of the way back", at(a.client, 8080), mark(redirect.MarkReturn), nil},
				{"a neighbour's address", at(a.client, 8080), foreign(near, nil), nil},
				{"a neighbour's address and the proxy's mark", at(a.client, 8080), foreign(near, marked), nil},
				{"the client's address, to a neighbour", at(a.near, 8080), foreign(client, nil), nil},
				{"the client's address, to a neighbour's proxy", at(a.near, redirect.PortHBONE), foreign(client, nil), nil},
				{"the client's address and the proxy's mark, to a neighbour", at(a.near, 8080), foreign(client, marked), nil},
				{"the proxy's mark, to a neighbour's proxy", at(a.near, redirect.PortHBONE), mark(redirect.MarkProxy), byMark},
				{"the node's address, to a neighbour", at(a.near, 8080), foreign(func(a family) netip.Addr { return a.node }, nil), nil},
				{"the node's address and the proxy's mark, to a neighbour", at(a.near, 8080), foreign(func(a family) netip.Addr { return s.nodeProbe(a.pod) }, marked), nil},
			} {
				s.row(t, a.name+" "+tc.name, tc.limits, func() error {
					var c call
					err := contained(s.app, s.pod.NS, func() (err error) {
						c, err = connectHere(tc.to, tc.prepare(a))
						return err
					})
					if errors.Is(err, unix.EPERM) && c == (call{}) {
						return fmt.Errorf("the attack itself was not possible: %w", err)
					}
					// No connection is as good as a captured one.
					if c.line != "" && !strings.HasPrefix(c.line, "15001 ") && !strings.HasPrefix(c.line, "15006 ") {
						return fmt.Errorf("the connection was answered %q", c.line)
					}
					return nil
				})
			}
		}
	})
}

// squat is an app on one of the proxy's ports.
type squat struct {
	port   uint16
	before bool // it was there before the pod was enrolled
	any    bool // at all addresses
	reuse  bool // it shares the port
}

func (q squat) String() string {
	name := fmt.Sprintf("port %d", q.port)
	for _, w := range []struct {
		is      bool
		yes, no string
	}{{q.before, "before enrolment", "after enrolment"}, {q.any, "all addresses", "one address"}, {q.reuse, "shared", "alone"}} {
		if w.is {
			name += ", " + w.yes
		} else {
			name += ", " + w.no
		}
	}
	return name
}

// listen has a container take the port; that it may not is as good.
func (q squat) listen(t *testing.T, s *stage) {
	for _, a := range families() {
		addrs := []netip.Addr{a.pod, a.loopback}
		if q.any {
			addrs = []netip.Addr{a.any}
		}
		for _, addr := range addrs {
			fd := -1
			err := contained(s.app, s.pod.NS, func() (err error) {
				if fd, err = stream(addr, 0, 0); err != nil {
					return err
				}
				if addr.Is6() {
					err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
				}
				err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
				if q.reuse {
					err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
				}
				return errors.Join(err, unix.Bind(fd, sockaddr(at(addr, q.port))), unix.Listen(fd, 128))
			})
			if err == nil {
				answer(t, listenerOf(t, fd), "thief")
			} else if fd >= 0 {
				_ = unix.Close(fd) // it has no use
			}
		}
	}
}

func TestSquatters(t *testing.T) {
	var squats []squat
	for _, port := range proxyPorts {
		for i := range 8 {
			squats = append(squats, squat{port, i&1 != 0, i&2 != 0, i&4 != 0})
		}
	}
	forEach(t, func(t *testing.T, s *stage) {
		answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "client")
		answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
		for _, q := range squats {
			// Which listener has the better claim to an address, or comes first, the rules cannot say.
			of := limits{byRules: redirect.LimitPorts, byMarks: redirect.LimitPorts}
			if !q.before && !q.reuse || q.port == redirect.PortOutbound || q.port == redirect.PortDNS {
				of = nil
			}
			s.row(t, q.String(), of, func() (err error) {
				t.Run("", func(t *testing.T) { err = q.try(t, s) })
				check(t, s.redirector.Remove(s.pod.NS))
				return err
			})
		}
	})
}

// try has the squatter listen, the pod be enrolled and the proxy listen as far as it
// can, and tells who is answered by the squatter.
func (q squat) try(t *testing.T, s *stage) error {
	if q.before {
		q.listen(t, s)
	}
	s.enrol(t)
	for _, port := range proxyPorts {
		// Where the port is taken, the proxy does without, and nobody connects.
		if ln, err := tryListen(t, s.proxy, s.pod.NS, fmt.Sprintf("[::]:%d", port), proxyOptions); err == nil {
			answer(t, ln, fmt.Sprint(port))
		}
	}
	if !q.before {
		q.listen(t, s)
	}
	rounds := 1
	if q.reuse {
		rounds = 3 // listeners that share a port take turns
	}
	for range rounds {
		for _, a := range families() {
			for _, to := range []uint16{8080, redirect.PortHBONE, q.port} {
				c, err := connect(s.app, s.client.NS, at(a.pod, to), impatient)
				if err == nil && !strings.HasPrefix(c.line, "1500") {
					return fmt.Errorf("a client of port %d was answered %q", to, c.line)
				}
			}
			c, err := connect(s.app, s.pod.NS, at(a.client, 8080), impatient)
			if err == nil && strings.HasPrefix(c.line, "client") {
				return fmt.Errorf("the pod's connection was answered %q", c.line)
			}
			if s.kind == byHooks && err == nil && !strings.HasPrefix(c.line, "15001 ") {
				return fmt.Errorf("the pod's connection was answered %q", c.line)
			}
		}
	}
	return nil
}

// TestSquattersOnNames take the proxy's UDP port: what they answer is their own pod's,
// and no query leaves it.
func TestSquattersOnNames(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		outside := packetConn(t, s.app, s.client.NS, at(clientV4, 53))
		take := func() error {
			return contained(s.app, s.pod.NS, func() error {
				fd, err := datagram(podV4)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if err := unix.Bind(fd, sockaddr(at(netip.IPv4Unspecified(), redirect.PortDNS))); err != nil {
					return err
				}
				return s.ask(s.pod.NS)
			})
		}
		check(t, s.redirector.Apply(s.pod.NS, everything))
		err := take()
		if s.kind == byHooks && !errors.Is(err, unix.EPERM) {
			t.Errorf("bind to the proxy's port for names: %v, want EPERM", err)
		}
		check(t, outside.SetReadDeadline(deadline()))
		go func() {
			_, _ = outside.WriteToUDPAddrPort([]byte("last"), outside.LocalAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort())
		}()
		b := make([]byte, 16)
		if n, from, err := outside.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != "last" {
			t.Errorf("the server outside got %q from %v, %v", b[:n], from, err)
		}
	})
}

func (s *stage) ask(*netns.NS) error {
	fd, err := datagram(clientV4)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return ignoreDrop(unix.Sendto(fd, []byte("query"), 0, sockaddr(at(clientV4, 53))))
}

// TestHooksHandOverIsNobodyElses has a pod connect to addresses that stand for other
// connections' destinations.
func TestHooksHandOverIsNobodyElses(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t)
	for _, to := range []string{"127.64.0.1:15001", "127.127.255.254:15053", "[fd16:9254:7127:a15a::1]:15001"} {
		err := contained(s.app, s.pod.NS, func() error { _, err := connectHere(netip.MustParseAddrPort(to), nil); return err })
		if !errors.Is(err, unix.EPERM) {
			t.Errorf("connection to %s: %v, want EPERM", to, err)
		}
	}
}

// TestHooksAliasesAreNobodyElses has a neighbour send to the addresses that stand for a
// pod's destinations: a network that the pod shares with others, or a route, takes
// what is sent there to the pod.
func TestHooksAliasesAreNobodyElses(t *testing.T) {
	if !netlab.IPv6() {
		t.Skip("needs IPv6: a kernel takes IPv4's loopback addresses from no network")
	}
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t)
	check(t, s.node.Route(netlab.Route{Dst: netip.MustParsePrefix("fd16:9254:7127:a15a::/96"), Via: podV6}),
		s.near.Route(netlab.Route{Dst: netip.MustParsePrefix("fd16:9254:7127:a15a::/96"), Via: netip.MustParseAddr("fd00:7::1")}))
	for _, port := range append(slices.Clone(proxyPorts), 8080) {
		to := at(netip.MustParseAddr("fd16:9254:7127:a15a::1"), port)
		if c, err := connect(s.app, s.near.NS, to, impatient); err == nil {
			t.Errorf("a neighbour's connection to %s was accepted: %+v", to, c)
		}
	}
	// The pod's own still are.
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "client")
	if c, err := connect(s.app, s.pod.NS, at(clientV6, 8080), nil); err != nil || !strings.HasPrefix(c.line, "15001 ") {
		t.Errorf("the pod's connection was answered %q, %v", c.line, err)
	}
}
