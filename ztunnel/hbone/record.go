package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// recordConn is the seam below the frames: it protects batches of plaintext and gives plaintext back. Today crypto/tls
// does the work; a record layer of our own, or the kernel's, fits in here.
type recordConn interface {
	// Fill waits until Read has something to work on. It holds no buffer while it waits, where the transport allows.
	Fill() error
	// Buffered reports whether Read may go on without waiting for the transport.
	Buffered() bool
	// Read returns the plaintext of at most one record; p has room for a whole one.
	Read(p []byte) (int, error)
	// WriteBatch protects and sends all parts with as few syscalls as possible.
	WriteBatch(parts []segment) error
	// Close ends the transport in order; Cut ends it at once.
	Close() error
	Cut() error
}

// segment is a part of a block on its way out.
type segment struct {
	blk *block
	n   int
}

// tlsRecords is recordConn by crypto/tls.
type tlsRecords struct {
	*tls.Conn
	g *gatherConn
}

// clientRecords completes the handshake as a client. The caller sets deadlines on c and closes it on error.
func clientRecords(ctx context.Context, c net.Conn, cfg *tls.Config) (*tlsRecords, error) {
	g := newGatherConn(c)
	return handshake(ctx, tls.Client(g, fullRecords(cfg)), g)
}

func serverRecords(ctx context.Context, c net.Conn, cfg *tls.Config) (*tlsRecords, error) {
	g := newGatherConn(c)
	return handshake(ctx, tls.Server(g, fullRecords(cfg)), g)
}

// fullRecords returns cfg with full-size records from the first byte on: crypto/tls otherwise starts with small ones,
// which suits browsers, and our frames are cut to fill records.
func fullRecords(cfg *tls.Config) *tls.Config {
	if cfg.DynamicRecordSizingDisabled {
		return cfg
	}
	cfg = cfg.Clone()
	cfg.DynamicRecordSizingDisabled = true
	return cfg
}

var errNoH2 = errors.New("peer did not negotiate ALPN h2")

func handshake(ctx context.Context, t *tls.Conn, g *gatherConn) (*tlsRecords, error) {
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	if t.ConnectionState().NegotiatedProtocol != "h2" {
		return nil, errNoH2
	}
	return &tlsRecords{Conn: t, g: g}, nil
}

func (r *tlsRecords) Fill() error    { return r.g.fill() }
func (r *tlsRecords) Buffered() bool { return r.g.buffered() }
func (r *tlsRecords) Cut() error     { return r.g.Conn.Close() }

func (r *tlsRecords) WriteBatch(parts []segment) error {
	r.g.cork()
	for _, p := range parts {
		if _, err := r.Conn.Write(p.blk.data[:p.n]); err != nil {
			_ = r.g.uncork() // the first error is the one that tells
			return err
		}
	}
	return r.g.uncork()
}

// recordHeaderLen is the length of a TLS record header (https://www.rfc-editor.org/rfc/rfc8446#section-5.1).
const recordHeaderLen = 5

// gatherConn lies between crypto/tls and the transport. Outbound it gathers the records of one batch, which crypto/tls
// writes one by one, into one write. Inbound it reads much at a time and hands out one record at a time, so that
// whether anything is left unread is known here: crypto/tls itself keeps nothing back.
type gatherConn struct {
	net.Conn
	raw syscall.RawConn // nil: the transport cannot be waited for without a buffer

	// Inbound, owned by the reader.
	in      *block // borrowed while it holds unread bytes
	r, w    int    // unread: in.data[r:w]
	recLeft int    // of the record being handed out
	readErr error  // result of readOnce
	once    func(fd uintptr) bool

	// Outbound. crypto/tls may write from its reader, too (KeyUpdate, alerts), so this side has a lock.
	mu     sync.Mutex
	corked bool
	out    *gatherBuf
	outLen int
}

// gatherBuf has room for the records of one large block, of which each has a header, an inner type and a tag.
type gatherBuf [largeBlock + 16*64]byte

var gatherBufs = sync.Pool{New: func() any { return new(gatherBuf) }}

func newGatherConn(c net.Conn) *gatherConn {
	g := &gatherConn{Conn: c}
	if sc, ok := c.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			g.raw = raw
		}
	}
	g.once = g.readOnce
	return g
}

func (g *gatherConn) buffered() bool { return g.w > g.r }

// fill returns when unread bytes are there, or an error.
func (g *gatherConn) fill() error {
	if g.buffered() {
		return nil
	}
	return g.more()
}

// more reads once behind what is unread.
func (g *gatherConn) more() error {
	if g.buffered() && g.r > 0 {
		g.w = copy(g.in.data, g.in.data[g.r:g.w])
		g.r = 0
	}
	if !g.buffered() {
		g.r, g.w = 0, 0
	}
	if g.raw != nil {
		if err := g.raw.Read(g.once); err != nil {
			return err
		}
		return g.readErr
	}
	g.borrow()
	n, err := g.Conn.Read(g.in.data[g.w:])
	g.w += n
	if n > 0 {
		return nil
	}
	g.giveBack()
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// readOnce tries one read. Returning false makes the caller wait for readability, and by then the buffer is back in
// its pool.
func (g *gatherConn) readOnce(fd uintptr) bool {
	g.borrow()
	for {
		n, err := unix.Read(int(fd), g.in.data[g.w:])
		if err == unix.EINTR {
			continue
		}
		g.readErr = nil
		switch {
		case n > 0:
			g.w += n
			return true
		case err == unix.EAGAIN:
			g.giveBack()
			return false
		case err != nil:
			g.readErr = &net.OpError{Op: "read", Net: "tcp", Source: g.LocalAddr(), Addr: g.RemoteAddr(), Err: err}
		default:
			g.readErr = io.EOF
		}
		g.giveBack()
		return true
	}
}

func (g *gatherConn) borrow() {
	if g.in == nil {
		g.in = getBlock(largeBlock)
	}
}

func (g *gatherConn) giveBack() {
	if g.in != nil && !g.buffered() {
		g.in.release()
		g.in = nil
	}
}

// Read gives crypto/tls bytes of one record only.
func (g *gatherConn) Read(p []byte) (int, error) {
	if err := g.fill(); err != nil {
		return 0, err
	}
	if g.recLeft == 0 {
		for g.w-g.r < recordHeaderLen {
			if err := g.more(); err != nil {
				if err == io.EOF {
					err = io.ErrUnexpectedEOF
				}
				return 0, err
			}
		}
		h := g.in.data[g.r:]
		g.recLeft = recordHeaderLen + int(h[3])<<8 + int(h[4])
	}
	n := copy(p, g.in.data[g.r:min(g.w, g.r+g.recLeft)])
	g.r += n
	g.recLeft -= n
	g.giveBack()
	return n, nil
}

// Write gathers while corked.
func (g *gatherConn) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.corked {
		return g.Conn.Write(p)
	}
	if g.out == nil {
		g.out = gatherBufs.Get().(*gatherBuf)
	}
	for done := 0; done < len(p); {
		if g.outLen == len(g.out) {
			if err := g.flushLocked(); err != nil {
				return 0, err
			}
		}
		n := copy(g.out[g.outLen:], p[done:])
		g.outLen += n
		done += n
	}
	return len(p), nil
}

func (g *gatherConn) cork() {
	g.mu.Lock()
	g.corked = true
	g.mu.Unlock()
}

func (g *gatherConn) uncork() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.corked = false
	err := g.flushLocked()
	if g.out != nil {
		gatherBufs.Put(g.out)
		g.out = nil
	}
	return err
}

func (g *gatherConn) flushLocked() error {
	if g.outLen == 0 {
		return nil
	}
	_, err := g.Conn.Write(g.out[:g.outLen])
	g.outLen = 0
	return err
}
