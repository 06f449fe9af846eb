package outbound

import (
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// early is what the application has said by the time its connection is opened: clients that speak first have, and
// nobody waits for the others. It may go along with the request for a tunnel. Whatever of it has not, when a way is
// open, goes there before anything else.
type early struct {
	down *net.TCPConn
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

// restTime bounds the write of what has not gone early. It fits any window and any buffer.
const restTime = 10 * time.Second

// finish sends over up what was read and is not among the sent bytes, and counts both. up is nil where there is no way.
// An error says that up is of no use.
func (e *early) finish(c *flow.Conn, up relay.Conn, sent int) error {
	if e == nil || e.buf == nil {
		return nil
	}
	defer func() {
		earlyBufs.Put(e.buf)
		e.buf, e.n = nil, 0
	}()
	if up == nil {
		return nil
	}
	if e.err != nil {
		return flow.Failed(flow.ReasonClientGone, fmt.Errorf("read what the application said first: %w", e.err))
	}
	if rest := e.buf[sent:e.n]; len(rest) > 0 {
		_ = up.SetWriteDeadline(time.Now().Add(restTime)) // what is gone fails the write
		if _, err := up.Write(rest); err != nil {
			return fmt.Errorf("send what the application said first: %w", err)
		}
		_ = up.SetWriteDeadline(time.Time{})
	}
	c.Stats.Sent.Add(uint64(e.n))
	return nil
}
