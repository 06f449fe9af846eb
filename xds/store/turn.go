package store

import "time"

const (
	// turnResources is after how many resources others may run: some tens of microseconds. The scheduler by itself would
	// let them wait for ten milliseconds.
	turnResources = 64
	// turnMost is how long others wait at most: what the scheduler grants everybody.
	turnMost = 10 * time.Millisecond
	// turnShare is the part of the others' time that a turn may take. Where all processors are busy, a turn comes when
	// everybody else has had one, and 70,000 workloads are a thousand turns: for minutes nothing new would be in force.
	turnShare = 8
)

// turn lets others run while much is applied. Its user owns it.
type turn struct {
	yield func()
	since time.Time
	long  time.Duration
}

// next is called after each resource.
func (t *turn) next(i int) {
	if i%turnResources != turnResources-1 {
		return
	}
	now := time.Now()
	if now.Sub(t.since) < t.long {
		return
	}
	t.yield()
	t.since = time.Now()
	t.long = min(t.since.Sub(now)/turnShare, turnMost)
}
