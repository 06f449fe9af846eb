package pace

import "time"

// What decides is how many goroutines wait for a processor on average (by Little's
// law the time they waited, all together, per time that passed). Where that was
// below a quarter, one processor was the better by 10 to 30 %, and where it was
// above two, two processors were, whatever CPU time the machine left the process.
// CPU time is looked at as well, because the sockets of goroutines that a full
// processor has not come to polling do not count as waiting.
const (
	quantum = 10 * time.Millisecond // of CPU time per processor from one look to the next

	// More processors are taken when this is reached per processor, by an average
	// of which the last look is half: one hiccup does not count, a flood does at once.
	crowded = 1.25 // goroutines waiting
	full    = 0.92 // CPUs used

	// Half of the processors are given back when less than this, per processor that
	// stays, was used in a time: at least hold, and longer each time that a load which
	// had not gone away wanted them back.
	roomy   = 0.4
	light   = 0.8
	asleep  = 0.1
	hold    = 2 * time.Second
	maxHold = 16 * time.Second
)

// look is what the process had used at a moment.
type look struct {
	at     time.Time
	cpu    time.Duration // of all its threads
	waited time.Duration // of all goroutines together, from runnable to running
}

// use is what it used between two looks, per time that passed.
type use struct{ busy, waiting float64 }

func between(a, b look) use {
	wall := float64(b.at.Sub(a.at))
	if wall <= 0 {
		return use{}
	}
	return use{float64(b.cpu-a.cpu) / wall, float64(b.waited-a.waited) / wall}
}

// control decides. It does no I/O and reads no clock.
type control struct {
	limit, procs int

	last    look
	recent  use           // weighted average since the number changed
	since   look          // of the time in which half would have done
	hold    time.Duration // how long that must be
	fell    time.Time     // when some were given back under load
	settled bool          // recent is known
}

func (c *control) begin(procs int, l look) {
	c.procs, c.hold, c.last, c.since = procs, hold, l, l
}

// quantum is the CPU time after which to look again.
func (c *control) quantum() time.Duration { return time.Duration(c.procs) * quantum }

// decide sets procs by the next look, and returns the use that it went by.
func (c *control) decide(l look) use {
	u := between(c.last, l)
	c.last = l
	if c.settled {
		u = use{(c.recent.busy + u.busy) / 2, (c.recent.waiting + u.waiting) / 2}
	} else {
		u = use{u.busy / 2, u.waiting / 2} // as after a time of nothing
	}
	c.recent, c.settled = u, true
	n := float64(c.procs)
	switch {
	case u.waiting < crowded*n && u.busy < full*n:
		c.fall(l)
	case c.procs < c.limit:
		c.rise(l)
	default:
		c.since = l
	}
	return u
}

func (c *control) rise(l look) {
	if c.fell.IsZero() || l.at.Sub(c.fell) > 2*c.hold {
		c.hold = hold
	} else {
		c.hold = min(2*c.hold, maxHold)
	}
	c.change(min(2*c.procs, c.limit), l)
}

func (c *control) fall(l look) {
	if c.procs == 1 || l.at.Sub(c.since.at) < c.hold {
		return
	}
	u, half := between(c.since, l), (c.procs+1)/2
	if n := float64(half); u.waiting >= roomy*n || u.busy >= light*n {
		c.since = l
		return
	}
	if c.fell = l.at; u.busy < asleep {
		c.fell = time.Time{}
	}
	c.change(half, l)
}

func (c *control) change(procs int, l look) {
	c.procs, c.since, c.recent, c.settled = procs, l, use{}, false
}
