package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listener accepts connections as Conns: one system call for each, where the net package makes four, and asks nothing
// about it that nobody wants to know. What they have in common the listener's socket has, and they inherit it: options of
// TCP, keepalive, lingering (tcp(7), socket(7)).
type Listener struct {
	f      *os.File
	raw    syscall.RawConn
	addr   net.Addr
	linger linger
	closed atomic.Bool
}

// acceptTurn is how many connections are accepted before other goroutines have their turn.
const acceptTurn = 32

// NewListener takes the socket of ln, which is closed, whatever happens.
func NewListener(ln net.Listener) (*Listener, error) {
	defer ln.Close() // the socket lives on, or err says more
	tl, ok := ln.(*net.TCPListener)
	if !ok {
		return nil, fmt.Errorf("take over listener %s: not of TCP", ln.Addr())
	}
	f, err := tl.File() // a listener of the net package does not let others wait for it
	if err != nil {
		return nil, fmt.Errorf("take over listener %s: %w", ln.Addr(), err)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		_ = f.Close() // err says more
		return nil, fmt.Errorf("take over listener %s: %w", ln.Addr(), err)
	}
	l := &Listener{f: f, raw: raw, addr: ln.Addr()}
	if err := raw.Control(func(fd uintptr) { l.linger = lingerOf(int(fd)) }); err != nil {
		_ = f.Close() // err says more
		return nil, fmt.Errorf("take over listener %s: %w", ln.Addr(), err)
	}
	return l, nil
}

// Addr is what it listens on.
func (l *Listener) Addr() net.Addr { return l.addr }

// Close ends accepting.
func (l *Listener) Close() error {
	l.closed.Store(true)
	return l.failed("close", l.f.Close())
}

// Each calls f with each connection, as they come, until accepting fails, and returns why: an error that is net.ErrClosed
// after Close, which waits for f. Who goes on after another error waits a while: the next try may fail as
// well.
func (l *Listener) Each(f func(c *Conn)) error {
	var failed error
	turn := 0
	err := l.raw.Read(func(fd uintptr) bool {
		for {
			c, err := l.accept(int(fd))
			switch {
			case err == nil:
				f(c)
			case err == unix.EAGAIN:
				turn = 0
				return false
			case err == unix.EINTR || err == unix.ECONNABORTED: // the client has gone already
			default:
				failed = err
				return true
			}
			if l.closed.Load() { // Close waits for us, and a flood does not end
				failed = net.ErrClosed
				return true
			}
			if turn++; turn == acceptTurn {
				turn = 0
				runtime.Gosched()
			}
		}
	})
	if err == nil {
		err = failed
	}
	return l.failed("accept", err)
}

func (l *Listener) accept(fd int) (*Conn, error) {
	s, remote, err := accept(fd)
	if err != nil {
		return nil, err
	}
	return newConn(s, netip.AddrPort{}, remote, l.linger)
}

// failed says of an error what the net package would.
func (l *Listener) failed(op string, err error) error {
	if err == nil {
		return nil
	}
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		err = pe.Err
	}
	if l.closed.Load() {
		err = net.ErrClosed
	}
	if errno, ok := err.(syscall.Errno); ok {
		err = os.NewSyscallError("accept4", errno)
	}
	return &net.OpError{Op: op, Net: "tcp", Addr: l.addr, Err: err}
}
