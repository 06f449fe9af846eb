package outbound

import (
	"fmt"
	"io"
	"sync"

	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// early is what the application has said by the time its connection is opened: clients that speak first have, and
// nobody waits for the others. It may go along with the request for a tunnel. Whatever of it has not, when a way is
// open, goes there before anything else.
type early struct {
	down sockopt.Socket
	buf  *[hbone.EarlyLimit]byte // nil: not looked yet
	n    int
	err  error // of reading, which is not told twice
}

var earlyBufs = sync.Pool{New: func() any { return new([hbone.EarlyLimit]byte) }}

// bytes reads what is there, once: the same bytes each time.
func (e *early) bytes() []byte {
	if e.buf == nil {
		e.buf = earlyBufs.Get().(*[hbone.EarlyLimit]byte)
		e.n, e.err = sockopt.ReadNow(e.down, e.buf[:])
	}
	return e.buf[:e.n]
}

// rest takes what was read away from e: of that, what has not gone early is for the way that is open now, before anything
// else. An error says that the application is gone.
func (e *early) rest(c *flow.Conn, sent int) (*rest, error) {
	if e == nil || e.buf == nil {
		return nil, nil
	}
	if e.err != nil {
		e.forget()
		return nil, flow.Failed(flow.ReasonClientGone, fmt.Errorf("read what the application said first: %w", e.err))
	}
	c.Stats.Sent.Add(uint64(sent))
	if sent == e.n {
		e.forget()
		return nil, nil
	}
	r := &rest{buf: e.buf, lo: sent, hi: e.n}
	e.buf, e.n = nil, 0
	return r, nil
}

// forget lets go of what was read.
func (e *early) forget() {
	if e != nil && e.buf != nil {
		earlyBufs.Put(e.buf)
		e.buf, e.n = nil, 0
	}
}

// rest is what is left of the first bytes. Writing it may take as long as any upload: a tunnel's window may be used up by
// streams that stand still.
type rest struct {
	buf    *[hbone.EarlyLimit]byte
	lo, hi int
}

// WriteTo writes it, once.
func (r *rest) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(r.buf[r.lo:r.hi])
	r.forget()
	return int64(n), err
}

func (r *rest) forget() {
	if r != nil {
		earlyBufs.Put(r.buf)
		r.buf = nil
	}
}
