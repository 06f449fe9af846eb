// Package relay joins two byte streams until both directions have ended.
//
//	a ──copy──► b     end of input: CloseWrite on the other side (half-close)
//	a ◄──copy── b     reset: Reset on the other side
//
// One goroutine per direction, one of them the caller's. While a direction is idle it holds neither buffer nor pipe: it
// waits for readability first and borrows then. Bytes are counted while they move.
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
	go func() {
		defer close(donec)
		j.direction("b", "a", b, a, &st.Received)
	}()
	j.direction("a", "b", a, b, &st.Sent)
	<-donec
	st.Times.add(a)
	st.Times.add(b)
	return j.end()
}

// direction runs one way to its end and tells the other side how it ended.
func (j *joint) direction(from, to string, src, dst Conn, n *atomic.Uint64) {
	readErr, writeErr := copyConn(src, dst, n)
	if readErr == nil && writeErr == nil {
		if err := dst.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) { // gone already: nothing is lost
			writeErr = err
		}
	}
	switch {
	case readErr != nil:
		j.cut(&Error{Side: from, Op: "read", Err: readErr})
	case writeErr != nil:
		j.cut(&Error{Side: to, Op: "write", Err: writeErr})
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
