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

func TestBorrowIdleCapacity(t *testing.T) {
	l := New(limits(10))
	a, b := l.Pod("a"), l.Pod("b")
	defer b.Close()
	defer a.Close()
	if !a.TryAcquire(Streams, 10) {
		t.Error("idle capacity is not lent")
	}
	if b.TryAcquire(Streams, 1) {
		t.Error("more granted than there is")
	}
	a.Release(Streams, 1)
	if !b.TryAcquire(Streams, 1) {
		t.Error("what came back is not granted")
	}
}

// What comes back goes to who is below its share, however long the borrower has waited.
func TestShareComesBackUnderDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(limits(10))
		a, b := l.Pod("a"), l.Pod("b")
		if err := a.Acquire(t.Context(), Streams, 10); err != nil {
			t.Fatal(err)
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
