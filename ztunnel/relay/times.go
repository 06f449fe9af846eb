package relay

import (
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
	if s, ok := sockopt.SocketOf(c); ok {
		info, _ = sockopt.Info(s) // a socket that is gone has nothing to tell
	} else if t, ok := c.(interface {
		TCPInfo() (sockopt.TCPInfo, bool)
	}); ok {
		info, _ = t.TCPInfo()
	}
	return info
}
