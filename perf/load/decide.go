package load

import (
	"cmp"
	"io"
	"slices"
	"sync"
	"time"
)

// Decision is whether a connection was served, and when it began.
type Decision struct {
	At     time.Time `json:"at"`
	Served bool      `json:"served"`
}

// decisions gathers them.
type decisions struct {
	mu   sync.Mutex
	seen []Decision // guarded by mu
}

// decide connects at fixed times and tells which connections were served. That one
// is not is no error here: a policy may say so.
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
		r.decided.mu.Lock()
		r.decided.seen = append(r.decided.seen, Decision{at, err == nil})
		r.decided.mu.Unlock()
		r.done(w, monotonic()-began, true)
	}
	return nil
}

// changes keeps the first decision and those that differ from the one before.
func (d *decisions) changes() (out []Decision) {
	d.mu.Lock()
	defer d.mu.Unlock()
	slices.SortFunc(d.seen, func(a, b Decision) int { return cmp.Compare(a.At.UnixNano(), b.At.UnixNano()) })
	for i, x := range d.seen {
		if i == 0 || x.Served != d.seen[i-1].Served {
			out = append(out, x)
		}
	}
	return out
}

// Delays is how long each toggle took until the first connection that began later
// was decided by it. One that nothing was decided by before the next is false.
func Delays(toggles []Toggle, seen []Decision) (h Histogram, missed int) {
	for i, t := range toggles {
		k := slices.IndexFunc(seen, func(d Decision) bool { return d.At.After(t.At) && d.Served == t.Allowed })
		if k < 0 || i+1 < len(toggles) && seen[k].At.After(toggles[i+1].At) {
			missed++
			continue
		}
		h.Add(int64(seen[k].At.Sub(t.At)))
	}
	return h, missed
}
