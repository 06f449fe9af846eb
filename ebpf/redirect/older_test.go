package redirect_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// couple is a connection whose ends the test has, both made by apps.
func (s *stage) couple(t *testing.T, inbound bool, port uint16, pod, client netip.Addr) [2]net.Conn {
	t.Helper()
	server, serverNS, clientNS := client, s.client.NS, s.pod.NS
	if inbound {
		server, serverNS, clientNS = pod, s.pod.NS, s.client.NS
	}
	to := netip.AddrPortFrom(server, port)
	ln := listen(t, s.app, serverNS, to.String(), nil)
	defer ln.Close()
	c := s.dial(t, clientNS, to)
	a, err := ln.Accept()
	check(t, err)
	t.Cleanup(func() { a.Close() })
	return [2]net.Conn{c, a}
}

// dial connects as the app, from the thread that is in its cgroup.
func (s *stage) dial(t *testing.T, ns *netns.NS, to netip.AddrPort) (c net.Conn) {
	t.Helper()
	check(t, in(s.app, ns, func() error {
		fd, err := openTo(to, 0)
		if err != nil {
			return err
		}
		c, err = conn(fd)
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

func openTo(to netip.AddrPort, flags int) (int, error) {
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		_ = unix.Close(fd) // err says more
		return -1, err
	}
	return fd, nil
}

func addresses() (pods, clients []netip.Addr) {
	pods, clients = []netip.Addr{podV4}, []netip.Addr{clientV4}
	if netlab.IPv6() {
		pods, clients = append(pods, podV6), append(clients, clientV6)
	}
	return pods, clients
}

func TestOlderConnections(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		r := s.redirector
		older := map[string][2]net.Conn{}
		pods, clients := addresses()
		for i, pod := range pods {
			older["inbound "+pod.String()] = s.couple(t, true, 8080, pod, clients[i])
			older["outbound "+pod.String()] = s.couple(t, false, 8080, pod, clients[i])
			older["DNS over TCP "+pod.String()] = s.couple(t, false, 53, pod, clients[i])
			older["port left out "+pod.String()] = s.couple(t, false, 9090, pod, clients[i])
		}
		// The pod's router does not find this neighbour for a while.
		var pending int
		check(t, in(s.app, s.pod.NS, func() (err error) {
			pending, err = openTo(netip.MustParseAddrPort("10.9.0.77:8080"), unix.SOCK_NONBLOCK)
			return err
		}))
		defer unix.Close(pending)

		s.listenProxy(t)
		rules := everything
		rules.ExcludeOutbound = "9090"
		check(t, r.Apply(s.pod.NS, rules))
		captured := s.dial(t, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"))
		found, err := r.Uncaptured(s.pod.NS, rules)
		check(t, err)
		if len(found.Connections) != 3*len(pods) || len(found.HalfOpen) != 1 {
			t.Fatalf("older connections are %v, half-open %v; want %d and 1", names(found.Connections), names(found.HalfOpen), 3*len(pods))
		}
		for what, conns := range older {
			goesOn(t, what, conns)
		}

		// What is half open does not become a connection past the mesh.
		n, err := r.Reset(s.pod.NS, found.HalfOpen)
		check(t, err)
		if errno, _ := unix.GetsockoptInt(pending, unix.SOL_SOCKET, unix.SO_ERROR); n != 1 || unix.Errno(errno) != unix.ECONNABORTED {
			t.Errorf("reset %d, and the app was told %v, want 1 and ECONNABORTED", n, unix.Errno(errno))
		}
		for what, conns := range older {
			goesOn(t, what, conns)
		}

		n, err = r.Reset(s.pod.NS, found.Connections)
		if err != nil || n != 3*len(pods) {
			t.Fatalf("reset %d, %v, want %d", n, err, 3*len(pods))
		}
		for what, conns := range older {
			if what[:4] == "port" {
				goesOn(t, what, conns)
				continue
			}
			for i, c := range conns {
				check(t, c.SetReadDeadline(time.Now().Add(20*time.Second)))
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.ECONNABORTED) {
					t.Errorf("%s, end %d: %v, want a reset", what, i, err)
				}
			}
		}
		check(t, captured.SetReadDeadline(time.Now().Add(20*time.Second)))
		b := make([]byte, 5)
		if _, err := captured.Read(b); string(b) != "15001" {
			t.Errorf("the captured connection was answered %q, %v", b, err)
		}
	})
}

func names(sockets []sockdiag.Socket) (out []string) {
	for _, s := range sockets {
		out = append(out, s.State.String()+" "+s.Local.String()+" "+s.Remote.String())
	}
	slices.Sort(out)
	return out
}

// conn wraps a connected socket and owns it.
func conn(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	return net.FileConn(f)
}
