package netns

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

func ownStock(t *testing.T) *Stock {
	t.Helper()
	ns, err := Own()
	if err != nil {
		t.Fatal(err)
	}
	s := ns.NewStock(nil)
	t.Cleanup(func() { s.Close(); ns.Close() })
	return s
}

// Sockets are kept while they are used, twice as many at a time, and no longer.
func TestStockFollowsDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := ownStock(t)
		take := func() {
			t.Helper()
			fd, _, err := s.take(false)
			if err != nil {
				t.Fatal(err)
			}
			_ = unix.Close(fd)
		}
		kept := func() int {
			s.mu.Lock()
			defer s.mu.Unlock()
			return len(s.v4.fds)
		}
		most := 0
		for range 100 {
			take()
			most = max(most, kept()+1)
		}
		if most != stockMost {
			t.Errorf("%d at a time, want %d", most, stockMost)
		}
		time.Sleep(2 * stockKeeps)
		synctest.Wait()
		if n := kept(); n != 0 {
			t.Errorf("%d sockets are kept for nobody", n)
		}
		take()
		if n := kept(); n != 0 {
			t.Errorf("%d sockets more than a single one that was asked for", n)
		}
		for range 4 {
			take()
		}
		s.Close()
		if n := kept(); n != 0 {
			t.Errorf("%d sockets outlive the end", n)
		}
		if _, _, err := s.take(false); !errors.Is(err, os.ErrClosed) {
			t.Errorf("a socket after the end: %v", err)
		}
	})
}

// A socket that has no option is not given out, and none is left behind.
func TestStockWithoutOptions(t *testing.T) {
	ns, err := Own()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var made []int
	s := ns.NewStock(func(fd int, _ bool) error { made = append(made, fd); return unix.EPERM })
	defer s.Close()
	if _, err := s.Dial(t.Context(), netip.AddrPort{}, netip.MustParseAddrPort("127.0.0.1:1"), 30*time.Second, nil); !errors.Is(err, syscall.EPERM) {
		t.Errorf("Dial: %v", err)
	}
	for _, fd := range made {
		if _, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err == nil {
			t.Errorf("socket %d is left open", fd)
		}
	}
}

func TestStockDials(t *testing.T) {
	s := ownStock(t)
	for _, host := range []string{"127.0.0.1", "::1"} {
		addr := netip.MustParseAddr(host)
		ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		if err != nil {
			t.Log("no ", host, ": ", err)
			continue
		}
		dst := ln.Addr().(*net.TCPAddr).AddrPort()
		src := netip.AddrPort{}
		for range 40 { // through several fillings
			c, err := s.Dial(t.Context(), src, dst, 30*time.Second, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
			if err != nil {
				t.Fatal(err)
			}
			up, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if c.LocalAddr().String() != up.RemoteAddr().String() || c.RemoteAddr().String() != dst.String() {
				t.Errorf("%v to %v, accepted from %v", c.LocalAddr(), c.RemoteAddr(), up.RemoteAddr())
			}
			_, _ = up.Write([]byte("x"))
			up.Close()
			if b, err := io.ReadAll(c); string(b) != "x" || err != nil {
				t.Errorf("read %q, %v", b, err)
			}
			c.Close()
		}
		ln.Close()
		_, err = s.Dial(t.Context(), netip.AddrPortFrom(addr, 0), dst, 30*time.Second, nil)
		if oe, ok := errors.AsType[*net.OpError](err); !ok || !errors.Is(err, syscall.ECONNREFUSED) || oe.Op != "dial" {
			t.Errorf("nobody listens: %v", err)
		}
	}
}

// An IPv4 address that is written as an IPv6 one needs an IPv4 socket.
func TestStockDialsMappedAddresses(t *testing.T) {
	s := ownStock(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	port := ln.Addr().(*net.TCPAddr).AddrPort().Port()
	c, err := s.Dial(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"), netip.AddrPortFrom(netip.MustParseAddr("::ffff:127.0.0.1"), port), 30*time.Second, nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}

// Where descriptors are short, those that are left are used one by one.
func TestStockShortOfDescriptors(t *testing.T) {
	s := ownStock(t)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	free, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(free)
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	}()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free) + 3, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	var taken []int
	for {
		fd, _, err := s.take(false)
		if err != nil {
			if !errors.Is(err, syscall.EMFILE) {
				t.Errorf("take: %v", err)
			}
			break
		}
		taken = append(taken, fd)
	}
	if fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("after %d sockets there was room for more: %v", len(taken), err)
		_ = unix.Close(fd)
	}
	for _, fd := range taken {
		_ = unix.Close(fd)
	}
}

// A peer that does not answer is waited for, and no longer than was asked.
func TestStockDialWaits(t *testing.T) {
	s := ownStock(t)
	// A full backlog makes the kernel drop what comes.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(sa.(*unix.SockaddrInet4).Port))
	var last error
	for range 5 {
		c, err := s.Dial(t.Context(), netip.AddrPort{}, dst, 20*time.Millisecond, nil)
		if err == nil {
			defer c.Close()
		}
		last = err
	}
	if ne, ok := errors.AsType[net.Error](last); !ok || !ne.Timeout() {
		t.Errorf("a full backlog: %v", last)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Dial(ctx, netip.AddrPort{}, dst, time.Minute, nil); !errors.Is(err, context.Canceled) && !errors.Is(err, os.ErrDeadlineExceeded) {
		if oe, ok := errors.AsType[*net.OpError](err); !ok || oe.Err.Error() != "operation was canceled" {
			t.Errorf("cancelled: %v", err)
		}
	}
}

// The socket is the namespace's, wherever the caller's thread is.
func TestStockDialsInItsNamespace(t *testing.T) {
	ns := fresh(t)
	s := ns.NewStock(nil)
	defer s.Close()
	ln, err := ns.Listen(t.Context(), &net.ListenConfig{}, "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for range 5 {
		c, err := s.Dial(t.Context(), netip.AddrPort{}, ln.Addr().(*net.TCPAddr).AddrPort(), 30*time.Second, nil)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}
