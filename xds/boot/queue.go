package boot

import (
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// Queue is an io.Writer that never blocks: lines wait in one bounded buffer
// for a goroutine that writes them in large pieces. When the buffer is full
// the line is dropped and counted, because logging must not delay traffic.
// NewLogger on a Queue says how many were dropped once lines get through again.
//
//	q := boot.NewQueue(os.Stdout, 0)
//	defer q.Close()
//	log, levels, err := boot.NewLogger(q, "text", "info")
type Queue struct {
	w       io.Writer
	limit   int
	dropped atomic.Uint64
	wakec   chan struct{} // cap 1
	stopc   chan struct{} // closed by Close
	donec   chan struct{} // closed when the goroutine has ended
	once    sync.Once

	// owned by writeLoop
	cut  bool   // the last write ended within a line
	told uint64 // drops that report has told

	mu      sync.Mutex
	report  func(dropped uint64) // guarded by mu
	pending []byte               // guarded by mu
	spare   []byte               // guarded by mu; the other of the two buffers, nil while it is being written
}

const (
	// defaultQueueBytes holds some ten thousand lines.
	defaultQueueBytes = 4 << 20
	// flushEvery is how long lines gather: a busy proxy logs thousands per second, and each write costs as much as the
	// line itself.
	flushEvery = 5 * time.Millisecond
	// flushTimeout is how long Close waits for a reader that is stuck.
	flushTimeout = time.Second
	// keepBuffer is the largest buffer kept for the next round.
	keepBuffer = 256 << 10
)

// NewQueue starts a queue of at most limit bytes (0: 4 MiB) in front of w.
func NewQueue(w io.Writer, limit int) *Queue {
	if limit <= 0 {
		limit = defaultQueueBytes
	}
	q := &Queue{w: w, limit: limit, wakec: make(chan struct{}, 1), stopc: make(chan struct{}), donec: make(chan struct{})}
	go q.writeLoop()
	return q
}

// Write queues one line or drops it. It never fails.
func (q *Queue) Write(line []byte) (int, error) {
	q.mu.Lock()
	full := len(q.pending)+len(line) > q.limit
	if !full {
		if q.pending == nil {
			q.pending, q.spare = q.spare, nil
		}
		q.pending = append(q.pending, line...)
	}
	q.mu.Unlock()
	if full {
		q.dropped.Add(1)
		return len(line), nil
	}
	select {
	case q.wakec <- struct{}{}:
	default:
	}
	return len(line), nil
}

// Dropped counts the lines that found the queue full, or a writer that failed.
func (q *Queue) Dropped() uint64 { return q.dropped.Load() }

// Close writes what is queued and ends the goroutine. It waits at most a
// second for a reader that does not read.
func (q *Queue) Close() error {
	q.once.Do(func() { close(q.stopc) })
	t := time.NewTimer(flushTimeout)
	defer t.Stop()
	select {
	case <-q.donec:
	case <-t.C:
	}
	return nil
}

func (q *Queue) writeLoop() {
	defer close(q.donec)
	for {
		select {
		case <-q.wakec:
			q.flush()
			select { // the first line after a silence leaves at once, those that follow together
			case <-time.After(flushEvery):
			case <-q.stopc:
			}
		case <-q.stopc:
			q.flush()
			q.flush() // what the first one reported
			return
		}
	}
}

func (q *Queue) flush() {
	q.mu.Lock()
	b := q.pending
	q.pending = nil
	q.mu.Unlock()
	if len(b) == 0 {
		return
	}
	q.write(b)
	if cap(b) <= keepBuffer {
		q.mu.Lock()
		q.spare = b[:0]
		q.mu.Unlock()
	}
}

// write writes whole lines. An output that failed within a line (a full disk)
// gets a line break before the next one, so that no record is glued to half of
// another.
func (q *Queue) write(b []byte) {
	if q.cut {
		if _, err := q.w.Write([]byte{'\n'}); err != nil {
			q.dropped.Add(countLines(b))
			return
		}
		q.cut = false
	}
	n, err := q.w.Write(b)
	if err != nil {
		n = min(max(n, 0), len(b))
		q.cut = n > 0 && b[n-1] != '\n'
		q.dropped.Add(countLines(b[n:]))
		return
	}
	q.tell()
}

// tell reports drops when lines get through again: when what waits leaves
// room, since the report is a line like any other.
func (q *Queue) tell() {
	dropped := q.dropped.Load()
	if dropped == q.told {
		return
	}
	q.mu.Lock()
	report, room := q.report, len(q.pending) <= q.limit/2
	q.mu.Unlock()
	if report != nil && room {
		report(dropped - q.told)
		q.told = dropped
	}
}

// onRecovery sets what is told of drops.
func (q *Queue) onRecovery(report func(dropped uint64)) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.report = report
}

func countLines(b []byte) (n uint64) {
	for _, c := range b {
		if c == '\n' {
			n++
		}
	}
	return n
}
