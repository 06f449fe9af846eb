package hbone

import (
	"runtime"
	"sync"
	"time"
)

const (
	// queueLimit is how much DATA may wait for a tunnel's transport before its writers do.
	queueLimit = 2 * largeBlock
	// smallWrite may pass waiting bulk writers, up to twice queueLimit: a request must not wait for a file.
	smallWrite = 2 << 10
	// packLimit is the largest payload that is copied behind other frames into one record instead of getting its own.
	packLimit = 4 << 10
	// controlLimit bounds what a peer can make us queue without reading it (PING and SETTINGS acknowledgements, RST).
	controlLimit = 64 << 10
	// inlineRounds is how often an application's goroutine flushes for others before a goroutine of its own goes on.
	inlineRounds = 2
	// lateLimit is how long a frame that nobody waits for may lie until something else leaves, with which it goes: a
	// packet less, and at the other end a thread that is woken once less. The runtime's timers have no shorter one.
	lateLimit = time.Millisecond
)

// writer is the outbound half of a tunnel: a bounded queue of frames in wire order, and flow control towards the peer.
//
// Frames are appended under mu. Whoever appends to an unattended queue attends to it: inline, if it may block as its
// caller does, or by a goroutine that ends when the queue is empty.
type writer struct {
	rc recordConn
	// fail is called once, without mu, when the transport breaks.
	fail func(error)

	mu                 sync.Mutex
	queue              []segment // guarded by mu
	spare              []segment // the other half of the swap, empty
	packing            bool      // the last segment may take more small frames
	queued             int       // bytes in queue, and of the batch being flushed
	control            int       // of those, bytes of control frames
	flushing           bool
	rally              rally
	rounds             uint64 // batches written; keepalive watches it
	closed             error  // set once; nothing is appended after
	broken             error  // set once, by the transport; nothing is sent after
	idle               sync.Cond
	late               bool        // later will see to the queue
	later              *time.Timer // nil until it is needed
	answers, farewells company

	window        int64 // the peer's connection window
	initialWindow int64 // the peer's SETTINGS_INITIAL_WINDOW_SIZE, of streams opened from now on
	batch         int   // of bulk: what the writers' turns bring, at most largeBlock
	frame         int   // payload of a DATA frame: as many whole records as the peer's frame limit allows
	waiters       streamList
	firstBlock    bool // the first header block is still to come
}

func newWriter(rc recordConn, fail func(error)) *writer {
	w := &writer{rc: rc, fail: fail, window: defaultWindow, initialWindow: defaultWindow, firstBlock: true, batch: largeBlock}
	w.idle.L = &w.mu
	w.answers.need, w.farewells.need = answersNeed, farewellsNeed
	w.setMaxFrameLocked(minMaxFrame)
	return w
}

// setMaxFrameLocked fits DATA frames to the peer's limit: header and payload together are whole records.
func (w *writer) setMaxFrameLocked(limit int) {
	records := min((limit+frameHeaderLen)/recordLen, largeBlock/recordLen)
	w.frame = records*recordLen - frameHeaderLen
}

// roomLocked returns n bytes at the end of the queue for small frames.
func (w *writer) roomLocked(n int) []byte {
	if !w.packing || len(w.queue) == 0 || w.queue[len(w.queue)-1].n+n > smallBlock {
		w.queue = append(w.queue, segment{blk: getBlock(max(n, 1))})
		w.packing = n <= smallBlock
	}
	last := &w.queue[len(w.queue)-1]
	b := last.blk.data[last.n : last.n+n]
	last.n += n
	w.queued += n
	return b
}

// packLocked appends a small frame to the queue.
func (w *writer) packLocked(frame []byte) {
	copy(w.roomLocked(len(frame)), frame)
}

// packDataLocked appends a DATA frame of at most packLimit.
func (w *writer) packDataLocked(id uint32, p []byte, flags byte) {
	b := w.roomLocked(frameHeaderLen + len(p))
	putFrameHeader(b, len(p), frameData, flags, id)
	copy(b[frameHeaderLen:], p)
}

// beginBlockLocked begins a header block; the tunnel's first one says that we never index.
func (w *writer) beginBlockLocked(b []byte) []byte {
	if w.firstBlock {
		w.firstBlock = false
		b = appendTableSizeZero(b)
	}
	return b
}

// packHeadersLocked appends a header block, as HEADERS and as many CONTINUATIONs as it takes: frames that a record holds.
func (w *writer) packHeadersLocked(id uint32, block []byte, flags byte) {
	const most = recordLen - frameHeaderLen
	typ := frameHeaders
	for {
		k := min(len(block), most)
		if k == len(block) {
			flags |= flagEndHeaders
		}
		b := w.roomLocked(frameHeaderLen + k)
		putFrameHeader(b, k, typ, flags, id)
		copy(b[frameHeaderLen:], block[:k])
		block = block[k:]
		if flags&flagEndHeaders != 0 {
			return
		}
		typ, flags = frameContinuation, 0
	}
}

// appendBlockLocked queues a block of frames, whose ownership passes to the queue.
func (w *writer) appendBlockLocked(b *block, n int) {
	w.queue = append(w.queue, segment{b, n})
	w.queued += n
	w.packing = false
}

// sendControl queues a control frame and never blocks. It reports false when the peer, by not reading, has let more
// pile up than we keep.
func (w *writer) sendControl(frame []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	ok := w.controlLocked(frame)
	w.attendLocked()
	return ok
}

// holdControl is sendControl for a caller that will flush soon, or anybody before.
func (w *writer) holdControl(frame []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.controlLocked(frame)
}

func (w *writer) controlLocked(frame []byte) bool {
	if w.closed != nil {
		return true
	}
	if w.control+len(frame) > controlLimit {
		return false
	}
	w.control += len(frame)
	w.packLocked(frame)
	return true
}

// flushHeld sends what was held, without waiting.
func (w *writer) flushHeld() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flushLocked()
}

// sendLast queues the tunnel's last frame, whatever has piled up before it.
func (w *writer) sendLast(frame []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed == nil {
		w.packLocked(frame)
		w.attendLocked()
	}
}

// attendLocked makes sure that somebody flushes, without blocking.
func (w *writer) attendLocked() {
	if !w.flushing && len(w.queue) > 0 {
		w.flushing = true
		go w.flushLoop()
	}
}

// attendLateLocked leaves the queue to whoever flushes next, for lateLimit at most.
func (w *writer) attendLateLocked() {
	if w.flushing || w.late || len(w.queue) == 0 {
		return
	}
	w.late = true
	if w.later == nil {
		w.later = time.AfterFunc(lateLimit, w.flushLate)
	} else {
		w.later.Reset(lateLimit)
	}
}

// flushLate sends what nobody has taken along.
func (w *writer) flushLate() {
	w.mu.Lock()
	w.late = false
	if w.flushing || len(w.queue) == 0 {
		w.mu.Unlock()
		return
	}
	w.answers.missed()
	w.farewells.missed()
	w.flushing = true
	w.mu.Unlock()
	w.flushLoop()
}

// flushRest sends what an inline flush has left in the record layer, and goes on.
func (w *writer) flushRest(size, control int) {
	w.sent(w.rc.Flush(), size, control)
	w.flushLoop()
}

// flushLoop writes until the queue is empty.
func (w *writer) flushLoop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) > 0 && w.broken == nil {
		batch, size, control := w.takeLocked()
		w.mu.Unlock()
		err := w.rc.WriteBatch(batch)
		w.recycle(batch)
		w.sent(err, size, control)
		w.mu.Lock()
	}
	w.doneLocked()
}

// flushLocked flushes on the caller's goroutine unless somebody does already. It never waits for the transport: a
// caller that is reset or cut must be free to return, so where the transport takes no more, a goroutine goes on.
func (w *writer) flushLocked() {
	if w.flushing || len(w.queue) == 0 {
		return
	}
	w.flushing = true
	for round := 0; len(w.queue) > 0 && w.broken == nil; round++ {
		if round == inlineRounds || w.queued > tryLimit || !w.rc.CanTry() {
			go w.flushLoop()
			return
		}
		batch, size, control := w.takeLocked()
		w.mu.Unlock()
		left, err := w.rc.TryBatch(batch)
		w.recycle(batch)
		if left {
			w.mu.Lock()
			go w.flushRest(size, control)
			return
		}
		w.sent(err, size, control)
		w.mu.Lock()
	}
	w.doneLocked()
}

// flushTogetherLocked is flushLocked behind the goroutines that can run now, where some of them come here, too: frames of
// one turn of the poller are one record and one packet then, and wake the other end once.
func (w *writer) flushTogetherLocked() {
	switch {
	case w.rally.on:
		w.rally.joined = true // who is about to flush takes it along
	case w.flushing || !w.rally.worth():
		w.flushLocked()
	default:
		w.rally.begin()
		w.mu.Unlock()
		runtime.Gosched()
		w.mu.Lock()
		w.rally.end()
		w.flushLocked()
	}
}

// takeLocked takes the queue as a batch of so many bytes.
func (w *writer) takeLocked() (batch []segment, size, control int) {
	if w.late {
		w.late = false
		w.later.Stop() // one that fires all the same finds what has come since, which is no harm
	}
	w.answers.came()
	w.farewells.came()
	batch, size, control = w.queue, w.queued, w.control
	w.queue, w.spare, w.packing = w.spare, nil, false
	return batch, size, control
}

// recycle lets go of a batch that the record layer has taken. Only who flushes calls it.
func (w *writer) recycle(batch []segment) {
	for i := range batch {
		batch[i].blk.release()
		batch[i].blk = nil
	}
	w.mu.Lock()
	w.spare = batch[:0]
	w.mu.Unlock()
}

// sent accounts what was written.
func (w *writer) sent(err error, size, control int) {
	w.mu.Lock()
	w.queued -= size
	w.control -= control
	w.rounds++
	if err != nil {
		w.broken = err
		w.mu.Unlock()
		w.fail(err)
		w.mu.Lock()
	}
	w.wakeLocked()
	w.mu.Unlock()
}

// doneLocked ends a flusher's turn.
func (w *writer) doneLocked() {
	w.flushing = false
	if w.broken != nil {
		w.dropLocked()
	}
	w.idle.Broadcast()
}

// dropLocked returns what will never be sent.
func (w *writer) dropLocked() {
	for _, s := range w.queue {
		s.blk.release()
	}
	w.queue, w.packing, w.queued, w.control = nil, false, 0, 0
}

// wakeLocked lets the stream that has waited longest try again.
func (w *writer) wakeLocked() {
	if s := w.waiters.front(); s != nil && w.window > 0 && w.queued < queueLimit {
		s.sendCond.Signal()
	}
}

// reserveLocked waits until s may send and takes up to want bytes of its and the tunnel's windows. Streams take turns:
// each gets at most one large block, then goes to the end of the line.
func (w *writer) reserveLocked(s *Stream, want int) (int, error) {
	for {
		if err := s.sendErrLocked(); err != nil {
			w.leaveLocked(s)
			return 0, err
		}
		if s.sendWindow > 0 && w.window > 0 && w.admitsLocked(s, want) {
			n := int(min(int64(want), s.sendWindow, w.window, int64(w.mostLocked())))
			s.sendWindow -= int64(n)
			w.window -= int64(n)
			w.leaveLocked(s)
			return n, nil
		}
		if s.sendWindow > 0 {
			w.waiters.push(s) // a stream without a window of its own is not in anybody's way
		} else {
			w.leaveLocked(s)
		}
		s.waitLocked()
	}
}

// mostLocked is the payload of a batch's frames.
func (w *writer) mostLocked() int {
	whole := w.frame + frameHeaderLen
	n := w.batch / whole * w.frame
	if rest := w.batch % whole; rest > frameHeaderLen {
		n += rest - frameHeaderLen
	}
	return n
}

// admitsLocked reports whether there is room and it is s's turn.
func (w *writer) admitsLocked(s *Stream, want int) bool {
	if want <= smallWrite {
		return w.queued < 2*queueLimit
	}
	head := w.waiters.front()
	return w.queued < queueLimit && (head == nil || head == s)
}

// leaveLocked takes s out of the line and wakes who is next.
func (w *writer) leaveLocked(s *Stream) {
	if w.waiters.remove(s) {
		w.wakeLocked()
	}
}

// giveBackLocked returns window that was reserved and not used.
func (w *writer) giveBackLocked(s *Stream, n int) {
	s.sendWindow += int64(n)
	w.window += int64(n)
	w.wakeLocked()
}

// streamList is a line of streams, each at most once in it. The links are in the streams: joining allocates nothing.
type streamList struct{ first, last *Stream }

func (l *streamList) front() *Stream { return l.first }

func (l *streamList) push(s *Stream) {
	if s.inLine {
		return
	}
	s.inLine, s.prevInLine, s.nextInLine = true, l.last, nil
	if l.last != nil {
		l.last.nextInLine = s
	} else {
		l.first = s
	}
	l.last = s
}

func (l *streamList) remove(s *Stream) bool {
	if !s.inLine {
		return false
	}
	if s.prevInLine != nil {
		s.prevInLine.nextInLine = s.nextInLine
	} else {
		l.first = s.nextInLine
	}
	if s.nextInLine != nil {
		s.nextInLine.prevInLine = s.prevInLine
	} else {
		l.last = s.prevInLine
	}
	s.inLine, s.prevInLine, s.nextInLine = false, nil, nil
	return true
}

// progress is what keepalive watches: batches written, and whether one is under way.
func (w *writer) progress() (rounds uint64, writing bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rounds, w.flushing
}

// close ends appending. What is queued is still sent, unless the transport breaks.
func (w *writer) close(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed == nil {
		w.closed = err
	}
}

// finish waits until the queue is sent, or the transport is cut.
func (w *writer) finish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.broken == nil {
		w.attendLocked()
	}
	for w.flushing {
		w.idle.Wait()
	}
}
