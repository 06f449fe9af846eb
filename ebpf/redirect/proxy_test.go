package redirect_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// The proxy's double. As teller it answers every connection with one line that
// says who accepted it, whom the client wanted, and who the client is; as carrier
// (see carry) it does a node proxy's work, without encryption.

func deadline() time.Time { return time.Now().Add(30 * time.Second) }

// proxyOptions are what the node proxy sets on its sockets in a pod.
func proxyOptions(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = asProxy(int(fd)) })
	return errors.Join(cerr, err)
}

func asProxy(fd int) error {
	return errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, redirect.MarkProxy),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
		transparent(fd))
}

// transparent lets a socket have addresses that are not the host's.
func transparent(fd int) error {
	return errors.Join(
		ignoreFamily(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)),
		ignoreFamily(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1)),
		ignoreFamily(unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)),
		ignoreFamily(unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)))
}

func ignoreFamily(err error) error {
	if errors.Is(err, unix.ENOPROTOOPT) {
		return nil
	}
	return err
}

// accepting calls serve for each connection of ln, which ends with the test.
func accepting(t testing.TB, ln net.Listener, serve func(c *net.TCPConn)) {
	t.Helper()
	var handled sync.WaitGroup
	donec := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-donec; handled.Wait() })
	go func() {
		defer close(donec)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			handled.Go(func() { serve(c.(*net.TCPConn)) })
		}
	}()
}

// answer makes ln a teller.
func answer(t testing.TB, ln net.Listener, name string) {
	t.Helper()
	accepting(t, ln, func(c *net.TCPConn) {
		defer c.Close()
		_, _ = io.WriteString(c, told(c, name)) // the client's test reads it
		// What a client sent by Fast Open is unread, and a close would reset it.
		_ = c.CloseWrite()
		_ = c.SetReadDeadline(deadline())
		_, _ = io.Copy(io.Discard, c)
	})
}

func told(c *net.TCPConn, name string) string {
	return fmt.Sprintf("%s %s %s", name, originalDst(c), remote(c).Addr())
}

func remote(c *net.TCPConn) netip.AddrPort {
	a := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

var proxyPorts = []uint16{redirect.PortOutbound, redirect.PortInbound, redirect.PortHBONE, redirect.PortDNS}

// listenProxy starts the proxy's listeners in the stage's pod.
func (s *stage) listenProxy(t testing.TB) (stop func()) {
	t.Helper()
	return s.listenProxyIn(t, s.pod.NS)
}

func (s *stage) listenProxyIn(t testing.TB, ns *netns.NS) (stop func()) {
	t.Helper()
	var lns []net.Listener
	for _, port := range proxyPorts {
		ln := listen(t, s.proxy, ns, fmt.Sprintf("[::]:%d", port), proxyOptions)
		lns = append(lns, ln)
		answer(t, ln, fmt.Sprint(port))
	}
	return func() {
		for _, ln := range lns {
			ln.Close()
		}
	}
}

// originalDst asks the kernel whom the client wanted; nobody knows it of a
// connection that was not captured, whose own address it is then.
func originalDst(c *net.TCPConn) netip.AddrPort {
	local := c.LocalAddr().(*net.TCPAddr).AddrPort()
	local = netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	raw, err := c.SyscallConn()
	if err != nil {
		return local
	}
	orig := local
	_ = raw.Control(func(fd uintptr) { orig = originalDstFD(int(fd), local) })
	return orig
}

func originalDstFD(fd int, local netip.AddrPort) netip.AddrPort {
	if local.Addr().Is4() {
		// struct sockaddr_in fits the type the kernel writes it into.
		if m, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, unix.SO_ORIGINAL_DST); err == nil {
			b := m.Multiaddr
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
		}
		return local
	}
	if m, err := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IPV6, 80 /* IP6T_SO_ORIGINAL_DST */); err == nil {
		port := m.Addr.Port<<8 | m.Addr.Port>>8
		return netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), port)
	}
	return local
}
