package hbone

import (
	"context"
	"os"
	"time"
)

// A pod that is deleted in order takes leave of its tunnels. One whose network just vanishes does not: TCP goes on
// sending to it for as long as it takes keepalive to see, which live streams may need, as a network may recover. New
// connections need not wait as long where there is somewhere else to go. There are two signs:
//
//   - the control plane has taken the peer away (Dialer.Gone);
//   - the peer's proxy answers nothing at all, not even a PING, for silentTicks. It is the proxy that is asked: an
//     application that is slow to accept does not make its proxy silent, and is waited for as before. Hence a limit
//     on the CONNECT alone, which cannot tell the two, would be no good.
//
// Either way the peer may have had the CONNECT. Its application has then seen a connection that was opened and, as
// RST_STREAM follows in the same TCP stream, reset without a byte; what it may have said first nobody has read. That
// is what any client that gives up connecting does, so the connection may be tried elsewhere. Where bytes went along
// with the CONNECT that does not hold (early.go): then it fails as soon as it would be tried elsewhere for silence, and
// its application, which knows what it has said, may ask again.
//
// A peer may be silent from the beginning: whoever waits for the TCP connection of a tunnel turns elsewhere as early.
const (
	answerTick  = time.Second // how often a waiting CONNECT looks for signs of life
	silentTicks = 3           // without one: the first is for the answer, the others for that to PING

	// Silence is how long a peer may say nothing where there is somebody else to turn to.
	Silence = silentTicks * answerTick
)

func (r *ConnectRequest) elsewhere() bool { return r.Elsewhere != nil && r.Elsewhere() }

// awaitAnswer returns nil when the CONNECT has its answer, or there will be none, and otherwise why it is given up.
func (s *Stream) awaitAnswer(ctx context.Context, timeout time.Duration, r ConnectRequest) error {
	t, gonec, left := s.t, s.t.gonec, false
	seen, silent := t.received.Load(), 0
	tick := min(answerTick, timeout)
	timer := time.NewTimer(tick)
	defer timer.Stop()
	for {
		select {
		case <-s.answerc:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-gonec:
			if s.early == 0 && r.elsewhere() {
				return ErrGone
			}
			gonec, left = nil, true // it may answer yet: to leave the mesh is not to be dead
			continue
		case <-timer.C:
		}
		if timeout -= tick; timeout <= 0 {
			return os.ErrDeadlineExceeded
		}
		tick = min(answerTick, timeout)
		timer.Reset(tick)
		if now := t.received.Load(); now != seen {
			seen, silent = now, 0
			continue
		}
		switch silent++; {
		case silent == 1:
			t.askForLife(seen)
		case silent >= silentTicks:
			t.drain() // whoever comes next finds out by dialling
			if left || r.elsewhere() {
				if s.early > 0 {
					return ErrUncertain
				}
				return ErrSilent
			}
		}
	}
}

// askForLife sends a PING, once however many CONNECTs wait, until something was received.
func (t *tunnel) askForLife(received uint64) {
	if t.asked.Swap(received+1) == received+1 {
		return
	}
	t.pingAt.Store(t.clock().UnixNano())
	t.w.sendControl(appendPing(nil, 0, lifePing))
}

// Gone tells that those at the addresses of matching keys have left. Their tunnels take no new streams, and CONNECTs
// that wait for them, or for a tunnel to them, turn elsewhere if they can. Open streams go on: of a pod that ends in
// order they are its last work, and of one that does not, keepalive ends them.
func (d *Dialer) Gone(match func(Key) bool) {
	for _, set := range d.matching(match) {
		for _, t := range set.take(ErrGone) {
			t.leave()
		}
	}
}

func (t *tunnel) leave() {
	t.mu.Lock()
	first := !t.gone
	t.gone = true
	t.mu.Unlock()
	if first {
		close(t.gonec)
	}
	t.drain()
}

func (t *tunnel) isGone() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.gone
}
