package relay

import "sync"

// joint is the state that both directions share: whether and why the pair was cut.
type joint struct {
	a, b Conn

	mu    sync.Mutex
	cause error // guarded by mu; the first one counts
	cutc  bool
}

// cut resets both sides, once. Whichever direction still blocks returns with an error that nobody looks at.
func (j *joint) cut(cause error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.cutc {
		return
	}
	j.cutc, j.cause = true, cause
	reset(j.a)
	reset(j.b)
}

// end closes what is still open and returns the first cause.
func (j *joint) end() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.cutc {
		j.cutc = true
		_ = j.a.Close() // both directions have ended: nothing can be lost
		_ = j.b.Close()
	}
	return j.cause
}
