// Package relay joins two byte streams until both directions have ended.
//
//	a ──copy──► b     end of input: CloseWrite on the other side (half-close)
//	a ◄──copy── b     reset: Reset on the other side
//
// One goroutine per direction, one of them the caller's; what comes from a tunnel for a socket has none, for the tunnel
// delivers it. While a direction is idle it holds neither buffer nor pipe: it waits for readability first and borrows
// then. Bytes are counted while they move.
//
// The package decides nothing: no timeouts, no policy, no logging.
package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// Conn is one side: *net.TCPConn, *hbone.Stream and memnet's connections are.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Resetter is a side that can end with a reset rather than an orderly close.
type Resetter interface{ Reset() error }

// Stats counts what has been relayed so far; any goroutine may read it while Join runs.
type Stats struct {
	Sent     atomic.Uint64 // from a to b
	Received atomic.Uint64 // from b to a
	Times    Times         // once Join has returned
	Untimed  bool          // before Join is called: nobody will read what Times says of sockets
}

// sender is a side that takes its input straight from a socket, placing it where its frames want it.
type sender interface {
	RelayFrom(src io.Reader, n *atomic.Uint64) (readErr, writeErr error)
}

// receiver is a side that gives its buffers straight to the other side's Write.
type receiver interface {
	RelayTo(dst io.Writer, n *atomic.Uint64) (readErr, writeErr error)
}

// deliverer is a side that writes what it receives to a socket by itself, without a goroutine of ours. done may be
// called by anybody, also before DeliverTo returns; false: dst is none that it can write.
type deliverer interface {
	DeliverTo(dst net.Conn, n *atomic.Uint64, done func(readErr, writeErr error)) bool
}

// Error says which side failed, and whether reading from it or writing to it.
type Error struct {
	Side string // "a" or "b"
	Op   string // "read" or "write"
	Err  error
}

func (e *Error) Error() string { return "relay: " + e.Op + " " + e.Side + ": " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Join copies both ways until both have ended, and closes a and b. It returns nil when both sides ended in order,
// context.Cause(ctx) when ctx cut them, and otherwise the first error.
func Join(ctx context.Context, a, b Conn, st *Stats) error {
	if st == nil {
		st = new(Stats)
	}
	st.Times.Began = time.Now()
	j := &joint{a: a, b: b, times: &st.Times, untimed: st.Untimed}
	linger(a, 0)
	linger(b, 0)
	stop := context.AfterFunc(ctx, func() { j.cut(context.Cause(ctx)) })
	defer stop()

	donec := make(chan struct{})
	sent := way{j, "a", "b", a, b, &st.Sent}
	received := way{j, "b", "a", b, a, &st.Received}
	switch {
	case received.deliver(donec):
		sent.run()
	case sent.deliver(donec):
		received.run()
	default:
		go func() {
			defer close(donec)
			received.run()
		}()
		sent.run()
	}
	<-donec
	st.Times.add(a)
	st.Times.add(b)
	return j.end()
}

// way is one direction of a pair.
type way struct {
	j        *joint
	from, to string
	src, dst Conn
	n        *atomic.Uint64
}

// run copies to the way's end.
func (w *way) run() { w.ended(copyConn(w.src, w.dst, w.n)) }

// deliver lets src copy by itself, if it can, and closes donec at the end.
func (w *way) deliver(donec chan<- struct{}) bool {
	d, ok := w.src.(deliverer)
	return ok && d.DeliverTo(w.dst, w.n, func(readErr, writeErr error) {
		w.ended(readErr, writeErr)
		close(donec)
	})
}

// ended tells the other side how the way ended.
func (w *way) ended(readErr, writeErr error) {
	if readErr == nil && writeErr == nil {
		if err := w.dst.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) { // gone already: nothing is lost
			writeErr = err
		}
	}
	switch {
	case readErr != nil:
		w.j.cut(&Error{Side: w.from, Op: "read", Err: readErr})
	case writeErr != nil:
		w.j.cut(&Error{Side: w.to, Op: "write", Err: writeErr})
	}
}

// linger sets what a close means to a socket's peer: 0 is RST, and -1 the default, FIN behind what was written. While a
// pair is joined it is RST: the kernel closes a dead process's sockets, and FIN would make a stream that was cut short
// look whole. Half-closes are shutdown(2), which lingering does not change.
func linger(c Conn, sec int) {
	if c, ok := c.(*net.TCPConn); ok {
		_ = c.SetLinger(sec) // a socket that is gone already has had its end
	}
}

// Reset ends c so that its peer reads a reset, not an end of file.
func Reset(c Conn) {
	switch c := c.(type) {
	case Resetter:
		_ = c.Reset() // it is gone either way
	case *net.TCPConn:
		_ = sockopt.Reset(c)
	default:
		_ = c.Close()
	}
}
