package relay

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// copyConn moves bytes from src to dst until src ends. An error of dst is a *writeError.
func copyConn(src, dst Conn, n *atomic.Uint64) error {
	if r, ok := src.(receiver); ok {
		return r.RelayTo(writer{dst}, n)
	}
	if s, ok := dst.(sender); ok {
		return s.RelayFrom(src, n)
	}
	if s, ok := src.(*net.TCPConn); ok {
		if d, ok := dst.(*net.TCPConn); ok {
			return spliceConn(s, d, n)
		}
	}
	return copyBuffered(src, dst, n)
}

// writer marks the errors of the destination.
type writer struct{ Conn }

func (w writer) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	if err != nil {
		err = &writeError{err}
	}
	return n, err
}

// buffers hold what is on its way between two sides that know no better.
var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// copyBuffered serves connections that cannot be waited for without a buffer: tests and tunnels in tunnels.
func copyBuffered(src io.Reader, dst io.Writer, n *atomic.Uint64) error {
	buf := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buf)
	for {
		k, err := src.Read(buf[:])
		if k > 0 {
			if _, werr := dst.Write(buf[:k]); werr != nil {
				return &writeError{werr}
			}
			n.Add(uint64(k))
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
