package netns

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Conn is a connected TCP socket that a Stock or a Listener has made: what a *net.TCPConn is, for a dozen system calls
// less. To make one of those of a socket that is there (net.FileConn) takes a duplicate, its flags, names and type, and
// five options that may have been set before.
//
// Any goroutine may use it.
type Conn struct {
	f      *os.File // registered with the runtime's poller
	raw    syscall.RawConn
	remote netip.AddrPort // IPv4 also where the socket is of IPv6
	closed atomic.Bool

	mu     sync.Mutex
	local  netip.AddrPort // guarded by mu; not valid: nobody has asked for it yet
	linger linger         // guarded by mu
}

// linger is what a close means to a socket's peer, as far as it is known: -1 for FIN behind what was written, 0 for RST.
type linger int32

const lingerUnknown linger = -2

// lingerOf asks a socket.
func lingerOf(fd int) linger {
	l, err := unix.GetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER)
	switch {
	case err != nil:
		return lingerUnknown
	case l.Onoff == 0:
		return -1
	}
	return linger(l.Linger)
}

// newConn takes a connected socket that does not block, and is its owner then.
func newConn(fd int, local, remote netip.AddrPort, l linger) (*Conn, error) {
	f := os.NewFile(uintptr(fd), "tcp")
	raw, err := f.SyscallConn()
	if err != nil {
		_ = f.Close() // err says more
		return nil, err
	}
	return &Conn{f: f, raw: raw, local: local, remote: remote, linger: l}, nil
}

func (c *Conn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.LocalAddrPort()) }
func (c *Conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// RemoteAddrPort is RemoteAddr, as it is kept.
func (c *Conn) RemoteAddrPort() netip.AddrPort { return c.remote }

// LocalAddrPort asks the kernel when it is called first. Of a connection that was closed before, nothing is known.
func (c *Conn) LocalAddrPort() netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.local.IsValid() {
		_ = c.control(func(fd int) error { // it stays unknown
			c.local = getsockname(fd)
			return nil
		})
	}
	return c.local
}

func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.f.Read(p)
	return n, c.failed("read", err)
}

func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.f.Write(p)
	return n, c.failed("write", err)
}

// failed says of an error what the net package would.
func (c *Conn) failed(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		err = pe.Err
	}
	if c.closed.Load() {
		err = net.ErrClosed
	}
	if errno, ok := err.(syscall.Errno); ok {
		err = os.NewSyscallError(op, errno)
	}
	oe := &net.OpError{Op: op, Net: "tcp", Addr: c.RemoteAddr(), Err: err}
	if local := c.LocalAddrPort(); local.IsValid() {
		oe.Source = net.TCPAddrFromAddrPort(local)
	}
	return oe
}

// Close closes the socket, and ends whoever waits for it.
func (c *Conn) Close() error {
	c.closed.Store(true)
	return c.failed("close", c.f.Close())
}

// CloseWrite ends what is sent: shutdown(2).
func (c *Conn) CloseWrite() error {
	return c.failed("close", c.control(func(fd int) error {
		_, _, errno := unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
		return errorOf(errno)
	}))
}

// SetLinger is what that of net.TCPConn is. What is set already costs nothing.
func (c *Conn) SetLinger(sec int) error { return c.failed("set", c.setLinger(max(linger(sec), -1))) }

func (c *Conn) setLinger(to linger) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if to == c.linger && !c.closed.Load() {
		return nil
	}
	l := unix.Linger{}
	if to >= 0 {
		l.Onoff, l.Linger = 1, int32(to)
	}
	c.linger = lingerUnknown
	err := c.control(func(fd int) error {
		_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&l)), unsafe.Sizeof(l), 0)
		return errorOf(errno)
	})
	if err == nil {
		c.linger = to
	}
	return err
}

func (c *Conn) SetDeadline(t time.Time) error      { return c.failed("set", c.f.SetDeadline(t)) }
func (c *Conn) SetReadDeadline(t time.Time) error  { return c.failed("set", c.f.SetReadDeadline(t)) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.failed("set", c.f.SetWriteDeadline(t)) }

// SyscallConn gives the socket to functions that use it without waiting.
func (c *Conn) SyscallConn() (syscall.RawConn, error) {
	if c.closed.Load() {
		return nil, c.failed("raw-control", net.ErrClosed)
	}
	return rawConn{c}, nil
}

func (c *Conn) control(f func(fd int) error) (err error) {
	if cerr := c.raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// rawConn is the os package's, with the net package's errors.
type rawConn struct{ c *Conn }

func (r rawConn) Control(f func(fd uintptr)) error {
	return r.c.failed("raw-control", r.c.raw.Control(f))
}
func (r rawConn) Read(f func(fd uintptr) bool) error {
	return r.c.failed("raw-read", r.c.raw.Read(f))
}
func (r rawConn) Write(f func(fd uintptr) bool) error {
	return r.c.failed("raw-write", r.c.raw.Write(f))
}
