package hbone

import "time"

// The first bytes of an application may leave in the same record as the CONNECT that they belong to: a packet and a
// wake-up of the far side less, and an answer that is a round trip between the proxies earlier. HTTP/2 lets a client
// send before it has the answer (https://www.rfc-editor.org/rfc/rfc9113#section-8.5 forbids other frames only), and a
// server that refuses has opened nothing to which they could go.
//
// What it costs is the right to try again: once the peer may have passed bytes on, only its own word that it has not
// (REFUSED_STREAM, GOAWAY, an error status) lets them be sent to anybody else. A tunnel that ends, or falls silent,
// under such a request ends it. Therefore bytes go early only into tunnels that were heard of a moment ago, and not into
// those that may have died unnoticed.
const (
	// EarlyLimit is how many bytes go early at most: a question, not a file.
	EarlyLimit = 2 << 10
	// earlyFresh is how long ago the tunnel's peer may have been heard of.
	earlyFresh = 10 * time.Millisecond
)

// early asks for the bytes that may go along, if t is a tunnel for them.
func (r *ConnectRequest) early(t *tunnel) []byte {
	if r.Early == nil || t.clock().UnixNano()-t.heardAt.Load() > int64(earlyFresh) {
		return nil
	}
	return r.Early()
}

// packEarlyLocked queues what the windows allow of p behind the CONNECT, where the queue takes a small write: the rest goes
// like any upload.
func (s *Stream) packEarlyLocked(p []byte) {
	w := s.t.w
	n := int(min(int64(len(p)), int64(EarlyLimit), s.sendWindow, w.window))
	if n <= 0 || !w.admitsLocked(s, n) {
		return
	}
	s.sendWindow -= int64(n)
	w.window -= int64(n)
	s.early = int32(n)
	w.packDataLocked(s.id, p[:n], 0)
	s.speak()
	s.talking.Store(true)
}

// company is how it went for frames of a tunnel that waited for others to leave with: answers to CONNECTs for what their
// applications say, and farewells. Where nothing left in time, waiting has cost time and saved nothing: an application was
// slow, or its client has more to say before there is an answer, which its proxy does not send before it has ours; or a
// server reads to the end of one connection before it accepts the next. Then the next ones leave at once, and twice as
// many each time. The writer's lock guards it.
type company struct {
	since time.Time // when a frame in the queue began to wait; zero: none does
	need  int       // how many in a row have to have waited for nothing
	vain  int       // how many have
	alone int       // how many left at once after the last one that had waited for nothing
	pass  int       // of those, how many are still to come
}

const (
	// aloneLeast and aloneMost bound them: one frame in so many is late for nothing.
	aloneLeast = 16
	aloneMost  = 1024
	// answersNeed and farewellsNeed: somebody waits behind an answer, and seldom behind a farewell, of which one that is late
	// among many that had company says little.
	answersNeed   = 1
	farewellsNeed = 4
)

// awaited reports whether a frame is to wait.
func (c *company) awaited() bool {
	if c.pass > 0 {
		c.pass--
		return false
	}
	if c.since.IsZero() {
		c.since = time.Now()
	}
	return true
}

// came is told that the queue leaves.
func (c *company) came() {
	if !c.since.IsZero() {
		c.since, c.vain, c.alone = time.Time{}, 0, 0
	}
}

// missed is told that the queue leaves because its time is up. A frame that had little of it says nothing.
func (c *company) missed() {
	if c.since.IsZero() || time.Since(c.since) < lateLimit/2 {
		c.since = time.Time{}
		return
	}
	c.since = time.Time{}
	if c.vain = min(c.vain+1, c.need); c.vain == c.need {
		c.alone = min(max(2*c.alone, aloneLeast), aloneMost)
		c.pass = c.alone
	}
}
