package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/record"
)

// recordConn is the seam below the frames: it protects batches of plaintext and gives plaintext back. There are two:
// ambitRecords by our own record layer and tlsRecords by crypto/tls; the kernel's would fit in here.
type recordConn interface {
	// Fill waits until a whole record is there. It holds no buffer while it waits, where the transport allows. It and
	// Next return io.EOF for the peer's close_notify only; errCutOff when the transport ended without one.
	Fill() error
	// Buffered reports whether Next may go on without waiting for the transport.
	Buffered() bool
	// Next returns the plaintext of one record, and the block that it lies in. Both are lent until the next call; who
	// wants more retains the block.
	Next() ([]byte, *block, error)
	// WriteBatch protects and sends all parts with as few syscalls as possible.
	WriteBatch(parts []segment) error
	// TryBatch is WriteBatch for at most tryLimit bytes that never waits for the transport. What it leaves is protected
	// and lies in the record layer: Flush, and nothing else, comes next.
	TryBatch(parts []segment) (left bool, err error)
	// CanTry reports whether TryBatch may be called: not every transport can be written without waiting.
	CanTry() bool
	// Flush sends what TryBatch left.
	Flush() error
	// Close ends the transport in order; Cut ends it at once.
	Close() error
	Cut() error
}

// tryLimit is how much plaintext TryBatch takes: its records fit a gatherBuf.
const tryLimit = largeBlock

// segment is a part of a block on its way out.
type segment struct {
	blk *block
	n   int
}

// tlsRecords is recordConn by crypto/tls.
type tlsRecords struct {
	*tls.Conn
	g   *gatherConn
	blk *block // of the plaintext handed out last
}

// clientRecords completes the handshake as a client. The caller sets deadlines on c and closes it on error.
func clientRecords(ctx context.Context, c net.Conn, cfg *tls.Config, ambit bool, account *ledger.Account) (recordConn, *tls.ConnectionState, error) {
	return handshake(ctx, c, fullRecords(cfg), ambit, true, account)
}

func serverRecords(ctx context.Context, c net.Conn, cfg *tls.Config, ambit bool, account *ledger.Account) (recordConn, *tls.ConnectionState, error) {
	return handshake(ctx, c, fullRecords(cfg), ambit, false, account)
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

// errCutOff: anybody on the way, or a peer that died, can end a transport; only the peer can say that it is complete
// (https://www.rfc-editor.org/rfc/rfc8446#section-6.1).
var errCutOff = fmt.Errorf("%w: transport ended without close_notify", io.ErrUnexpectedEOF)

var errNoH2 = errors.New("peer did not negotiate ALPN h2")

// handshake does TLS and chooses the record layer: ours where it is asked for and can, otherwise that of crypto/tls.
func handshake(ctx context.Context, c net.Conn, cfg *tls.Config, ambit, client bool, account *ledger.Account) (recordConn, *tls.ConnectionState, error) {
	var secrets *record.Secrets
	if ambit && record.Allowed() {
		cfg, secrets = record.Capture(cfg)
		defer secrets.Wipe()
	}
	g := newGatherConn(c)
	turn := &turn{ctx: ctx, account: account}
	cfg = turn.during(cfg)
	t := tls.Server(g, cfg)
	if client {
		t = tls.Client(g, cfg)
	}
	if client { // a server waits for its peer first
		if err := turn.take(); err != nil {
			return nil, nil, err
		}
	}
	defer turn.give()
	g.turn = turn
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, nil, err
	}
	g.turn, g.secured = nil, true
	state := t.ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		return nil, nil, errNoH2
	}
	if secrets == nil || !record.Supported(&state) {
		return &tlsRecords{Conn: t, g: g}, &state, nil
	}
	in, out, err := record.Takeover(&state, secrets, client)
	if err != nil {
		return nil, nil, err
	}
	return &ambitRecords{g: g, in: in, out: out}, &state, nil
}

func (r *tlsRecords) Buffered() bool { return r.g.whole() }
func (r *tlsRecords) Cut() error     { return r.g.Conn.Close() }

func (r *tlsRecords) Fill() error {
	if r.blk != nil {
		r.blk.release()
		r.blk = nil
	}
	return r.g.fillRecord()
}

func (r *tlsRecords) Next() ([]byte, *block, error) {
	if r.blk != nil && r.blk.refs.Load() > 1 { // parts of it wait in streams
		r.blk.release()
		r.blk = nil
	}
	if r.blk == nil {
		r.blk = getBlock(smallBlock)
	}
	n, err := r.Conn.Read(r.blk.data)
	return r.blk.data[:n], r.blk, err
}

func (r *tlsRecords) CanTry() bool { return r.g.raw != nil }
func (r *tlsRecords) Flush() error { return r.g.uncork() }

func (r *tlsRecords) WriteBatch(parts []segment) error {
	if err := r.gather(parts); err != nil {
		return err
	}
	return r.g.uncork()
}

func (r *tlsRecords) TryBatch(parts []segment) (left bool, err error) {
	if err := r.gather(parts); err != nil {
		return false, err
	}
	return r.g.tryUncork()
}

func (r *tlsRecords) gather(parts []segment) error {
	r.g.cork()
	for _, p := range parts {
		if _, err := r.Conn.Write(p.blk.data[:p.n]); err != nil {
			_ = r.g.uncork() // the first error is the one that tells
			return err
		}
	}
	return nil
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
	secured bool   // the handshake is over: an end of the transport is no longer an end of the peer's
	turn    *turn  // until then: given up while the transport is waited for
	once    func(fd uintptr) bool
	reads   quick
	full    bool // the last read filled the block

	write  func(fd uintptr) // writes of tried what can be written at once; guarded by the batch's turn
	tried  []byte
	tryErr error
	writes quick

	// Outbound. crypto/tls may write from its reader, too (KeyUpdate, alerts), so this side has a lock.
	mu     sync.Mutex
	corked bool
	out    *gatherBuf
	outLen int
}

// gatherBuf has room for the records of tryLimit bytes in parts of any size, of which each has a header, an inner type
// and a tag, for a KeyUpdate, and for one full record more.
type gatherBuf [tryLimit + recordLen + gatherSlack]byte

// gatherSlack is for what surrounds the plaintext of tryLimit bytes.
const gatherSlack = 4 << 10

var gatherBufs = sync.Pool{New: func() any { return new(gatherBuf) }}

func newGatherConn(c net.Conn) *gatherConn {
	g := &gatherConn{Conn: c}
	if sc, ok := c.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			g.raw = raw
		}
	}
	g.once, g.write = g.readOnce, g.writeSome
	return g
}

func (g *gatherConn) buffered() bool { return g.w > g.r }

func (g *gatherConn) unread() []byte {
	if g.in == nil {
		return nil
	}
	return g.in.data[g.r:g.w]
}

// whole reports whether waiting for the transport would not help the next record: it is all there, or is none.
func (g *gatherConn) whole() bool {
	if g.w-g.r < recordHeaderLen {
		return false
	}
	h := g.in.data[g.r:]
	n := recordHeaderLen + int(h[3])<<8 + int(h[4])
	return g.w-g.r >= n || n > record.MaxRecord
}

// fillRecord returns when a whole record is there, or an error: io.EOF between records.
func (g *gatherConn) fillRecord() error {
	for !g.whole() {
		if err := g.more(); err != nil {
			if err == io.EOF && g.buffered() {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// fill returns when unread bytes are there, or an error.
func (g *gatherConn) fill() error {
	if g.buffered() {
		return nil
	}
	return g.more()
}

// more reads once behind what is unread.
func (g *gatherConn) more() error {
	err := g.readMore()
	if err == io.EOF && g.secured {
		return errCutOff
	}
	return err
}

func (g *gatherConn) readMore() error {
	switch {
	case g.turn == nil:
		return g.readOne()
	case g.raw == nil:
		return g.turn.without(g.readOne)
	}
	if err := g.readOne(); err != nil { // which gives the turn up if it has to wait
		return err
	}
	return g.turn.take()
}

func (g *gatherConn) readOne() error {
	g.makeRoom()
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

// makeRoom moves what is unread to the front; away from a block of which streams hold parts.
func (g *gatherConn) makeRoom() {
	if g.in == nil {
		return
	}
	old := g.in
	if old.refs.Load() > 1 || g.full && len(old.data) < hugeBlock {
		g.in = nil
		if g.buffered() {
			g.in = getBlock(g.blockSize())
			copy(g.in.data, old.data[g.r:g.w])
		}
		old.release()
	} else if g.r > 0 {
		copy(old.data, old.data[g.r:g.w])
	}
	g.r, g.w = 0, g.w-g.r
}

// readOnce tries one read. Returning false makes the caller wait for readability, and by then the buffer is back in
// its pool.
func (g *gatherConn) readOnce(fd uintptr) bool {
	g.borrow()
	for {
		n, errno := g.reads.read(fd, g.in.data[g.w:])
		if errno == unix.EINTR {
			continue
		}
		g.readErr = nil
		switch {
		case n > 0:
			g.w += n
			g.full = g.w == len(g.in.data)
			return true
		case errno == unix.EAGAIN:
			g.giveBack()
			g.reads.rested()
			if g.turn != nil {
				g.turn.give()
			}
			return false
		case errno != 0:
			g.readErr = &net.OpError{Op: "read", Net: "tcp", Source: g.LocalAddr(), Addr: g.RemoteAddr(), Err: errno}
		default:
			g.readErr = io.EOF
		}
		g.giveBack()
		return true
	}
}

func (g *gatherConn) borrow() {
	if g.in == nil {
		g.in = getBlock(g.blockSize())
	}
}

func (g *gatherConn) blockSize() int {
	if g.full {
		return hugeBlock
	}
	return largeBlock
}

func (g *gatherConn) giveBack() {
	if g.in != nil && !g.buffered() {
		g.in.release()
		g.in, g.r, g.w = nil, 0, 0 // a read behind the end of a full block would look like the end of the transport
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
		return g.writeNow(p)
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

// writeNow passes p on. A handshake fits the buffers of any socket; a stream may take nothing until its peer wants it to.
func (g *gatherConn) writeNow(p []byte) (n int, err error) {
	if g.turn == nil || g.raw != nil {
		return g.Conn.Write(p)
	}
	err = g.turn.without(func() error { n, err = g.Conn.Write(p); return err })
	return n, err
}

func (g *gatherConn) cork() {
	g.mu.Lock()
	g.corked = true
	g.mu.Unlock()
}

// uncork sends what was gathered.
func (g *gatherConn) uncork() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.corked = false
	err := g.flushLocked()
	g.dropLocked()
	return err
}

// tryUncork sends what can be sent at once, and stays corked while something is left.
func (g *gatherConn) tryUncork() (left bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	n, err := g.tryOnce(g.unsentLocked())
	if err == nil && n < g.outLen {
		g.outLen = copy(g.out[:], g.out[n:g.outLen])
		return true, nil
	}
	g.corked = false
	g.dropLocked()
	return false, err
}

func (g *gatherConn) unsentLocked() []byte {
	if g.out == nil {
		return nil
	}
	return g.out[:g.outLen]
}

func (g *gatherConn) dropLocked() {
	if g.out != nil {
		gatherBufs.Put(g.out)
		g.out = nil
	}
	g.outLen = 0
}

func (g *gatherConn) flushLocked() error {
	if g.outLen == 0 {
		return nil
	}
	_, err := g.Conn.Write(g.out[:g.outLen])
	g.outLen = 0
	return err
}

// tryOnce is try for a caller that does other things in between, which the scheduler sees: reading what it writes,
// usually.
func (g *gatherConn) tryOnce(p []byte) (int, error) {
	g.writes.rested()
	return g.try(p)
}

// try writes what the transport takes of p without waiting. Callers take turns.
func (g *gatherConn) try(p []byte) (int, error) {
	g.tried, g.tryErr = p, nil
	err := g.raw.Control(g.write)
	n := len(p) - len(g.tried)
	g.tried = nil
	if err == nil && g.tryErr != nil {
		err = &net.OpError{Op: "write", Net: "tcp", Source: g.LocalAddr(), Addr: g.RemoteAddr(), Err: g.tryErr}
	}
	return n, err
}

func (g *gatherConn) writeSome(fd uintptr) {
	for len(g.tried) > 0 {
		n, errno := g.writes.write(fd, g.tried)
		switch errno {
		case 0:
			g.tried = g.tried[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			return
		default:
			g.tryErr = errno
			return
		}
	}
}
