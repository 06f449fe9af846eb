package relay

import (
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// A pair that one side has ended its half of goes on in one direction. If the side that has said all is lost then, nobody
// would notice until the other one says something: no one reads from it any more. A tunnel knows, and tells.

// watched is a side that tells when it is lost; never before Watch returns, on the caller's goroutine.
type watched interface {
	Watch(w interface{ Lost(err error) })
}

// watch has the way back told of the end of the side that w has read to its end.
func (w *way) watch() {
	src, _, _ := w.ends()
	if s, ok := src.(watched); ok && w.j.left.Load() > 1 {
		s.Watch(w.other())
	}
}

func (w *way) other() *way {
	if w.back {
		return &w.j.sent
	}
	return &w.j.received
}

const (
	// lostLook and lostLookMost are how long until what was written to a socket is looked after again.
	lostLook     = 10 * time.Millisecond
	lostLookMost = time.Second
)

// Lost is told of the side that w writes to. Its source is reset, as it would be if it said something now, but not before
// it has what it was sent: it may be reading an answer that is complete.
func (w *way) Lost(err error) { w.lost(err, lostLook) }

func (w *way) lost(err error, again time.Duration) {
	if w.j.isOver() {
		return
	}
	src, _, _ := w.ends()
	if c, ok := sockopt.SocketOf(src); ok && sockopt.Unacked(c) {
		time.AfterFunc(again, func() { w.lost(err, min(2*again, lostLookMost)) })
		return
	}
	to := "b"
	if w.back {
		to = "a"
	}
	w.j.cut(&Error{Side: to, Op: "write", Err: err})
}

func (j *joint) isOver() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.over
}
