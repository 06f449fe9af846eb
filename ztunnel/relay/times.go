package relay

import (
	"net"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// Times is where a pair's life went. It is complete when the pair has ended, and not to be read before. Nothing is measured
// on a path that moves bytes: tunnels look at a clock when they wait, sockets are asked once, at the end.
type Times struct {
	Began time.Time // when Start was called
	// A and B are what the sides' sockets met, of tunnels since the stream was opened. RwndLimited is how long the
	// side had not read what was there for it.
	A, B sockopt.TCPInfo
	// Writes to a tunnel waited so long for the stream's window (who the bytes are for does not read), for the
	// tunnel's window and for its queue.
	Stream, Tunnel, Queue time.Duration
}

// add takes what tunnels have waited. Both directions must have ended.
func (t *Times) add(c Conn) {
	w, ok := c.(interface {
		Waits() (stream, tunnel, queue time.Duration)
	})
	if !ok {
		return
	}
	stream, tunnel, queue := w.Waits()
	t.Stream += stream
	t.Tunnel += tunnel
	t.Queue += queue
}

// infoOf is zero for what is no socket.
func infoOf(c Conn) (info sockopt.TCPInfo) {
	switch c := c.(type) {
	case *net.TCPConn:
		info, _ = sockopt.Info(c) // a socket that is gone has nothing to tell
	case interface {
		TCPInfo() (sockopt.TCPInfo, bool)
	}:
		info, _ = c.TCPInfo()
	}
	return info
}
