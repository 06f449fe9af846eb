package netns

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
	"golang.org/x/sys/unix"
)

// dialed is a connection of a stock's, and the other end of it.
func dialed(t *testing.T) (*Conn, *net.TCPConn) {
	t.Helper()
	s := ownStock(t)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := s.Dial(t.Context(), netip.AddrPort{}, ln.Addr().(*net.TCPAddr).AddrPort(), time.Second, nil)
	if err != nil {
		t.Fatal(err)
	}
	up, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.Close(), up.Close() })
	return c.(*Conn), up.(*net.TCPConn)
}

func TestConnIsNetConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		c, up := dialed(t)
		return c, up, func() { _, _ = c.Close(), up.Close() }, nil
	})
}

func TestConnHalfCloses(t *testing.T) {
	c, up := dialed(t)
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(up); string(got) != "question" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write after CloseWrite: %v", err)
	}
	_, _ = up.Write([]byte("answer"))
	_ = up.Close()
	if got, err := io.ReadAll(c); string(got) != "answer" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
}

// A close is a reset while lingering is off, as of any socket.
func TestConnResets(t *testing.T) {
	for sec, want := range map[int]error{0: syscall.ECONNRESET, -1: io.EOF} {
		c, up := dialed(t)
		if err := errors.Join(c.SetLinger(0), c.SetLinger(sec), c.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := up.Read(make([]byte, 1)); !errors.Is(err, want) {
			t.Errorf("linger %d: read %v, want %v", sec, err, want)
		}
	}
}

// Errors are those of the net package: who waits for either kind asks for them.
func TestConnErrors(t *testing.T) {
	c, up := dialed(t)
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	never := func(uintptr) bool { return false }
	_ = c.SetReadDeadline(time.Unix(1, 0))
	if err := raw.Read(never); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("raw read after its deadline: %v", err)
	}
	_ = c.SetReadDeadline(time.Time{})
	donec := make(chan error)
	go func() { donec <- raw.Read(never) }()
	_ = c.Close()
	if err := <-donec; !errors.Is(err, net.ErrClosed) {
		t.Errorf("raw read of what is closed meanwhile: %v", err)
	}
	_, rerr := c.Read(make([]byte, 1))
	_, serr := c.SyscallConn()
	for name, err := range map[string]error{
		"read": rerr, "syscall conn": serr, "close": c.Close(), "half-close": c.CloseWrite(), "linger": c.SetLinger(0),
		"deadline": c.SetDeadline(time.Time{}), "control": raw.Control(func(uintptr) {}),
	} {
		if oe, ok := errors.AsType[*net.OpError](err); !ok || oe.Net != "tcp" || !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after close: %v", name, err)
		}
	}
	_ = up.Close()
}

// What calls itself answers itself, which is nobody.
func TestConnToItself(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, sa); err != nil && err != unix.EINPROGRESS {
		t.Fatal(err)
	}
	if c, err := connected(fd, netip.AddrPort{}, getsockname(fd), lingerUnknown); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v, %v, want refused", c, err)
	}
}
