package relay

import (
	"io"
	"sync"
	"sync/atomic"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// copyConn moves bytes from src to dst until src ends. The errors of the two sides are kept apart; both are nil at
// src's orderly end.
func copyConn(src, dst Conn, n *atomic.Uint64) (readErr, writeErr error) {
	if r, ok := src.(receiver); ok {
		return r.RelayTo(dst, n)
	}
	if s, ok := dst.(sender); ok {
		return s.RelayFrom(src, n)
	}
	if s, ok := sockopt.SocketOf(src); ok {
		if d, ok := sockopt.SocketOf(dst); ok {
			return spliceConn(s, d, n)
		}
	}
	return copyBuffered(src, dst, n)
}

// buffers hold what is on its way between two sides that know no better.
var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// copyBuffered serves connections that cannot be waited for without a buffer: tests and tunnels in tunnels.
func copyBuffered(src io.Reader, dst io.Writer, n *atomic.Uint64) (readErr, writeErr error) {
	buf := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buf)
	for {
		k, err := src.Read(buf[:])
		if k > 0 {
			if _, werr := dst.Write(buf[:k]); werr != nil {
				return nil, werr
			}
			n.Add(uint64(k))
		}
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
	}
}
