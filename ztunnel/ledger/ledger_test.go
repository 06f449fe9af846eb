package ledger

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func limits(n int64) Limits {
	var l Limits
	for r := range l {
		l[r] = n
	}
	return l
}

// One pod takes all that it can get; what is reserved for another is still there, at once, and no more than that.
func TestReserveIsToBeHadAtOnce(t *testing.T) {
	for r := range numResources {
		l := New(limits(100))
		a, b := l.Pod("a"), l.Pod("b")
		if !a.TryAcquire(r, 75) || a.TryAcquire(r, 1) {
			t.Errorf("%s: want its own half share and all that may be lent, 75 of 100, lent to one", r)
		}
		if b.Pressure(r) || !a.Pressure(r) {
			t.Errorf("%s: want pressure on who borrows, and on nobody else", r)
		}
		if !b.TryAcquire(r, 25) || b.TryAcquire(r, 1) {
			t.Errorf("%s: want 25 of 100 for the other", r)
		}
		if a.TryAcquire(r, 1) {
			t.Errorf("%s: more granted than there is", r)
		}
		a.Release(r, 1)
		if !b.TryAcquire(r, 1) {
			t.Errorf("%s: what came back is not granted", r)
		}
	}
}

// A limit that changes counts for what comes: who waits gets what there is now, and nobody loses what it has.
func TestLimitChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(limits(10))
		a, b := l.Pod("a"), l.Pod("b")
		if !a.TryAcquire(Streams, 7) {
			t.Fatal("7 of 10 are not to be had")
		}
		l.SetLimit(Streams, 4)
		if a.InUse(Streams) != 7 || b.TryAcquire(Streams, 1) {
			t.Error("more is granted than there is now")
		}
		a.Release(Streams, 4)
		if !b.TryAcquire(Streams, 1) || b.TryAcquire(Streams, 1) {
			t.Error("of the lower limit one was left")
		}
		donec := make(chan error, 1)
		go func() { donec <- b.Acquire(t.Context(), Streams, 1) }()
		synctest.Wait()
		l.SetLimit(Streams, 20)
		if err := <-donec; err != nil || b.InUse(Streams) != 2 {
			t.Errorf("%v, %d held after the limit was raised", err, b.InUse(Streams))
		}
		l.SetLimit(Streams, 0)
		if !a.TryAcquire(Streams, 1000) {
			t.Error("no limit is one")
		}
	})
}

// A pod that waits for a thousand units gets them in turn with one that waits for a single one.
func TestWaitersOfOnePodDoNotDelayAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(limits(1))
		a, b := l.Pod("a"), l.Pod("b")
		order := make(chan string, 2000)
		want := func(name string, acct *Account) {
			if err := acct.Acquire(t.Context(), Turns, 1); err != nil {
				t.Error(err)
				return
			}
			order <- name
			acct.Release(Turns, 1)
		}
		a.TryAcquire(Turns, 1)
		for range 1000 {
			go want("a", a)
		}
		synctest.Wait()
		for range 10 {
			go want("b", b)
		}
		synctest.Wait()
		a.Release(Turns, 1)
		synctest.Wait()
		for i := range 20 {
			if got, want := <-order, []string{"a", "b"}[i%2]; got != want {
				t.Fatalf("turn %d went to %s, want %s", i, got, want)
			}
		}
		if n := len(order); n != 990 {
			t.Errorf("%d turns left, want 990", n)
		}
	})
}

// New accounts shrink reserves; what was held before stays held, and comes back to those who have less.
func TestAccountsComeAndGo(t *testing.T) {
	l := New(limits(100))
	a := l.Pod("a")
	if !a.TryAcquire(Bytes, 100) {
		t.Fatal("alone, and refused")
	}
	b := l.Pod("b")
	if b.TryAcquire(Bytes, 1) {
		t.Error("more than there is")
	}
	a.Release(Bytes, 30)
	if a.TryAcquire(Bytes, 6) || !a.TryAcquire(Bytes, 5) {
		t.Error("want 75 for the borrower, now that another's 25 are reserved")
	}
	a.Close() // holds 75, and has no reserve any more
	if !b.TryAcquire(Bytes, 25) || b.TryAcquire(Bytes, 1) {
		t.Error("want 25 while a closed account holds 75")
	}
	a.Release(Bytes, 75)
	if !b.TryAcquire(Bytes, 75) {
		t.Error("the last account does not get everything")
	}
	b.Release(Bytes, 100)
	b.Close()
	if p := &l.pools[Bytes]; p.inUse != 0 || p.covered != 0 || p.accounts != 0 {
		t.Errorf("left over: %d in use, %d covered, %d accounts", p.inUse, p.covered, p.accounts)
	}
}

// What comes back goes to who is below its share, however long the borrower has waited.
func TestShareComesBackUnderDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(limits(10))
		a, b := l.Pod("a"), l.Pod("b")
		if !a.TryAcquire(Streams, 8) || !b.TryAcquire(Streams, 2) {
			t.Fatal("refused")
		}
		order := make(chan string, 2)
		take := func(name string, acct *Account) {
			if err := acct.Acquire(t.Context(), Streams, 1); err != nil {
				t.Error(err)
			}
			order <- name
		}
		go take("a", a)
		synctest.Wait()
		go take("b", b)
		synctest.Wait()
		a.Release(Streams, 1)
		synctest.Wait()
		if got := <-order; got != "b" {
			t.Errorf("%s was served first, want b, which is below its share", got)
		}
		a.Release(Streams, 1)
		synctest.Wait()
		if got := <-order; got != "a" {
			t.Errorf("then %s, want a", got)
		}
	})
}

func TestAcquireEndsWithContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(limits(1))
		a, b := l.Pod("a"), l.Pod("b")
		a.TryAcquire(Handshakes, 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := b.Acquire(ctx, Handshakes, 1)
		if ee, ok := errors.AsType[*ExhaustedError](err); !ok || ee.Pod != "b" || ee.Resource != Handshakes || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Acquire: %v", err)
		}
		a.Release(Handshakes, 1)
		if !b.TryAcquire(Handshakes, 1) {
			t.Error("a waiter that gave up is still in the way")
		}
		if err := b.Acquire(t.Context(), Handshakes, 2); err == nil {
			t.Error("more than the limit was granted")
		}
	})
}

func TestAccountsAreCountedByUse(t *testing.T) {
	l := New(limits(10))
	a, again, b := l.Pod("a"), l.Pod("a"), l.Pod("b")
	if a != again {
		t.Error("one pod has two accounts")
	}
	a.Close()
	if l.pools[Streams].accounts != 2 {
		t.Error("account closed while in use")
	}
	again.Close()
	if l.pools[Streams].accounts != 1 {
		t.Error("account not closed")
	}
	b.Close()
	b.Close()
	if l.pools[Streams].accounts != 0 {
		t.Error("closed twice")
	}
}

func TestNilAccountAndNoLimit(t *testing.T) {
	var a *Account
	if !a.TryAcquire(Bytes, 1<<60) || a.Acquire(t.Context(), Bytes, 1) != nil || a.Pressure(Bytes) {
		t.Error("a nil account has limits")
	}
	a.Release(Bytes, 1)
	a.Close()
	u := New(Limits{}).Pod("x")
	if !u.TryAcquire(Bytes, 1<<60) || u.Pressure(Bytes) {
		t.Error("zero is a limit")
	}
}

func TestAcquireAllocatesNothing(t *testing.T) {
	a := New(limits(10)).Pod("a")
	if n := testing.AllocsPerRun(100, func() {
		if !a.TryAcquire(Bytes, 3) {
			t.Fatal("refused")
		}
		a.Release(Bytes, 3)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkTryAcquire(b *testing.B) {
	l := New(DefaultLimits())
	for range 200 {
		l.Pod(time.Now().String())
	}
	a := l.Pod("a")
	for b.Loop() {
		if a.TryAcquire(Bytes, 1) {
			a.Release(Bytes, 1)
		}
	}
}
