// Package reclaim keeps the process's memory in proportion: below the limit of its container, and given back to the
// kernel when a load has gone.
//
// The runtime collects when the heap has grown, and keeps what a load has needed until then for the next one; an idle
// proxy grows no heap. So when no collection has happened for a while, and there is something to be had, one is made
// whose gain goes back to the kernel:
//
//	collection ──► quiet for Quiet? ──► worth it? ──► collect, return ──┐
//	     ▲                                  └ no: nothing until the next │
//	     └───────────────────────────────────────────────────────────────┘
//
// Somebody who knows that he left much behind says so, and it is given back a second after.
//
// What one such collection could not return, because it lies between what is in use, is not asked for again.
//
// Each collection tells of itself, so nothing looks periodically, and a busy proxy, which collects all the time, is left
// alone.
//
// Run owns everything.
package reclaim

import (
	"context"
	"log/slog"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// Quiet is how long no collection has happened where nothing goes on.
	Quiet = 30 * time.Second
	// Over is how long none has happened when something is over that left much behind.
	Over = time.Second
	// worth is the least that a collection is made for, besides a share of all that is held.
	worth      = 2 << 20
	worthShare = 16
)

// Reclaimer gives memory back while the process is idle.
type Reclaimer struct {
	log       *slog.Logger
	collected chan struct{} // holds one
	left      chan struct{} // holds one
	machine   machine
}

// machine is the runtime as a Reclaimer sees it.
type machine struct {
	watch   func(ctx context.Context) // tells collected of each collection
	look    func() memory
	release func()
}

// memory is what the process holds, and what of it a collection could give back at most.
type memory struct{ held, gain uint64 }

// New returns a Reclaimer that does nothing before Run.
func New(log *slog.Logger) *Reclaimer {
	r := &Reclaimer{log: log, collected: make(chan struct{}, 1), left: make(chan struct{}, 1)}
	r.machine = machine{watch: r.watch, look: newLooker(), release: debug.FreeOSMemory}
	return r
}

// Left says that something left much behind that may not come again soon, so that it is given back as soon as nothing
// else goes on.
func (r *Reclaimer) Left() {
	select {
	case r.left <- struct{}{}:
	default: // one is as good as many
	}
}

// Run gives back what is not needed until ctx ends.
func (r *Reclaimer) Run(ctx context.Context) error {
	r.machine.watch(ctx)
	timer := time.NewTimer(Quiet) // starting has left something, too
	defer timer.Stop()
	var stays uint64 // of what seemed to be had: it lies between what is in use
	quiet := Quiet
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.left:
			quiet = Over
			timer.Reset(quiet)
		case <-r.collected:
			timer.Reset(quiet)
		case <-timer.C:
			quiet = Quiet
			m := r.machine.look()
			stays = min(stays, m.gain)
			if gain := m.gain - stays; gain < worth || gain < m.held/worthShare {
				continue
			}
			r.machine.release()
			after := r.machine.look()
			stays = after.gain
			r.log.Debug("memory given back", "held_before", m.held, "held", after.held)
		}
	}
}

// watch tells of each collection: an object that nothing refers to has gone with it, and leaves another.
func (r *Reclaimer) watch(ctx context.Context) {
	sentinel := new([16]byte) // as large as the runtime does not put together with others
	runtime.AddCleanup(sentinel, func(*Reclaimer) {
		select {
		case r.collected <- struct{}{}:
		default: // one is as good as many
		}
		if ctx.Err() == nil {
			r.watch(ctx)
		}
	}, r)
}

// newLooker reads the runtime's books.
func newLooker() func() memory {
	samples := []metrics.Sample{
		{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/gc/heap/live:bytes"},
	}
	return func() memory {
		metrics.Read(samples)
		v := func(i int) uint64 { return samples[i].Value.Uint64() }
		return memory{held: v(0) - v(1), gain: v(2) + v(3) + v(4) - min(v(4), v(5))} // what came since the last collection may all be garbage
	}
}
