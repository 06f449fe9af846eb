package pace

import "time"

// What decides is whether a processor is full, and how many goroutines wait for one
// on average (by Little's law the time they waited, all together, per time that
// passed). A dozen that wait are no harm: they are what one turn of the poller
// brought, and what they have to say leaves together. With 16 and 64 connections
// that ask, or 16 uploads, 0.5 to 4 wait for one processor, where connections come
// and go 6 to 11, and on a machine that others use as well a second processor took
// up to a third of the rate or gained nothing. Many that wait are looked at because
// the process may not get what would fill a processor.
//
// A look is a signal, a thread that is woken for it, and what the kernel's scheduler
// makes of one thread more. A hundred in a second of CPU time cost a fifth of all
// requests, so they are rare where nothing is about to change.
const (
	quantum = 10 * time.Millisecond  // of CPU time per processor from one look to the next, at least
	calm    = 400 * time.Millisecond // from one to the next while far from a change, about

	// More processors are taken when one of these is reached, by an average of which
	// the last look is half: one hiccup does not count, a flood does at once.
	crowded = 16   // goroutines waiting
	full    = 0.92 // CPUs used, per processor

	// Half of the processors are given back when less than this was used in a time: at
	// least hold, and longer each time that a load which had not gone away wanted them
	// back.
	roomy   = 6
	light   = 0.95 // per processor that stays; several use more than one would for the same
	asleep  = 0.1
	hold    = 200 * time.Millisecond
	maxHold = 16 * time.Second
	soon    = time.Second // who wants them back by then had not gone away
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
	calm    bool          // recent is far from a change
}

func (c *control) begin(procs int, l look) {
	c.procs, c.hold, c.last, c.since = procs, hold, l, l
}

// quantum is the CPU time after which to look again.
func (c *control) quantum() time.Duration {
	q := time.Duration(c.procs) * quantum
	if c.calm {
		q = max(q, time.Duration(c.recent.busy*float64(calm)))
	}
	return q
}

// decide sets procs by the next look, and returns the use that it went by.
func (c *control) decide(l look) use {
	n := float64(c.procs)
	far := func(u use) bool { return u.waiting < crowded/2 && u.busy < 0.9*full*n }
	u := between(c.last, l)
	c.last, c.calm = l, far(u)
	if c.settled {
		u = use{(c.recent.busy + u.busy) / 2, (c.recent.waiting + u.waiting) / 2}
	} else {
		u = use{u.busy / 2, u.waiting / 2} // as after a time of nothing
	}
	c.recent, c.settled = u, true
	c.calm = c.procs >= c.limit || c.calm && far(u)
	switch {
	case u.waiting < crowded && u.busy < full*n:
		c.fall(l)
	case c.procs < c.limit:
		c.rise(l)
	default:
		c.since = l
	}
	return u
}

func (c *control) rise(l look) {
	if c.fell.IsZero() || l.at.Sub(c.fell) > max(2*c.hold, soon) {
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
	if u.waiting >= roomy || u.busy >= light*float64(half) {
		c.since = l
		return
	}
	if c.fell = l.at; u.busy < asleep {
		c.fell = time.Time{}
	}
	c.change(half, l)
}

func (c *control) change(procs int, l look) {
	c.procs, c.since, c.recent, c.settled, c.calm = procs, l, use{}, false, false
}
