package redirect_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// TestDNS asks three servers from one socket: each answer has to come from the server
// that was asked.
func TestDNS(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.listenProxy(t)
		s.enrol(t)
		servers := map[string][]netip.Addr{
			"IPv4":                   {netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("10.96.0.11"), netip.MustParseAddr("8.8.8.8")},
			"IPv4 in an IPv6 socket": {mapped(netip.MustParseAddr("10.96.0.10")), mapped(netip.MustParseAddr("10.96.0.11")), mapped(clientV4)},
		}
		if everything.IPv6 {
			servers["IPv6"] = []netip.Addr{netip.MustParseAddr("fd00:96::10"), netip.MustParseAddr("fd00:96::11"), clientV6}
		}
		defer s.resolve(t)()
		for name, asked := range servers {
			for _, tc := range []struct {
				name string
				run  func([]netip.Addr) error
			}{
				{"one socket, three servers", askAll},
				{"connected", func(a []netip.Addr) error { return askConnected(a[1]) }},
				{"connected to one after another", func(a []netip.Addr) error { return askOneAfterAnother(a) }},
				{"over TCP", func(a []netip.Addr) error {
					c, err := connectHere(at(a[0], 53), nil)
					if want := fmt.Sprintf("15053 %s ", at(a[0].Unmap(), 53)); err != nil || len(c.line) < len(want) || c.line[:len(want)] != want || c.peer != at(a[0], 53) {
						return fmt.Errorf("answered %q, %v, peer %v, want %q", c.line, err, c.peer, want)
					}
					return nil
				}},
			} {
				s.row(t, name+", "+tc.name, nil, func() error {
					return in(s.app, s.pod.NS, func() error { return tc.run(asked) })
				})
			}
		}
	})
}

// datagram makes a UDP socket for to that waits three seconds at most.
func datagram(to netip.Addr) (int, error) {
	family := unix.AF_INET
	if to.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, patience(fd)
}

func askAll(servers []netip.Addr) error {
	fd, err := datagram(servers[0])
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	want := map[string]netip.AddrPort{}
	for i, a := range servers {
		q := fmt.Sprintf("query %d", i)
		want[q] = at(a, 53)
		if err := unix.Sendto(fd, []byte(q), 0, sockaddr(want[q])); err != nil {
			return fmt.Errorf("ask %v: %w", a, err)
		}
	}
	b := make([]byte, 64)
	for range servers {
		n, from, err := recvfrom(fd, b)
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if q := string(b[:n]); addrPort(from) != want[q] {
			return fmt.Errorf("the answer to %q came from %v, want %v", q, addrPort(from), want[q])
		}
	}
	return nil
}

// askConnected has a socket that hears its server only.
func askConnected(server netip.Addr) error {
	fd, err := datagram(server)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return connectAndAsk(fd, at(server, 53))
}

func connectAndAsk(fd int, to netip.AddrPort) error {
	if err := unix.Connect(fd, sockaddr(to)); err != nil {
		return err
	}
	if peer, err := peerAddr(fd); err != nil || peer != to {
		return fmt.Errorf("getpeername tells %v, %v, want %v", peer, err, to)
	}
	own := podV4
	if to.Addr().Is6() && !to.Addr().Is4In6() {
		own = podV6
	}
	// Resolvers choose between addresses by this one (RFC 6724 §5), and some connect to port 53 for it.
	if local, err := localAddr(fd); err != nil || local.Addr().Unmap() != own {
		return fmt.Errorf("getsockname tells %v, %v, want the pod's own %v", local, err, own)
	}
	return ask(fd, to)
}

// ask has the server that fd is connected to answer.
func ask(fd int, to netip.AddrPort) error {
	if _, err := unix.Write(fd, []byte("connected")); err != nil {
		return err
	}
	b := make([]byte, 64)
	n, from, err := recvfrom(fd, b)
	if err != nil || string(b[:n]) != "connected" || addrPort(from) != to {
		return fmt.Errorf("connected to %v: %q from %v, %v", to, b[:max(n, 0)], addrPort(from), err)
	}
	return nil
}

func askOneAfterAnother(servers []netip.Addr) error {
	fd, err := datagram(servers[0])
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, a := range servers {
		if err := connectAndAsk(fd, at(a, 53)); err != nil {
			return err
		}
	}
	return nil
}

// resolve answers datagrams in the pod with themselves, from the address they were
// sent to; "where" with that address.
func (s *stage) resolve(t *testing.T) (stop func()) {
	t.Helper()
	var pc *net.UDPConn
	check(t, in(s.proxy, s.pod.NS, func() error {
		lc := &net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) {
				// An IPv6 alias is local by route alone: answering from it takes a transparent socket.
				err = errors.Join(asProxy(int(fd)),
					ignoreFamily(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_PKTINFO, 1)),
					ignoreFamily(unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1)))
			})
			return errors.Join(cerr, err)
		}}
		p, err := lc.ListenPacket(t.Context(), "udp", fmt.Sprintf(":%d", redirect.PortDNS))
		if err == nil {
			pc = p.(*net.UDPConn)
		}
		return err
	}))
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		b, oob := make([]byte, 512), make([]byte, 512)
		for {
			n, on, _, from, err := pc.ReadMsgUDPAddrPort(b, oob)
			if err != nil {
				return
			}
			if string(b[:n]) == "where" {
				n = copy(b, sentTo(oob[:on]).String())
			}
			// What came tells where it was sent to; sent back it tells where from.
			_, _, _ = pc.WriteMsgUDPAddrPort(b[:n], oob[:on], from)
		}
	}()
	return func() { pc.Close(); <-donec }
}

// TestHooksForwardQueries has the proxy ask a server by the alias that it was asked
// at.
func TestHooksForwardQueries(t *testing.T) {
	s := newStage(t)
	s.enrol(t)
	defer s.resolve(t)()
	for _, a := range families() {
		pc := packetConn(t, s.app, s.client.NS, at(a.client, 53))
		donec := make(chan string, 1)
		go func() {
			b := make([]byte, 64)
			n, _, _ := pc.ReadFromUDPAddrPort(b)
			donec <- string(b[:n])
		}()
		var alias netip.Addr
		check(t, in(s.app, s.pod.NS, func() error {
			fd, err := datagram(a.client)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			b := make([]byte, 64)
			if err := unix.Sendto(fd, []byte("where"), 0, sockaddr(at(a.client, 53))); err != nil {
				return err
			}
			n, _, err := recvfrom(fd, b)
			if err == nil {
				alias, err = netip.ParseAddr(string(b[:n]))
			}
			return err
		}))
		check(t, in(s.proxy, s.pod.NS, func() error {
			fd, err := datagram(alias)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Sendto(fd, []byte("forwarded"), 0, sockaddr(at(alias, 53)))
		}))
		if got := <-donec; got != "forwarded" {
			t.Errorf("the server at %v got %q from the proxy", a.client, got)
		}
	}
}

// TestHooksManyServers has a pod ask for more servers than all pods together have
// aliases for: the others keep theirs, and it gets what it does not use any more.
func TestHooksManyServers(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t, s.pod, s.near)
	defer s.resolve(t)()
	for _, f := range families() {
		server := at(f.vip, 53)
		var long int // a resolver's socket that lasts
		check(t, in(s.app, s.pod.NS, func() (err error) {
			if long, err = datagram(server.Addr()); err != nil {
				return err
			}
			return connectAndAsk(long, server)
		}))
		defer unix.Close(long)
		greedy := func(from, n int) (refused int) {
			check(t, in(s.app, s.near.NS, func() error {
				fd, err := datagram(server.Addr())
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				b := f.client.As16()
				for i := range n {
					binary.BigEndian.PutUint32(b[12:], uint32(0x0b000000+from+i))
					to := sockaddr(at(netip.AddrFrom16(b).Unmap(), 53))
					// Twice: the kernel evicts first what was asked for once.
					switch err := errors.Join(unix.Connect(fd, to), unix.Connect(fd, to)); {
					case errors.Is(err, unix.EPERM):
						refused++
					case err != nil:
						return err
					}
				}
				return nil
			}))
			return refused
		}
		const all = 65536 // aliases of all pods
		if refused := greedy(0, 3*all); refused < 2*all {
			t.Errorf("%s: %d of %d servers of one pod were refused", f.name, refused, 3*all)
		}
		if err := in(s.app, s.pod.NS, func() error { return ask(long, server) }); err != nil {
			t.Errorf("%s: a pod after another one asked many servers: %v", f.name, err)
		}
		check(t, s.hooks.AgeAliases())
		if refused := greedy(3*all, 100); refused != 0 {
			t.Errorf("%s: %d of 100 servers were refused although no other is asked any more", f.name, refused)
		}
	}
}

// TestUDPIsLeftAlone sends datagrams both ways, from and to ports of the proxy's too.
func TestUDPIsLeftAlone(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.listenProxy(t)
		s.enrol(t)
		for _, a := range families() {
			for _, port := range []uint16{7000, 53, 443, redirect.PortOutbound, redirect.PortHBONE} {
				s.row(t, fmt.Sprintf("%s port %d", a.name, port), nil, func() error {
					inside, outside := packetConn(t, s.app, s.pod.NS, at(a.pod, port)), packetConn(t, s.app, s.client.NS, at(a.client, 7000))
					if _, err := inside.WriteToUDPAddrPort([]byte("out"), at(a.client, 7000)); err != nil {
						return err
					}
					b := make([]byte, 8)
					if n, from, err := outside.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != "out" || from != at(a.pod, port) {
						return fmt.Errorf("%q from %v, %w", b[:n], from, err)
					}
					if _, err := outside.WriteToUDPAddrPort([]byte("in"), at(a.pod, port)); err != nil {
						return err
					}
					if n, from, err := inside.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != "in" || from != at(a.client, 7000) {
						return fmt.Errorf("%q from %v, %w", b[:n], from, err)
					}
					return errors.Join(inside.Close(), outside.Close())
				})
			}
		}
	})
}

// sentTo reads IP_PKTINFO or IPV6_PKTINFO.
func sentTo(oob []byte) netip.Addr {
	msgs, _ := unix.ParseSocketControlMessage(oob)
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_PKTINFO:
			return netip.AddrFrom4([4]byte(m.Data[8:12]))
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_PKTINFO:
			return netip.AddrFrom16([16]byte(m.Data[:16])).Unmap()
		}
	}
	return netip.Addr{}
}
