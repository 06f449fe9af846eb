package relay

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
	"github.com/ambit-mesh/ambit/ztunnel/stack"
)

// joint is a joined pair: what both of its ways share.
type joint struct {
	a, b           Conn
	st             *Stats
	sent, received way
	first          io.WriterTo // what a has said before; the first run of sent takes it

	stop func() bool // the context's end no longer matters
	done func(error)
	left atomic.Int32 // ways that have not ended

	mu    sync.Mutex
	cause error // guarded by mu; the first one counts
	over  bool  // guarded by mu
}

// way is one direction of a pair. One goroutine at a time works on it, or none: then it is parked, or a tunnel delivers.
type way struct {
	j    *joint
	back bool // from b to a

	// Of who is parked, guarded by parked.mu.
	slot uint32 // in parked.slots, 0: not parked

	// Of who may be asked to park, guarded by busy.mu.
	prev, next *way
	listed     bool
	asked      bool
	silent     uint8  // looks at which nothing had moved
	moved      uint64 // at the last look
}

func (w *way) ends() (src, dst Conn, n *atomic.Uint64) {
	if w.back {
		return w.j.b, w.j.a, &w.j.st.Received
	}
	return w.j.a, w.j.b, &w.j.st.Sent
}

// socket is what the way reads from if it can be waited for without a goroutine.
func (w *way) socket() sockopt.Socket {
	src, _, _ := w.ends()
	c, _ := sockopt.SocketOf(src)
	return c
}

// deliver lets the source copy by itself, if it can.
func (w *way) deliver() bool {
	src, dst, n := w.ends()
	d, ok := src.(deliverer)
	return ok && d.DeliverTo(dst, n, func(readErr, writeErr error) {
		if w.ended(readErr, writeErr) {
			go func() { // who delivers must not wait
				stack.Reserve()
				w.j.finish()
			}()
		}
	})
}

// run copies until the way has ended, or is parked.
func (w *way) run() {
	src, dst, n := w.ends()
	c := w.socket()
	if err := w.begin(); err != nil {
		if w.ended(nil, err) {
			w.j.finish()
		}
		return
	}
	for {
		if c != nil {
			busy.add(w)
		}
		readErr, writeErr := copyConn(src, dst, n)
		if c != nil && busy.remove(w, readErr) {
			if parked.park(w, c) {
				return // whose it is now has taken it
			}
			continue
		}
		if w.ended(readErr, writeErr) {
			w.j.finish()
		}
		return
	}
}

// begin writes what the way's source has said before it was joined.
func (w *way) begin() error {
	if w.back || w.j.first == nil {
		return nil
	}
	first := w.j.first
	w.j.first = nil
	_, dst, n := w.ends()
	k, err := first.WriteTo(dst)
	n.Add(uint64(k))
	return err
}

// ended tells the other side how the way ended, and reports whether both have.
func (w *way) ended(readErr, writeErr error) bool {
	from, to, dst := "a", "b", w.j.b
	if w.back {
		from, to, dst = "b", "a", w.j.a
	}
	if readErr == nil && writeErr == nil {
		if err := closeWrite(dst); err != nil && !errors.Is(err, syscall.ENOTCONN) { // gone already: nothing is lost
			writeErr = err
		}
		w.watch()
	}
	switch {
	case readErr != nil:
		w.j.cut(&Error{Side: from, Op: "read", Err: readErr})
	case writeErr != nil:
		w.j.cut(&Error{Side: to, Op: "write", Err: writeErr})
	}
	return w.j.left.Add(-1) == 0
}

// cut resets both sides, once. Whichever way still waits ends with an error that nobody looks at.
func (j *joint) cut(cause error) {
	j.mu.Lock()
	if j.over {
		j.mu.Unlock()
		return
	}
	j.over, j.cause = true, cause
	j.measure()
	Reset(j.a)
	Reset(j.b)
	j.mu.Unlock()
	// From here on neither can be parked: their sockets are closed.
	for _, w := range [...]*way{&j.sent, &j.received} {
		if parked.take(w) && w.ended(net.ErrClosed, nil) {
			go j.finish() // the caller's own way may be among them
		}
	}
}

// finish closes what is still open and tells how the pair ended.
func (j *joint) finish() {
	j.st.Times.add(j.a)
	j.st.Times.add(j.b)
	err := j.end()
	j.stop()
	j.done(err)
}

// end closes what is still open and returns the first cause.
func (j *joint) end() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.over {
		j.over = true
		j.measure()
		farewell(j.a, j.st.Times.A)
		farewell(j.b, j.st.Times.B)
		_ = j.a.Close() // both ways have ended: nothing can be lost
		_ = j.b.Close()
	}
	return j.cause
}

// measure reads what ends with the sockets. Its caller holds mu.
func (j *joint) measure() {
	if !j.st.Untimed {
		j.st.Times.A, j.st.Times.B = infoOf(j.a), infoOf(j.b)
	}
}
