// Package memnet is a network in memory: net.Conn and net.Listener with half-close, resets and deadlines, for tests.
//
// Everything blocks on sync.Cond and time only, so it works inside testing/synctest bubbles, where real sockets never
// become idle. Each direction of a connection holds a bounded number of bytes, so writers meet backpressure. Reads
// return what was written before an end or a reset, as sockets do.
package memnet

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
)

// DefaultBuffer is what one direction of a connection holds.
const DefaultBuffer = 64 << 10

// Conn is one end of a connection.
type Conn struct {
	in, out       *half
	local, remote net.Addr
}

// Pipe returns the two ends of a connection with made-up addresses.
func Pipe() (a, b *Conn) {
	return PipeAddr(netip.MustParseAddrPort("192.0.2.1:40000"), netip.MustParseAddrPort("192.0.2.2:15008"))
}

// PipeAddr returns the two ends of a connection from a to b.
func PipeAddr(a, b netip.AddrPort) (client, server *Conn) {
	up, down := newHalf(DefaultBuffer), newHalf(DefaultBuffer)
	la, ra := net.TCPAddrFromAddrPort(a), net.TCPAddrFromAddrPort(b)
	return &Conn{in: down, out: up, local: la, remote: ra}, &Conn{in: up, out: down, local: ra, remote: la}
}

// SetBuffer sets how many bytes may wait in the direction that c writes.
func (c *Conn) SetBuffer(n int) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.out.limit = n
}

func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.in.read(p)
	return n, c.wrap("read", err)
}

func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.out.write(p)
	return n, c.wrap("write", err)
}

// CloseWrite ends the direction that c writes: the other end reads io.EOF after what was written.
func (c *Conn) CloseWrite() error {
	c.out.end(io.EOF, syscall.EPIPE)
	return nil
}

// Close ends both directions: what was written can still be read by the other end, whose writes fail.
func (c *Conn) Close() error {
	c.out.end(io.EOF, net.ErrClosed)
	c.in.abandon(net.ErrClosed, syscall.EPIPE)
	return nil
}

// Reset ends both directions as a TCP RST does.
func (c *Conn) Reset() error {
	c.out.end(syscall.ECONNRESET, net.ErrClosed)
	c.in.abandon(net.ErrClosed, syscall.ECONNRESET)
	return nil
}

func (c *Conn) LocalAddr() net.Addr  { return c.local }
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *Conn) SetReadDeadline(t time.Time) error {
	c.in.setDeadline(&c.in.readBy, t)
	return nil
}

func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.out.setDeadline(&c.out.writeBy, t)
	return nil
}

func (c *Conn) wrap(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "mem", Source: c.local, Addr: c.remote, Err: err}
}

// half is one direction: a bounded queue of bytes.
type half struct {
	mu       sync.Mutex
	cond     sync.Cond
	buf      []byte // guarded by mu, as are all below
	limit    int
	readErr  error // for the reader, once buf is empty
	writeErr error // for the writer, at once
	gone     bool  // the reader has closed: what is written is lost
	readBy   deadline
	writeBy  deadline
}

type deadline struct {
	timer   *time.Timer
	gen     int
	expired bool
}

func newHalf(limit int) *half {
	h := &half{limit: limit}
	h.cond.L = &h.mu
	return h
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.gone:
			return 0, h.readErr
		case h.readBy.expired:
			return 0, os.ErrDeadlineExceeded
		case len(h.buf) > 0 || len(p) == 0:
			n := copy(p, h.buf)
			h.buf = h.buf[n:]
			h.cond.Broadcast()
			return n, nil
		case h.readErr != nil:
			return 0, h.readErr
		}
		h.cond.Wait()
	}
}

func (h *half) write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	done := 0
	for {
		switch {
		case h.writeErr != nil:
			return done, h.writeErr
		case h.writeBy.expired:
			return done, os.ErrDeadlineExceeded
		case done == len(p):
			return done, nil
		}
		if room := h.limit - len(h.buf); room > 0 {
			k := min(room, len(p)-done)
			h.buf = append(h.buf, p[done:done+k]...)
			done += k
			h.cond.Broadcast()
			continue
		}
		h.cond.Wait()
	}
}

// end is the writer's end of the direction. A reset overrules an orderly end that was not read yet.
func (h *half) end(readErr, writeErr error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.readErr == nil || h.readErr == io.EOF && !h.gone && readErr != io.EOF {
		h.readErr = readErr
	}
	if h.writeErr == nil || writeErr == net.ErrClosed {
		h.writeErr = writeErr
	}
	h.cond.Broadcast()
}

// abandon is the reader's end of the direction.
func (h *half) abandon(readErr, writeErr error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gone {
		return
	}
	h.gone, h.buf = true, nil
	h.readErr = readErr
	if h.writeErr == nil {
		h.writeErr = writeErr
	}
	h.cond.Broadcast()
}

func (h *half) setDeadline(d *deadline, t time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.gen++
	d.expired = false
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		d.expired = true
		h.cond.Broadcast()
		return
	}
	gen := d.gen
	d.timer = time.AfterFunc(wait, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if d.gen == gen {
			d.expired = true
			h.cond.Broadcast()
		}
	})
}
