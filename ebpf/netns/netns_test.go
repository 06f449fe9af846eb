package netns

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fresh makes a namespace with its loopback up. test/netlab, which other tests
// use, is built on this package.
func fresh(t testing.TB) *NS {
	t.Helper()
	type result struct {
		ns  *NS
		err error
	}
	donec := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			donec <- result{err: err}
			return
		}
		ns, err := Open("/proc/self/task/" + strconv.Itoa(unix.Gettid()) + "/ns/net")
		donec <- result{ns, err}
	}()
	r := <-donec
	if r.err != nil {
		if strings.Contains(os.Getenv("AMBIT_TEST_REQUIRE"), "netns") {
			t.Fatalf("AMBIT_TEST_REQUIRE has netns: %v", r.err)
		}
		t.Skipf("needs network namespaces (run `make test`, or as root): %v", r.err)
	}
	t.Cleanup(func() { r.ns.Close() })
	if err := r.ns.Do(func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		ifr, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_UP)
		return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
	}); err != nil {
		t.Fatal(err)
	}
	return r.ns
}

func threadInode(t *testing.T) uint64 {
	t.Helper()
	ns, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	return ns.Inode()
}

func count(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestDoRunsInsideAndReturns(t *testing.T) {
	ns := fresh(t)
	home := threadInode(t)
	if ns.Inode() == home {
		t.Fatal("the fresh namespace is our own")
	}
	inside := uint64(0)
	if err := ns.Do(func() error {
		n, err := Current()
		if err != nil {
			return err
		}
		inside = n.Inode()
		return n.Close()
	}); err != nil {
		t.Fatal(err)
	}
	if inside != ns.Inode() {
		t.Errorf("Do ran in namespace %d, want %d", inside, ns.Inode())
	}
	if got := threadInode(t); got != home {
		t.Errorf("after Do in namespace %d, want %d", got, home)
	}
	want := errors.New("from inside")
	if err := ns.Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("Do returned %v, want the function's error", err)
	}
	if err := ns.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do of a function that ends its goroutine returned no error")
	}
}

func TestStuckThreadDies(t *testing.T) {
	ns := fresh(t)
	tid := 0
	err := ns.do(func() error { tid = unix.Gettid(); return nil }, func(int) error { return unix.EPERM })
	if err == nil {
		t.Fatal("no error from a thread that cannot leave")
	}
	path := filepath.Join("/proc/self/task", strconv.Itoa(tid))
	for range 30000 {
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			return
		}
		runtime.Gosched()
		time.Sleep(time.Millisecond) // the kernel reaps the thread in its own time
	}
	t.Errorf("thread %d lives on in the other namespace", tid)
}

func TestOpenRefusesOtherFiles(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	before := count(t, "/proc/self/fd")
	for _, path := range []string{plain, "/proc/self/ns/mnt", "/dev/null"} {
		if _, err := Open(path); !errors.Is(err, ErrNotNetNS) {
			t.Errorf("Open(%s): %v, want ErrNotNetNS", path, err)
		}
	}
	if _, err := Open(plain + ".missing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open of nothing: %v", err)
	}
	if _, err := Inode(plain); !errors.Is(err, ErrNotNetNS) {
		t.Errorf("Inode of a plain file: %v, want ErrNotNetNS", err)
	}
	if after := count(t, "/proc/self/fd"); after > before { // what others left may be closed meanwhile
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestDupAndClose(t *testing.T) {
	ns := fresh(t)
	d, err := ns.Dup()
	if err != nil {
		t.Fatal(err)
	}
	if d.Inode() != ns.Inode() || d.FD() == ns.FD() {
		t.Errorf("dup has inode %d fd %d, original %d and %d", d.Inode(), d.FD(), ns.Inode(), ns.FD())
	}
	if flags, err := unix.FcntlInt(uintptr(d.FD()), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("dup's descriptor flags %#x, %v: want close-on-exec", flags, err)
	}
	if err := errors.Join(d.Close(), d.Close()); err != nil {
		t.Error(err)
	}
	if d.FD() != -1 {
		t.Errorf("closed namespace has descriptor %d", d.FD())
	}
	if err := d.Do(func() error { return nil }); err == nil {
		t.Error("Do on a closed namespace worked")
	}
	if _, err := d.Dup(); err == nil {
		t.Error("Dup of a closed namespace worked")
	}
}

// exchange sends one line through a connection and returns the dialer's two ends.
func exchange(t *testing.T, ns *NS, ln net.Listener, d *net.Dialer, addr string) (local, remote netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	c, err := ns.Dial(ctx, d, "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(a)
	if err != nil || string(b) != "hello" {
		t.Fatalf("read %q, %v", b, err)
	}
	return a.RemoteAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
}

func TestListenAndDial(t *testing.T) {
	ns := fresh(t)
	for _, tc := range []struct{ name, listen, dial string }{
		{"v4", "127.0.0.1:0", "127.0.0.1"},
		{"v6", "[::1]:0", "::1"},
		{"dual stack over v4", ":0", "127.0.0.1"},
		{"dual stack over v6", "[::]:0", "::1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ln, err := ns.Listen(t.Context(), &net.ListenConfig{}, "tcp", tc.listen)
			if err != nil {
				t.Skipf("the kernel has no such address: %v", err)
			}
			defer ln.Close()
			port := ln.Addr().(*net.TCPAddr).AddrPort().Port()
			addr := net.JoinHostPort(tc.dial, strconv.Itoa(int(port)))
			exchange(t, ns, ln, &net.Dialer{}, addr)
			// The process's own namespace must not have that listener.
			if c, err := net.DialTimeout("tcp", addr, time.Second); err == nil {
				c.Close()
				t.Errorf("%s is reachable from outside the namespace", addr)
			}
		})
	}
}

func TestControlSeesTheSocketInside(t *testing.T) {
	ns := fresh(t)
	marks := map[string]int{}
	control := func(side string) func(string, string, syscall.RawConn) error {
		return func(network, addr string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) {
				if side == "listen" {
					if v, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR); v != 1 {
						t.Error("listener without SO_REUSEADDR")
					}
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
				}
				err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0x539))
				err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1))
				err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
				marks[side], _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK)
			})
			return errors.Join(err, cerr)
		}
	}
	ln, err := ns.Listen(t.Context(), &net.ListenConfig{Control: control("listen")}, "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	second, err := ns.Listen(t.Context(), &net.ListenConfig{Control: control("listen")}, "tcp4", ln.Addr().String())
	if err != nil {
		t.Fatalf("second listener with SO_REUSEPORT: %v", err)
	}
	second.Close()
	local := netip.MustParseAddrPort("127.7.7.7:4321")
	client, _ := exchange(t, ns, ln, &net.Dialer{
		LocalAddr: net.TCPAddrFromAddrPort(local), Control: control("dial"),
	}, ln.Addr().String())
	if client != local {
		t.Errorf("the listener saw %v, want %v", client, local)
	}
	if marks["listen"] != 0x539 || marks["dial"] != 0x539 {
		t.Errorf("marks %v, want 0x539 on both", marks)
	}
}

func TestMultipathIsOff(t *testing.T) {
	ns := fresh(t)
	lc := &net.ListenConfig{}
	lc.SetMultipathTCP(true)
	ln, err := ns.Listen(t.Context(), lc, "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	raw, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if p, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || p != unix.IPPROTO_TCP {
			t.Errorf("listener has protocol %d, %v; want %d", p, err, unix.IPPROTO_TCP)
		}
	}); err != nil {
		t.Error(err)
	}
}

func TestNamesAreRefused(t *testing.T) {
	ns := fresh(t)
	if _, err := ns.Dial(t.Context(), &net.Dialer{}, "tcp", "localhost:80"); err == nil {
		t.Error("Dial took a name")
	}
	if _, err := ns.Listen(t.Context(), &net.ListenConfig{}, "tcp", "localhost:0"); err == nil {
		t.Error("Listen took a name")
	}
}

// blackhole is a listener whose queue is full, so that a connect hangs.
func blackhole(t *testing.T, ns *NS) string {
	t.Helper()
	addr := ""
	var fds []int
	t.Cleanup(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	if err := ns.Do(func() error {
		l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		fds = append(fds, l)
		err = errors.Join(unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(l, 0))
		if err != nil {
			return err
		}
		sa, err := unix.Getsockname(l)
		if err != nil {
			return err
		}
		for range 4 {
			c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			fds = append(fds, c)
			_ = unix.Connect(c, sa) // in progress, which is the point
		}
		addr = "127.0.0.1:" + strconv.Itoa(sa.(*unix.SockaddrInet4).Port)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return addr
}

func TestDialEndsWithItsContext(t *testing.T) {
	ns := fresh(t)
	addr := blackhole(t, ns)
	fds, threads := count(t, "/proc/self/fd"), count(t, "/proc/self/task")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	errc := make(chan error)
	const dials = 300
	for range dials {
		go func() {
			c, err := ns.Dial(ctx, &net.Dialer{}, "tcp", addr)
			if err == nil {
				c.Close()
			}
			errc <- err
		}()
	}
	for range dials {
		if err := <-errc; !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("Dial returned %v, want the context's end", err)
		}
	}
	if got := count(t, "/proc/self/fd"); got > fds {
		t.Errorf("%d descriptors before, %d after", fds, got)
	}
	// A dial that held a thread while it waits would have left as many; a few come of system calls that others wait for.
	if got := count(t, "/proc/self/task"); got > threads+dials/2 {
		t.Errorf("%d threads before, %d after", threads, got)
	}
	if _, err := ns.Dial(t.Context(), &net.Dialer{Timeout: time.Millisecond}, "tcp", addr); err == nil {
		t.Error("the dialer's own timeout had no effect")
	}
}

func TestFailedSocketsLeaveNothing(t *testing.T) {
	ns := fresh(t)
	refuse := func(string, string, syscall.RawConn) error { return errors.New("no") }
	if _, err := ns.Dial(t.Context(), &net.Dialer{}, "tcp", "127.0.0.1:1"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatalf("Dial to nobody: %v", err)
	}
	before := count(t, "/proc/self/fd")
	for range 20 {
		if _, err := ns.Dial(t.Context(), &net.Dialer{Control: refuse}, "tcp", "127.0.0.1:1"); err == nil {
			t.Fatal("Dial worked")
		}
		if _, err := ns.Listen(t.Context(), &net.ListenConfig{Control: refuse}, "tcp", ":0"); err == nil {
			t.Fatal("Listen worked")
		}
	}
	if got := count(t, "/proc/self/fd"); got > before { // what others left may be closed meanwhile
		t.Errorf("%d descriptors before, %d after", before, got)
	}
}

func TestDatagrams(t *testing.T) {
	ns := fresh(t)
	a, err := ns.ListenPacket(t.Context(), &net.ListenConfig{}, "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	c, err := ns.Dial(t.Context(), &net.Dialer{}, "udp", a.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, from, err := a.ReadFrom(make([]byte, 1)); err != nil || from.String() != c.LocalAddr().String() {
		t.Errorf("datagram from %v, %v; want %v", from, err, c.LocalAddr())
	}
}
