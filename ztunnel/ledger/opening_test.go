package ledger

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// A pod that opens more connections than its share waits for its own to be open; another one does not.
func TestOpenings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(limits(8))
		a, b := l.Pod("a"), l.Pod("b")
		var open []*Opening
		for range 6 { // its half share of 2, and the 4 that may be lent
			o, err := a.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, o)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := a.Open(ctx); err == nil {
			t.Error("more than its share at once")
		}
		o, err := b.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		Opened(o.With(t.Context()))
		o.Done()
		if n := b.InUse(Openings); n != 0 {
			t.Errorf("%d openings after the only one is open", n)
		}
		open[0].Done()
		if n := a.InUse(Openings); n != 5 {
			t.Errorf("%d openings under way, want 5", n)
		}
		time.Sleep(openingTime) // who waits that long waits for others
		synctest.Wait()
		if n := a.InUse(Openings); n != 0 {
			t.Errorf("%d openings, want those that wait not counted", n)
		}
		for _, o := range open {
			o.Done()
		}
		if n := a.InUse(Openings); n != 0 {
			t.Errorf("given back twice: %d", n)
		}
	})
}

func TestNoOpening(t *testing.T) {
	var a *Account
	o, err := a.Open(t.Context())
	if o != nil || err != nil {
		t.Errorf("a nil account: %v, %v", o, err)
	}
	o.Done()
	Opened(o.With(t.Context()))
}
