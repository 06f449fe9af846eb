package relay

import "sync"

// joint is the state that both directions share: whether and why the pair was cut.
type joint struct {
	a, b    Conn
	times   *Times
	untimed bool

	mu    sync.Mutex
	cause error // guarded by mu; the first one counts
	over  bool  // guarded by mu
}

// cut resets both sides, once. Whichever direction still blocks returns with an error that nobody looks at.
func (j *joint) cut(cause error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.over {
		return
	}
	j.over, j.cause = true, cause
	j.measure()
	Reset(j.a)
	Reset(j.b)
}

// end closes what is still open and returns the first cause.
func (j *joint) end() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.over {
		j.over = true
		j.measure()
		linger(j.a, -1)
		linger(j.b, -1)
		_ = j.a.Close() // both directions have ended: nothing can be lost
		_ = j.b.Close()
	}
	return j.cause
}

// measure reads what ends with the sockets. Its caller holds mu.
func (j *joint) measure() {
	if !j.untimed {
		j.times.A, j.times.B = infoOf(j.a), infoOf(j.b)
	}
}
