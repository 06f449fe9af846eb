package hbone

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// Stream is one CONNECT tunnel: a net.Conn with half-close and reset.
//
// Reads return io.EOF after the peer's END_STREAM, and an error that is syscall.ECONNRESET after its reset; what
// arrived before is read first. Any method may be called from any goroutine.
type Stream struct {
	t  *tunnel
	id uint32

	answered atomic.Bool   // the CONNECT has its answer
	answerc  chan struct{} // client: closed with the answer, or when there will be none
	resp     *head         // client: set before answerc closes
	cancel   context.CancelFunc
	early    int32         // client: bytes that were sent along with the CONNECT; immutable
	done     atomic.Uint32 // sendDone | recvDone | released

	mu         sync.Mutex // the receiving half
	recvCond   sync.Cond
	pieces     []piece // unread: pieces[first:]
	first      int
	buffered   int
	inFlight   int   // taken by RelayTo and not yet written
	recvErr    error // set once; read after what is buffered
	stalled    bool  // where memory is scarce: whoever the data is for has taken none for a while
	eof        bool  // END_STREAM came
	closedRead bool  // Close: what arrives is discarded
	waking     bool  // in the reader's wake list
	out        *outlet
	watcher    lostWatcher // nil: nobody, or it has been told
	recvWindow int         // what the peer may still send
	window     int         // what it may send when the application has taken everything
	owed       int         // taken by the application, not yet given back to the peer
	charged    int64       // ledger.Bytes held for window
	grantAt    int64       // when window was last given back, ns
	readBy     deadline

	writing sync.Mutex  // one Write at a time, as in net.TCPConn
	talking atomic.Bool // something small was sent and nothing has come since: not a question and its answer
	spoke   atomic.Bool // something was sent, of any size, and nothing has come since: its end may be waited for

	// the sending half, guarded by t.w.mu
	sendCond               sync.Cond
	sendWindow             int64
	sendErr                error
	sendClosed             bool // END_STREAM is queued
	inLine                 bool
	prevInLine, nextInLine *Stream
	writeBy                deadline
	waits                  waits

	infoAt sockopt.TCPInfo // of the tunnel's socket when the stream was opened
}

const (
	sendDone = 1 << iota
	recvDone
	released
)

// piece is received data: a part of a block that it holds a reference to.
type piece struct {
	blk    *block
	lo, hi int
	own    bool // the block is this stream's alone: more may be copied behind hi
}

// deadline is a net.Conn deadline whose waiters wait on a sync.Cond.
type deadline struct {
	timer   *time.Timer
	expired bool
	gen     int // a timer that was replaced while it fired must not count
}

// set arms the deadline. mu guards it and belongs to cond.
func (d *deadline) set(t time.Time, mu sync.Locker, cond *sync.Cond) {
	mu.Lock()
	defer mu.Unlock()
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
		cond.Broadcast()
		return
	}
	gen := d.gen
	d.timer = time.AfterFunc(wait, func() {
		mu.Lock()
		defer mu.Unlock()
		if d.gen == gen {
			d.expired = true
			cond.Broadcast()
		}
	})
}

// widen raises the window above what our SETTINGS promise to every stream, unless memory is short, and returns what to
// tell the peer. Where it is scarce, who has grown gives way under pressure: what is left then is for those that begin,
// with less.
func (s *Stream) widen() int {
	t := s.t
	more := t.start - t.base
	if pressure := t.account.Pressure(ledger.Bytes); pressure && t.scarce {
		more = min(more, scarceWindow-t.base)
	} else if pressure {
		return 0
	}
	if more <= 0 || !t.account.TryAcquire(ledger.Bytes, int64(more)) {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done.Load()&released != 0 { // reset meanwhile: nobody would give it back
		t.account.Release(ledger.Bytes, int64(more))
		return 0
	}
	s.charged += int64(more)
	s.window += more
	s.recvWindow += more
	return more
}

func (s *Stream) LocalAddr() net.Addr  { return s.t.laddr }
func (s *Stream) RemoteAddr() net.Addr { return s.t.raddr }

func (s *Stream) SetDeadline(t time.Time) error {
	_ = s.SetReadDeadline(t)
	return s.SetWriteDeadline(t)
}

func (s *Stream) SetReadDeadline(t time.Time) error {
	s.readBy.set(t, &s.mu, &s.recvCond)
	return nil
}

func (s *Stream) SetWriteDeadline(t time.Time) error {
	s.writeBy.set(t, &s.t.w.mu, &s.sendCond)
	return nil
}

// Read returns what has arrived, waiting for something.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.mu.Lock()
	if err := s.awaitLocked(); err != nil {
		s.mu.Unlock()
		return 0, opError("read", s, err)
	}
	n := 0
	for n < len(p) && s.first < len(s.pieces) {
		pc := &s.pieces[s.first]
		k := copy(p[n:], pc.blk.data[pc.lo:pc.hi])
		n += k
		if pc.lo += k; pc.lo == pc.hi {
			pc.blk.release()
			s.dropFirstLocked()
		}
	}
	s.buffered -= n
	update := s.takenLocked(n)
	s.mu.Unlock()
	s.giveBack(update)
	return n, nil
}

// awaitLocked returns nil when there is data, and otherwise why there will be none.
func (s *Stream) awaitLocked() error {
	for {
		switch {
		case s.closedRead:
			return net.ErrClosed
		case s.readBy.expired:
			return os.ErrDeadlineExceeded
		case s.buffered > 0:
			return nil
		case s.recvErr != nil:
			return s.recvErr
		case s.eof:
			return io.EOF
		}
		s.recvCond.Wait()
	}
}

func (s *Stream) dropFirstLocked() {
	s.pieces[s.first] = piece{}
	if s.first++; s.first == len(s.pieces) {
		s.pieces, s.first = s.pieces[:0], 0
	}
}

// grant is window to give back to the peer.
type grant struct {
	n int
	// unhurried: the last half of the window has lasted for long, so that the other half will. Then it may leave with
	// what is sent next, an answer usually. By itself it would be a packet, and a thread that is woken at the other end.
	unhurried bool
}

// takenLocked accounts n bytes that the application took and returns what to give back, if it is worth a frame.
func (s *Stream) takenLocked(n int) grant {
	s.owed += n
	if s.owed-s.inFlight < s.window/2 || s.eof || s.recvErr != nil || s.closedRead {
		return grant{}
	}
	var g grant
	before := s.window
	if s.t.scarce && s.t.account.Pressure(ledger.Bytes) {
		s.shrinkLocked()
	} else {
		first := s.grantAt == 0
		since := s.growLocked()
		g.unhurried = !first && !s.t.scarce && since > 2*max(s.t.rtt.Load(), int64(2*lateLimit))
	}
	// Not what the window leaves: the rest of a frame that has begun is neither in recvWindow nor here.
	g.n = s.owed - s.inFlight + s.window - before
	s.recvWindow += g.n
	s.owed = s.inFlight
	return g
}

// growLocked doubles the window of a stream whose reader took half a window within two round trips: then the window,
// not the reader, is what limits it. A granted window cannot be withdrawn, so growth is charged to the pod. It returns how
// long that half has lasted, ns.
func (s *Stream) growLocked() (since int64) {
	now := s.t.clock().UnixNano()
	since = now - s.grantAt
	s.grantAt = now
	more := min(s.window, s.t.windows.Stream-s.window)
	if more <= 0 || since > 2*max(s.t.rtt.Load(), int64(minRTT)) || !s.t.account.TryAcquire(ledger.Bytes, int64(more)) {
		return since
	}
	s.charged += int64(more)
	s.window += more
	return since
}

// shrinkLocked keeps back half of what would be given back, down to what a stream begins with then: others want it, too.
func (s *Stream) shrinkLocked() {
	less := min((s.owed-s.inFlight)/2, s.window-max(scarceWindow, s.t.base), int(s.charged))
	if less <= 0 {
		return
	}
	s.window -= less
	s.charged -= int64(less)
	s.t.account.Release(ledger.Bytes, int64(less))
}

// giveBack returns window to the peer.
func (s *Stream) giveBack(g grant) {
	if g.n <= 0 {
		return
	}
	w := s.t.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed != nil || s.sendErr != nil {
		return
	}
	var b [frameHeaderLen + 4]byte
	w.packLocked(appendWindowUpdate(b[:0], s.id, g.n))
	if g.unhurried {
		w.attendLateLocked()
	} else {
		w.attendLocked()
	}
}

// Write returns when p is queued; the tunnel's queue is bounded. The tunnel may go on sending other streams' frames on
// this goroutine for a moment.
func (s *Stream) Write(p []byte) (n int, err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	return s.writeLocked(p)
}

// writeLocked is Write by the holder of s.writing.
func (s *Stream) writeLocked(p []byte) (n int, err error) {
	w := s.t.w
	if len(p) == 0 {
		w.mu.Lock()
		defer w.mu.Unlock()
		if err := s.sendErrLocked(); err != nil {
			return 0, opError("write", s, err)
		}
	}
	for len(p) > 0 {
		w.mu.Lock()
		k, err := w.reserveLocked(s, len(p))
		if err != nil {
			w.mu.Unlock()
			return n, opError("write", s, err)
		}
		if k <= packLimit {
			w.packDataLocked(s.id, p[:k], 0)
		} else {
			frame := w.frame
			w.mu.Unlock()
			blk := s.frameCopy(p[:k], frame)
			w.mu.Lock()
			if err := s.sendErrLocked(); err != nil {
				w.giveBackLocked(s, k)
				w.mu.Unlock()
				blk.release()
				return n, opError("write", s, err)
			}
			w.appendBlockLocked(blk, framedLen(k, frame))
		}
		s.speak()
		s.flushSmallLocked(k)
		w.mu.Unlock()
		s.t.noteMoved(k)
		n += k
		p = p[k:]
	}
	return n, nil
}

// speak and heard say whose turn it is: who has spoken last may be waited for, also for its end.
func (s *Stream) speak() {
	if !s.spoke.Load() {
		s.spoke.Store(true)
	}
}

func (s *Stream) heard() {
	if s.spoke.Load() {
		s.spoke.Store(false)
	}
}

// flushSmallLocked flushes n bytes that were just queued. A question leaves at once, on this goroutine. Whoever goes on
// talking in small pieces lets others carry them, so that they leave together.
func (s *Stream) flushSmallLocked(n int) {
	if n <= packLimit && s.talking.Swap(true) {
		s.t.w.attendLocked()
		return
	}
	s.t.w.flushTogetherLocked()
}

// frameCopy puts p into a block as DATA frames.
func (s *Stream) frameCopy(p []byte, frame int) *block {
	blk := getBlock(framedLen(len(p), frame))
	for off, rest := 0, p; len(rest) > 0; {
		k := min(len(rest), frame)
		putFrameHeader(blk.data[off:], k, frameData, 0, s.id)
		copy(blk.data[off+frameHeaderLen:], rest[:k])
		off += frameHeaderLen + k
		rest = rest[k:]
	}
	return blk
}

// framedLen is the size of n bytes in DATA frames.
func framedLen(n, frame int) int { return n + (n+frame-1)/frame*frameHeaderLen }

// sendErrLocked says why nothing more can be sent.
func (s *Stream) sendErrLocked() error {
	switch {
	case s.sendErr != nil:
		return s.sendErr
	case s.sendClosed:
		return syscall.EPIPE
	case s.writeBy.expired:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// CloseWrite sends END_STREAM: the peer reads EOF, and may go on writing. The end of what was said last leaves at once.
// After the peer's answer, or its own end, it is a farewell, which may wait a moment for company, while that comes.
func (s *Stream) CloseWrite() error {
	w := s.t.w
	w.mu.Lock()
	if s.sendErr != nil {
		defer w.mu.Unlock()
		return opError("close", s, s.sendErr)
	}
	if !s.sendClosed {
		s.endLocked()
		if s.spoke.Load() || !w.farewells.awaited() {
			w.flushLocked()
		} else {
			w.attendLateLocked()
		}
	}
	w.mu.Unlock()
	s.finish(sendDone)
	return nil
}

func (s *Stream) endLocked() {
	s.sendClosed = true
	if s.t.w.closed == nil {
		s.t.w.packDataLocked(s.id, nil, flagEndStream)
	}
	s.sendCond.Broadcast()
}

// Close ends both directions. What was written is still delivered; a peer that has not ended its direction learns
// that nobody reads any more.
func (s *Stream) Close() error {
	s.mu.Lock()
	if s.closedRead {
		s.mu.Unlock()
		return nil
	}
	s.closedRead = true
	unread := !s.eof || s.buffered > 0
	s.dropLocked()
	s.recvCond.Broadcast()
	s.kickLocked()
	s.mu.Unlock()

	w := s.t.w
	w.mu.Lock()
	if s.sendErr == nil {
		if !s.sendClosed {
			s.endLocked()
			w.attendLocked()
		}
		if unread && !s.over() && w.closed == nil {
			var b [frameHeaderLen + 4]byte
			w.packLocked(appendRST(b[:0], s.id, CodeCancel))
			w.attendLocked()
		}
		s.sendErr = net.ErrClosed
		s.sendCond.Broadcast()
	}
	w.mu.Unlock()
	s.stopTimers()
	s.finish(sendDone | recvDone)
	return nil
}

func (s *Stream) stopTimers() {
	_ = s.SetDeadline(time.Time{})
}

// Reset ends both directions at once, as a TCP RST does: RST_STREAM(CONNECT_ERROR),
// https://www.rfc-editor.org/rfc/rfc9113#section-8.5.
func (s *Stream) Reset() error {
	s.abort(CodeConnect)
	_ = s.Close()
	return nil
}

// abort sends RST_STREAM and fails both halves. On a stream that is over it does nothing.
func (s *Stream) abort(code ErrCode) {
	err := &ResetError{Code: code}
	w := s.t.w
	w.mu.Lock()
	send := !s.over() && s.sendErr == nil && w.closed == nil
	if s.sendErr == nil {
		s.sendErr = err
	}
	if send {
		var b [frameHeaderLen + 4]byte
		w.packLocked(appendRST(b[:0], s.id, code))
		w.attendLocked()
	}
	s.sendCond.Broadcast()
	w.mu.Unlock()
	s.failRead(err)
	s.finish(sendDone | recvDone)
}

// failRead ends the receiving half with err, and the work on a request that nobody waits for any more. After the answer
// the handler learns of the end by reading and writing.
func (s *Stream) failRead(err error) {
	if s.cancel != nil && !s.answered.Load() {
		s.cancel()
	}
	s.mu.Lock()
	if s.recvErr == nil && !s.eof {
		s.recvErr = err
	}
	s.recvCond.Broadcast()
	s.kickLocked()
	s.tellLocked(err)
	s.mu.Unlock()
}

func (s *Stream) failWrite(err error) {
	w := s.t.w
	w.mu.Lock()
	if s.sendErr == nil {
		s.sendErr = err
	}
	s.sendCond.Broadcast()
	w.mu.Unlock()
}

// dropLocked lets go of what nobody will read.
func (s *Stream) dropLocked() {
	for _, pc := range s.pieces[s.first:] {
		pc.blk.release()
	}
	s.pieces, s.first, s.buffered = nil, 0, 0
}

// over reports whether both directions have ended.
func (s *Stream) over() bool { return s.done.Load()&(sendDone|recvDone) == sendDone|recvDone }

// finish notes that a direction is over, and when both are, forgets the stream.
func (s *Stream) finish(bits uint32) {
	if s.done.Or(bits)|bits != sendDone|recvDone {
		return
	}
	s.release()
	s.t.removeStream(s)
}

// release gives back what the stream held of the ledger, once.
func (s *Stream) release() {
	if s.done.Or(released)&released != 0 {
		return
	}
	if s.answerc != nil && !s.answered.Swap(true) {
		close(s.answerc)
	}
	s.mu.Lock()
	charged := s.charged
	s.charged = 0
	s.mu.Unlock()
	s.t.account.Release(ledger.Bytes, charged)
	s.t.account.Release(ledger.Streams, 1)
}

// --- called by the tunnel's reader ---

// beginData takes a DATA frame's length from the stream's window, which may be overdrawn by so much. A frame without a
// length needs none: that is how a stream ends whose window is used up.
func (s *Stream) beginData(n, overdraft int) ErrCode {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.eof {
		return CodeStreamClosed
	}
	if s.recvWindow -= n; n > 0 && s.recvWindow+overdraft < 0 {
		return CodeFlowControl
	}
	return CodeNo
}

// deliver queues p, which lies in blk. It reports whether the stream has to be woken, now or with others.
func (s *Stream) deliver(blk *block, p []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closedRead || s.recvErr != nil {
		return false
	}
	if s.talking.Load() {
		s.talking.Store(false)
	}
	s.heard()
	s.buffered += len(p)
	if s.borrowsLocked(blk, p) {
		blk.retain()
		lo := cap(blk.data) - cap(p) // p is a slice of blk.data
		s.pieces = append(s.pieces, piece{blk: blk, lo: lo, hi: lo + len(p)})
	} else {
		s.copyInLocked(p)
	}
	if s.waking {
		return false
	}
	s.waking = true
	return true
}

// pinLimit is how many blocks the unread data of a stream may keep from their pool: with it, a stalled stream holds at
// most about four times its starting window.
const pinLimit = 8

// borrowsLocked decides whether p stays where it is, for the price of its whole block, or is copied.
func (s *Stream) borrowsLocked(blk *block, p []byte) bool {
	k := len(s.pieces)
	if s.t.scarce && (s.stalled || s.out == nil) { // without an outlet nobody would see that it stalls
		return false
	}
	return len(p) >= borrowLimit && (k-s.first < pinLimit*largeBlock/len(blk.data) || k > s.first && s.pieces[k-1].blk == blk)
}

func (s *Stream) copyInLocked(p []byte) {
	if last := len(s.pieces) - 1; last >= s.first && s.pieces[last].own {
		pc := &s.pieces[last]
		n := copy(pc.blk.data[pc.hi:], p)
		pc.hi += n
		p = p[n:]
	}
	if len(p) > 0 {
		blk := s.ownBlock(len(p))
		s.pieces = append(s.pieces, piece{blk: blk, hi: copy(blk.data, p), own: true})
	}
}

func (s *Stream) ownBlock(n int) *block {
	if s.t.scarce {
		return getTinyBlock(n)
	}
	return getBlock(smallBlock)
}

// consumed accounts bytes that count for the window and that no application will take.
func (s *Stream) consumed(n int) {
	s.mu.Lock()
	update := s.takenLocked(n)
	s.mu.Unlock()
	s.giveBack(update)
}

// wakeReader passes on what has been delivered.
func (s *Stream) wakeReader() {
	s.mu.Lock()
	s.waking = false
	s.recvCond.Broadcast()
	out := s.claimLocked()
	s.mu.Unlock()
	if out != nil {
		out.pump()
	}
}

func (s *Stream) endOfStream() {
	s.heard()
	s.mu.Lock()
	s.eof = true
	s.recvCond.Broadcast()
	out := s.claimLocked()
	s.mu.Unlock()
	s.finish(recvDone)
	if out != nil {
		out.pump()
	}
}

func (s *Stream) resetByPeer(code ErrCode) {
	read, write := resetErrors(code)
	if !s.answered.Load() {
		read = &ResetError{code, true} // no tunnel has ended: there was none
	}
	s.failWrite(write)
	if read == nil {
		s.endOfStream()
	} else {
		s.failRead(read)
	}
	s.finish(sendDone | recvDone)
}

// answer passes the response head to the waiting Connect.
func (s *Stream) answer(hd *head, end bool) {
	s.resp = hd
	if !s.answered.Swap(true) {
		close(s.answerc)
	}
	if end {
		s.endOfStream()
	}
}

// tunnelLost fails both halves; the stream is no longer in the tunnel's table.
func (s *Stream) tunnelLost(err error) {
	s.failWrite(err)
	s.failRead(err)
	s.done.Or(sendDone | recvDone)
	s.release()
}
