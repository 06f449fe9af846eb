// Package turn lets others run while much is done in one go: the scheduler by itself would let them wait for ten
// milliseconds.
//
// Whoever works owns its Taker.
package turn

import (
	"runtime"
	"time"
)

const (
	// pieces is how many are done between two looks at the clock.
	pieces = 16
	// slice is how long is worked before others may run.
	slice = 50 * time.Microsecond
	// most is how long others wait at most: what the scheduler grants everybody.
	most = 10 * time.Millisecond
	// share is the part of the others' time that a turn may take. Where all processors are busy, a turn comes when
	// everybody else has had one, and 70,000 workloads are a thousand turns: for minutes nothing new would be in force.
	share = 8
)

// Taker takes turns with the others. The zero value is usable.
type Taker struct {
	yield func() // nil: runtime.Gosched
	done  int
	since time.Time
	long  time.Duration
}

// Next is called after each small piece of work.
func (t *Taker) Next() {
	if t.done++; t.done%pieces != 0 {
		return
	}
	now := time.Now()
	if now.Sub(t.since) < max(t.long, slice) {
		return
	}
	if t.yield != nil {
		t.yield()
	} else {
		runtime.Gosched()
	}
	t.since = time.Now()
	t.long = min(t.since.Sub(now)/share, most)
}
