package redirect_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// versions are this program's state of the art, and another one's.
func (s *stage) versions() [2]redirect.HooksConfig {
	other := s.cfg
	other.Older()
	return [2]redirect.HooksConfig{s.cfg, other}
}

// sniffSYN counts SYNs without ACK that arrive at h from one of the addresses: all
// that the pod sends unless its proxy does.
func sniffSYN(t *testing.T, h *netlab.Host, from ...netip.Addr) *atomic.Int64 {
	t.Helper()
	n := &atomic.Int64{}
	fd := -1
	check(t, h.NS.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(uint16(unix.ETH_P_ALL<<8)))
		return errors.Join(err, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}))
	}))
	stop, donec := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(stop); <-donec; unix.Close(fd) })
	go func() {
		defer close(donec)
		b := make([]byte, 2048)
		for {
			select {
			case <-stop:
				return
			default:
			}
			k, _, err := unix.Recvfrom(fd, b, 0)
			if err != nil || k < 40 {
				continue
			}
			var src netip.Addr
			var tcp []byte
			switch b[0] >> 4 {
			case 4:
				src, tcp = netip.AddrFrom4([4]byte(b[12:16])), b[int(b[0]&15)*4:k]
			case 6:
				src, tcp = netip.AddrFrom16([16]byte(b[8:24])), b[40:k]
			}
			if slices.Contains(from, src) && len(tcp) >= 14 && tcp[13]&0x12 == 0x02 {
				n.Add(1)
			}
		}
	}()
	return n
}

// echoing opens a captured connection to a proxy that echoes.
func (s *stage) echoing(t *testing.T) (ping func(when string)) {
	t.Helper()
	ln := listen(t, s.proxy, s.pod.NS, "[::]:15001", proxyOptions)
	accepting(t, ln, func(c *net.TCPConn) {
		defer c.Close()
		b := make([]byte, 16)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			if _, err := c.Write(b[:n]); err != nil {
				return
			}
		}
	})
	fd := -1
	check(t, in(s.app, s.pod.NS, func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}),
			dial(fd, netip.AddrPortFrom(clientV4, 8080)))
	}))
	t.Cleanup(func() { unix.Close(fd) })
	return func(when string) {
		t.Helper()
		b := make([]byte, 16)
		_, err := unix.Write(fd, []byte("ping"))
		if err == nil {
			var n int
			n, err = read(fd, b)
			b = b[:max(n, 0)]
		}
		if err != nil || string(b) != "ping" {
			t.Errorf("%s: the captured connection answered %q, %v", when, b, err)
		}
	}
}

// noPlaintext connects from the pod and to it: captured, or refused.
func (s *stage) noPlaintext(t *testing.T, when string) {
	t.Helper()
	for _, a := range families() {
		c, err := connect(s.app, s.pod.NS, at(a.client, 8080), nil)
		if err == nil && !strings.HasPrefix(c.line, "15001 ") {
			t.Errorf("%s: the pod's connection to %v was answered %q", when, a.client, c.line)
		}
		c, err = connect(s.app, s.client.NS, at(a.pod, 8080), nil)
		if err == nil && !strings.HasPrefix(c.line, "15006 ") {
			t.Errorf("%s: %v's connection to the pod was answered %q", when, a.client, c.line)
		}
	}
}

// TestHooksOtherVersion moves the node to a version with another layout and back,
// while connections are opened by the pod and by others, and one lives.
func TestHooksOtherVersion(t *testing.T) {
	s := newStage(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	s.enrol(t)
	ping := s.echoing(t)
	stop := s.listenProxy(t)
	leaks := sniffSYN(t, s.client, podV4, podV6)
	ping("before")
	endc := make(chan struct{})
	donec := make(chan int)
	busy := func(f func()) {
		go func() {
			n := 0
			for {
				select {
				case <-endc:
					donec <- n
					return
				default:
				}
				f()
				n++
			}
		}()
	}
	busy(func() { s.noPlaintext(t, "under way") })
	busy(func() {
		// The router is no pod of the mesh, but below the pods' root.
		c, err := connect(s.app, s.node.NS, netip.AddrPortFrom(clientV4, 8080), nil)
		if err != nil || !strings.HasPrefix(c.line, "plain ") {
			t.Errorf("another pod's connection was answered %q, %v", c.line, err)
		}
	})
	versions := s.versions()
	for round := range 2 {
		check(t, s.hooks.Close())
		s.cfg = versions[(round+1)%2]
		s.open(t)
		when := fmt.Sprintf("version %d, round %d", (round+1)%2, round)
		if !s.hooks.Rebuilt() {
			t.Fatalf("%s: another layout was taken for the known one", when)
		}
		ping(when)
		if _, err := connect(s.app, s.pod.NS, netip.AddrPortFrom(clientV4, 8080), nil); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s: on hold: %v, want EPERM", when, err)
		}
		s.enrol(t)
		check(t, s.hooks.Ready())
		// The proxy listens again.
		stop()
		stop = s.listenProxy(t)
		s.wantCaptured(t, when)
		ping(when)
	}
	close(endc)
	if a, b := <-donec, <-donec; a < 4 || b < 4 {
		t.Errorf("%d and %d connections in all: too few to tell", a, b)
	}
	if n := leaks.Load(); n != 0 {
		t.Errorf("%d SYNs left the pod in plaintext", n)
	}
}

// TestHooksCrashes kills the process after steps of a move to another version, and
// has the one or the other go on.
func TestHooksCrashes(t *testing.T) {
	s := newStage(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	s.enrol(t)
	ping := s.echoing(t)
	stop := s.listenProxy(t)
	leaks := sniffSYN(t, s.client, podV4, podV6)
	errCrash := errors.New("crash")
	versions := s.versions()
	now := 0
	for i, point := range []string{
		"maps", "root pod_getpeername4", "root pod_connect4", "root pod_connect6", "proxy proxy_sockops",
		"old maps", "published", "sk_lookup", "gates",
	} {
		to := versions[1-now]
		to.Crash(func(what string) error {
			if what == point {
				return errCrash
			}
			return nil
		})
		check(t, s.hooks.Close())
		h, err := redirect.OpenHooks(to)
		if err == nil {
			err = h.Apply(s.pod.NS, everything)
			check(t, h.Close())
		}
		if !errors.Is(err, errCrash) {
			t.Fatalf("after %s: %v, want a crash", point, err)
		}
		ping("after " + point)
		s.noPlaintext(t, "after "+point)
		now = i % 2
		s.cfg = versions[now]
		s.open(t)
		s.noPlaintext(t, "after "+point+", opened again")
		s.enrol(t)
		check(t, s.hooks.Ready())
		stop()
		stop = s.listenProxy(t)
		s.wantCaptured(t, "after "+point+", recovered")
	}
	if n := leaks.Load(); n != 0 {
		t.Errorf("%d SYNs left the pod in plaintext", n)
	}
}
