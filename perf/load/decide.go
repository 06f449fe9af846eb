package load

import (
	"cmp"
	"errors"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Decision is whether a connection was served or refused, and when it began.
type Decision struct {
	At     time.Time `json:"at"`
	Served bool      `json:"served"`
	Run    int       `json:"run,omitempty"` // how many in a row are like this one

	Took time.Duration `json:"took,omitempty"` // until it was decided
}

// decisions gathers them.
type decisions struct {
	mu   sync.Mutex
	seen []Decision // guarded by mu
}

// decide connects at fixed times and tells which connections were served. That one
// is refused is no error here: a policy may say so. Whatever else fails is one, and
// no decision: a timeout would pass for a policy that took effect at once.
func (r *run) decide(w *worker, _ int) error {
	defer r.pin()()
	first, b := open(verbAnswer, r.Size), make([]byte, r.Size)
	for !r.ended.Load() {
		if _, err := r.turn(w); err != nil {
			return err
		}
		began, at := monotonic(), time.Now()
		c, err := r.dial(first)
		if err == nil {
			_, err = io.ReadFull(c, b)
			r.close(c)
		}
		if r.ended.Load() {
			return nil // which is why it failed, where it did
		}
		if err != nil && !refused(err) {
			r.fault(err)
			continue
		}
		r.decided.mu.Lock()
		r.decided.seen = append(r.decided.seen, Decision{At: at, Served: err == nil, Took: monotonic() - began})
		r.decided.mu.Unlock()
		r.done(w, monotonic()-began, true)
	}
	return nil
}

// refused says whether a connection ended as a proxy ends those that it must not
// serve: closed or reset after it was accepted, which connect may see already. A
// connection that nobody accepts (ECONNREFUSED), and one that nobody answers, were
// not decided by anybody.
func refused(err error) bool {
	for _, e := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// changes keeps the first decision and those that differ from the one before.
func (d *decisions) changes() (out []Decision) {
	d.mu.Lock()
	defer d.mu.Unlock()
	slices.SortFunc(d.seen, func(a, b Decision) int { return cmp.Compare(a.At.UnixNano(), b.At.UnixNano()) })
	for i, x := range d.seen {
		if i == 0 || x.Served != d.seen[i-1].Served {
			x.Run = 1
			out = append(out, x)
		} else {
			out[len(out)-1].Run++
		}
	}
	return out
}

// Effect is what became of the changes of a policy.
type Effect struct {
	Delays  Histogram // until the first connection that began later was decided by it
	Missed  int       // changes that nothing was decided by before the next
	Against int       // connections decided by the change before, after the first that was decided by this one
}

// EffectOf tells by decisions, the first of each kind in a row, seen until some
// time, what became of changes. Of the last, which nothing ended, less than the time
// between two of them may have been seen: then it is not counted as missed.
func EffectOf(toggles []Toggle, seen []Decision, until time.Time) (e Effect) {
	for i, t := range toggles {
		end, last := until, i+1 == len(toggles)
		if !last {
			end = toggles[i+1].At
		}
		k := slices.IndexFunc(seen, func(d Decision) bool { return d.At.After(t.At) && d.Served == t.Allowed })
		if k < 0 || seen[k].At.After(end) {
			if !last || i > 0 && until.Sub(t.At) >= t.At.Sub(toggles[i-1].At) {
				e.Missed++
			}
			continue
		}
		e.Delays.Add(int64(seen[k].At.Sub(t.At)))
		// One that began before the first was decided may have been decided before it.
		decided := seen[k].At.Add(seen[k].Took)
		for _, d := range seen[k+1:] {
			if d.Served != t.Allowed && d.At.After(decided) && d.At.Before(end) {
				e.Against += d.Run
			}
		}
	}
	return e
}
