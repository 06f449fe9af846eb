package netns

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// stockMost bounds the sockets of a family that a Stock keeps: more than
	// sixteen for a visit no longer show in what a dial costs.
	stockMost = 16
	// stockKeeps is how long unused sockets are kept, and within which a stock
	// that is empty again is made twice as large.
	stockKeeps = 500 * time.Millisecond
)

// Stock makes TCP sockets in a namespace ahead of need, several in one visit:
// entering and leaving costs more than all else that is done to a socket before it
// connects. A namespace where nobody dials has none. Any goroutine may use it.
type Stock struct {
	ns      *NS
	prepare func(fd int, v6 bool) error

	mu     sync.Mutex
	v4, v6 shelf
	linger linger // of prepared sockets, once there are any
	closed bool
}

// shelf is the sockets of one family. The stock's lock guards it.
type shelf struct {
	fds   []int
	made  time.Time // the last ones
	batch int       // of the last ones
	timer *time.Timer
}

// NewStock returns an empty stock. prepare sets options on each socket; nil: none.
// The namespace must stay open until Close.
func (n *NS) NewStock(prepare func(fd int, v6 bool) error) *Stock {
	if prepare == nil {
		prepare = func(int, bool) error { return nil }
	}
	return &Stock{ns: n, prepare: prepare}
}

// Close gives up what is left. Dial fails from then on.
func (s *Stock) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.clearLocked(&s.v4)
	s.clearLocked(&s.v6)
}

func (s *Stock) clearLocked(h *shelf) {
	for _, fd := range h.fds {
		_ = unix.Close(fd) // never connected
	}
	h.fds, h.batch = h.fds[:0], 0
	if h.timer != nil {
		h.timer.Stop()
	}
}

// take returns a socket, which is its caller's, and how it lingers.
func (s *Stock) take(v6 bool) (int, linger, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return -1, 0, errClosed
	}
	h := &s.v4
	if v6 {
		h = &s.v6
	}
	if len(h.fds) == 0 {
		if err := s.fillLocked(h, v6); err != nil {
			return -1, 0, err
		}
	}
	last := len(h.fds) - 1
	fd := h.fds[last]
	h.fds = h.fds[:last]
	return fd, s.linger, nil
}

func (s *Stock) fillLocked(h *shelf, v6 bool) error {
	now := time.Now()
	want := 1
	if now.Sub(h.made) < stockKeeps {
		want = min(2*h.batch, stockMost)
	}
	h.made, h.batch = now, max(want, 1)
	domain := unix.AF_INET
	if v6 {
		domain = unix.AF_INET6
	}
	err := s.ns.Do(func() error {
		for len(h.fds) < h.batch {
			fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil && len(h.fds) > 0 {
				return nil // short of descriptors or memory: these few will do
			}
			if err != nil {
				return os.NewSyscallError("socket", err)
			}
			h.fds = append(h.fds, fd)
		}
		return nil
	})
	for _, fd := range h.fds {
		if err == nil {
			err = s.prepare(fd, v6)
		}
	}
	if err != nil {
		s.clearLocked(h)
		return err
	}
	s.linger = lingerOf(h.fds[0])
	if h.batch > 1 {
		s.expireLocked(h)
	}
	return nil
}

// expireLocked closes what will not have been used in a while.
func (s *Stock) expireLocked(h *shelf) {
	if h.timer != nil {
		h.timer.Reset(stockKeeps)
		return
	}
	h.timer = time.AfterFunc(stockKeeps, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if wait := stockKeeps - time.Since(h.made); wait > 0 && !s.closed {
			h.timer.Reset(wait)
			return
		}
		s.clearLocked(h)
	})
}

// Dial connects a socket from src, or from what the kernel chooses if it is not
// valid, to dst, within limit. Where the other end is in the same
// namespace the kernel has connected before the call returns, and nobody waits: the
// connection is a *Conn then, and a *net.TCPConn otherwise.
// Options that only this connection has are set by control; nil: none. All others,
// keepalive among them, are what prepare has set.
func (s *Stock) Dial(ctx context.Context, src, dst netip.AddrPort, limit time.Duration, control func(fd int) error) (net.Conn, error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	fd, linger, err := s.take(dst.Addr().Is6())
	if err != nil {
		return nil, dialError(src, dst, err)
	}
	done, err := begin(fd, src, dst, control)
	if err != nil {
		_ = unix.Close(fd) // err says more
		return nil, dialError(src, dst, err)
	}
	if done {
		return connected(fd, src, dst, linger)
	}
	// What the net package makes is a socket of the process's namespace, in whose
	// place ours is put; the package then finds that ours is about to be connected.
	d := net.Dialer{Timeout: limit, KeepAlive: -1, Control: func(_, _ string, rc syscall.RawConn) error {
		var derr error
		err := rc.Control(func(own uintptr) { derr = unix.Dup3(fd, int(own), unix.O_CLOEXEC) })
		_ = unix.Close(fd) // the duplicate lives on
		fd = -1
		if err == nil {
			err = os.NewSyscallError("dup3", derr)
		}
		return err
	}}
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, "tcp", dst.String())
	if fd >= 0 {
		_ = unix.Close(fd) // not even a socket could be had
	}
	return c, err
}

// connected makes a connection of a socket that is one.
func connected(fd int, local, dst netip.AddrPort, l linger) (net.Conn, error) {
	if !local.IsValid() || local.Port() == 0 {
		local = getsockname(fd)
	}
	if local == dst {
		// Nobody listens, and the kernel chose the very port that was called, which
		// makes a socket answer itself (RFC 9293 section 3.5, simultaneous open).
		_ = unix.Close(fd)
		return nil, dialError(local, dst, os.NewSyscallError("connect", unix.ECONNREFUSED))
	}
	c, err := newConn(fd, local, dst, l)
	if err != nil {
		return nil, dialError(local, dst, err)
	}
	return c, nil
}

// begin binds and connects; done says that the connection is made.
func begin(fd int, src, dst netip.AddrPort, control func(fd int) error) (done bool, err error) {
	if control != nil {
		if err := control(fd); err != nil {
			return false, err
		}
	}
	if src.IsValid() {
		var from address
		from.set(src)
		if err := bind(fd, &from); err != nil {
			return false, os.NewSyscallError("bind", err)
		}
	}
	var to address
	to.set(dst)
	switch err := connect(fd, &to); err {
	case nil:
		return true, nil
	case unix.EINPROGRESS, unix.EINTR:
	default:
		return false, os.NewSyscallError("connect", err)
	}
	// The answer of a peer on this host came while the kernel held the socket for
	// us, and was handled when it let go of it.
	switch err := connect(fd, &to); err {
	case nil, unix.EISCONN:
		return true, nil
	case unix.EALREADY, unix.EINPROGRESS, unix.EINTR:
		return false, nil
	default:
		return false, os.NewSyscallError("connect", err)
	}
}

// dialError is what net.Dialer would say.
func dialError(src, dst netip.AddrPort, err error) error {
	e := &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: err}
	if src.IsValid() {
		e.Source = net.TCPAddrFromAddrPort(src)
	}
	return e
}
