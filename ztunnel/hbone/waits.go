package hbone

import (
	"net"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// waits is for how long a stream's sender had data and could not send it, by what it lacked. Only who waits looks at a
// clock.
type waits struct {
	stream time.Duration // the stream's window: whoever the bytes are for does not read
	tunnel time.Duration // the tunnel's window: the other end of the tunnel has taken more than it lets go of
	queue  time.Duration // the tunnel's queue: other streams are before it, or the transport takes no more
}

// waitLocked waits on sendCond and accounts for how long, and for want of what.
func (s *Stream) waitLocked() {
	w, why := s.t.w, &s.waits.queue
	switch {
	case s.sendWindow <= 0:
		why = &s.waits.stream
	case w.window <= 0:
		why = &s.waits.tunnel
	}
	since := time.Now()
	s.sendCond.Wait()
	*why += time.Since(since)
}

// Waits is for how long writes to the stream have waited for its own window, for the tunnel's, and for the tunnel's
// queue.
func (s *Stream) Waits() (stream, tunnel, queue time.Duration) {
	s.t.w.mu.Lock()
	defer s.t.w.mu.Unlock()
	return s.waits.stream, s.waits.tunnel, s.waits.queue
}

// TCPInfo is what the tunnel's socket met since the stream was opened, all streams together; false when the tunnel does
// not stand on a TCP socket of this host.
func (s *Stream) TCPInfo() (sockopt.TCPInfo, bool) {
	now, ok := s.t.info.read(s.t.conn)
	return now.Since(s.infoAt), ok
}

// infoAge is how old a look at the tunnel's socket may be: streams come and go faster than there is anything to see.
const infoAge = 100 * time.Millisecond

// socketInfo is the latest look at a tunnel's socket.
type socketInfo struct {
	met *metrics // immutable; nil: none

	mu     sync.Mutex
	at     time.Time       // guarded by mu, as are all below
	latest sockopt.TCPInfo // stays after the socket is gone
	ok     bool
}

func (i *socketInfo) read(c net.Conn) (sockopt.TCPInfo, bool) {
	tcp, ok := sockopt.SocketOf(c)
	if !ok {
		return sockopt.TCPInfo{}, false
	}
	now := time.Now()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.at.IsZero() || now.Sub(i.at) > infoAge {
		i.at = now
		if info, err := sockopt.Info(tcp); err == nil {
			i.met.socket(info.Since(i.latest))
			i.latest, i.ok = info, true
		}
	}
	return i.latest, i.ok
}
