// Package relay joins two byte streams until both directions have ended.
//
//	a ──copy──► b     end of input: CloseWrite on the other side (half-close)
//	a ◄──copy── b     reset: Reset on the other side
//
// A direction that is used has a goroutine, unless it comes from a tunnel for a socket: the tunnel delivers it. While it
// waits it holds neither buffer nor pipe: it waits for readability first and borrows then. One that has been silent for
// a while is parked: it has no goroutine either, and a readable socket brings it back (park.go). Bytes are counted while
// they move.
//
// The package decides nothing: no timeouts, no policy, no logging.
package relay

import (
	"context"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// Conn is one side: *net.TCPConn, *netns.Conn, *hbone.Stream and memnet's connections are.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Resetter is a side that can end with a reset rather than an orderly close.
type Resetter interface{ Reset() error }

// Stats counts what has been relayed so far; any goroutine may read it while they are joined.
type Stats struct {
	Sent     atomic.Uint64 // from a to b
	Received atomic.Uint64 // from b to a
	Times    Times         // once the pair has ended
	Untimed  bool          // before Start is called: nobody will read what Times says of sockets
}

// sender is a side that takes its input straight from a socket, placing it where its frames want it.
type sender interface {
	RelayFrom(src io.Reader, n *atomic.Uint64) (readErr, writeErr error)
}

// receiver is a side that gives its buffers straight to the other side's Write.
type receiver interface {
	RelayTo(dst io.Writer, n *atomic.Uint64) (readErr, writeErr error)
}

// Error says which side failed, and whether reading from it or writing to it.
type Error struct {
	Side string // "a" or "b"
	Op   string // "read" or "write"
	Err  error
}

func (e *Error) Error() string { return "relay: " + e.Op + " " + e.Side + ": " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// deliverer is a side that writes what it receives to a socket by itself, without a goroutine of ours. done may be
// called by anybody, also before DeliverTo returns; false: dst is none that it can write.
type deliverer interface {
	DeliverTo(dst net.Conn, n *atomic.Uint64, done func(readErr, writeErr error)) bool
}

// Start copies both ways until both have ended, and closes a and b. Then it calls done, once and from any goroutine: with
// nil when both sides ended in order, with context.Cause(ctx) when ctx cut them, and otherwise with the first error.
//
// Start borrows the caller's goroutine while the pair is busy, so that who opened it need not hand it over: it returns
// when that is no longer of use, before done is called or after.
func Start(ctx context.Context, a, b Conn, st *Stats, done func(error)) {
	StartAfter(ctx, nil, a, b, st, done)
}

// StartAfter is Start where something of a's was read before: first writes it to b, once, before anything else goes there.
// It may wait for b like any write, while the other direction runs, and is called whatever becomes of the pair.
func StartAfter(ctx context.Context, first io.WriterTo, a, b Conn, st *Stats, done func(error)) {
	if st == nil {
		st = new(Stats)
	}
	st.Times.Began = time.Now()
	j := &joint{a: a, b: b, st: st, done: done, first: first}
	j.sent.j, j.received.j, j.received.back = j, j, true
	j.left.Store(2)
	linger(a, 0)
	linger(b, 0)
	j.stop = context.AfterFunc(ctx, func() { j.cut(context.Cause(ctx)) })
	switch {
	case j.received.deliver():
		j.sent.run()
	case first == nil && j.sent.deliver():
		j.received.run()
	default:
		go j.received.run()
		j.sent.run()
	}
}

// Join is Start that returns when done would be called, with its error.
func Join(ctx context.Context, a, b Conn, st *Stats) error {
	errc := make(chan error, 1)
	Start(ctx, a, b, st, func(err error) { errc <- err })
	return <-errc
}

// linger sets what a close means to a socket's peer: 0 is RST, and -1 the default, FIN behind what was written. While a
// pair is joined it is RST: the kernel closes a dead process's sockets, and FIN would make a stream that was cut short
// look whole. Half-closes are shutdown(2), which lingering does not change.
func linger(c Conn, sec int) {
	if c, ok := sockopt.SocketOf(c); ok {
		_ = c.SetLinger(sec) // a socket that is gone already has had its end
	}
}

// farewell makes c's close an orderly one. What has ended already no close can reset.
func farewell(c Conn, info sockopt.TCPInfo) {
	if !info.Ended {
		linger(c, -1)
	}
}

// closeWrite tells c that nothing more comes.
func closeWrite(c Conn) error {
	if c, ok := sockopt.SocketOf(c); ok {
		return sockopt.CloseWrite(c)
	}
	return c.CloseWrite()
}

// Reset ends c so that its peer reads a reset, not an end of file.
func Reset(c Conn) {
	if r, ok := c.(Resetter); ok {
		_ = r.Reset() // it is gone either way
	} else if s, ok := sockopt.SocketOf(c); ok {
		_ = sockopt.Reset(s)
	} else {
		_ = c.Close()
	}
}
