package cert

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

func (f *fakeCA) fail(err error) { f.mu.Lock(); defer f.mu.Unlock(); f.err = err }

// TestBackoffIsNotWaitedOut: a connection that needs an identity in backoff
// gets the last answer at once; the first after a while has it tried again.
func TestBackoffIsNotWaitedOut(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		ca.fail(errAway)
		m.Retain([]identity.ID{id("a")})
		time.Sleep(30 * time.Minute) // the backoff is at its longest
		synctest.Wait()
		for range 600 { // 10 connections a second for a minute
			begin := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			_, err := m.Get(ctx, id("a"))
			cancel()
			if u, ok := errors.AsType[*UnavailableError](err); !ok || !errors.Is(err, errAway) || time.Since(u.Since) < 30*time.Minute {
				t.Fatalf("got %v, want the CA's answer and since when", err)
			}
			if d := time.Since(begin); d > patience {
				t.Fatalf("waited %v", d)
			}
			time.Sleep(100 * time.Millisecond)
		}
		before := ca.requests()
		if n := before; n < 30 || n > 60 {
			t.Errorf("%d requests in half an hour without and a minute with traffic", n)
		}
		ca.fail(nil)
		time.Sleep(callRetry)
		if _, err := m.Get(t.Context(), id("a")); err != nil {
			t.Errorf("the CA is back, yet: %v", err)
		}
	})
}

func TestDeadlineBeforeTheNextAttempt(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		ca.fail(errAway)
		_, _ = m.Get(t.Context(), id("a")) // failed: the next attempt is in about a second
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := m.Get(ctx, id("a")); !errors.Is(err, errAway) || time.Since(begin) != 0 {
			t.Errorf("got %v after %v, want the last error at once", err, time.Since(begin))
		}
	})
}

// runClock is run with a wall clock that the test sets.
func runClock(t *testing.T, f func(t *testing.T, m *Manager, ca *fakeCA, set func(time.Duration))) {
	synctest.Test(t, func(t *testing.T) {
		var off atomic.Int64
		ca := &fakeCA{t: t, ca: meshca.New(t, "cluster.local"), life: 24 * time.Hour}
		m := New(Config{Authority: ca, Now: func() time.Time { return time.Now().Round(0).Add(time.Duration(off.Load())) }})
		ctx, stop := context.WithCancel(context.Background())
		donec := make(chan error)
		go func() { donec <- m.Run(ctx) }()
		f(t, m, ca, func(d time.Duration) { off.Store(int64(d)) })
		stop()
		<-donec
	})
}

func TestClockJumps(t *testing.T) {
	for _, jump := range []time.Duration{25 * time.Hour, 10 * 365 * 24 * time.Hour, -time.Hour, -10 * 365 * 24 * time.Hour} {
		t.Run(jump.String(), func(t *testing.T) {
			runClock(t, func(t *testing.T, m *Manager, ca *fakeCA, set func(time.Duration)) {
				m.Retain([]identity.ID{id("a"), id("b")})
				synctest.Wait()
				set(jump) // the CA's clock stays
				before := ca.requests()
				for range 60 {
					ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
					if c, err := m.Get(ctx, id("a")); err == nil {
						t.Fatalf("a certificate for %v to %v at %v was handed out", c.Leaf.NotBefore, c.Leaf.NotAfter, m.cfg.Now())
					} else if !strings.Contains(err.Error(), "clocks of this node and the CA differ") {
						t.Fatalf("got %v", err)
					}
					cancel()
					time.Sleep(time.Second)
				}
				if n := ca.requests() - before; n < 2 || n > 30 {
					t.Errorf("%d requests in a minute of a wrong clock", n)
				}
				set(0) // and is right again: what it had is good
				if _, err := m.Get(t.Context(), id("a")); err != nil {
					t.Errorf("after the clock was right again: %v", err)
				}
				at := ca.requests()
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if n := ca.requests() - at; n > 8 {
					t.Errorf("%d requests in 10 minutes of a right clock", n)
				}
			})
		})
	}
}

// TestSleepPastTheEnd: a machine that slept through the end of its certificate
// (timers stood still, the wall clock did not) asks for another at once.
func TestSleepPastTheEnd(t *testing.T) {
	runClock(t, func(t *testing.T, m *Manager, ca *fakeCA, set func(time.Duration)) {
		m.Retain([]identity.ID{id("a")})
		synctest.Wait()
		set(25 * time.Hour)
		ca.mu.Lock()
		ca.life = 60 * time.Hour // as a CA whose clock moved too
		ca.mu.Unlock()
		if _, err := m.Get(t.Context(), id("a")); err != nil || ca.requests() != 2 {
			t.Errorf("after the sleep: %v, %d requests", err, ca.requests())
		}
	})
}

func TestSleepIsNoticedWithoutConnections(t *testing.T) {
	runClock(t, func(t *testing.T, m *Manager, ca *fakeCA, set func(time.Duration)) {
		m.Retain([]identity.ID{id("a")})
		synctest.Wait()
		set(13 * time.Hour) // past half-life, still valid
		time.Sleep(2 * lookAgain)
		synctest.Wait()
		if n := ca.requests(); n != 2 {
			t.Errorf("%d requests, want the renewal", n)
		}
	})
}

// TestRefusalsAreLoggedOncePerChange: what a CA answers again and again is one
// line, for hundreds of identities too.
func TestRefusalsAreLoggedOncePerChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out logLines
		ca := &fakeCA{t: t, ca: meshca.New(t, "cluster.local"), life: 24 * time.Hour}
		ca.fail(status.Error(codes.Unauthenticated, "no"))
		m := New(Config{Authority: ca, Logger: logTo(&out)})
		ctx, stop := context.WithCancel(context.Background())
		donec := make(chan error)
		go func() { donec <- m.Run(ctx) }()
		m.Retain([]identity.ID{id("a"), id("b"), id("c")})
		for _, code := range []codes.Code{codes.Unauthenticated, codes.PermissionDenied, codes.ResourceExhausted, codes.Unavailable} {
			ca.fail(status.Error(code, "no"))
			time.Sleep(time.Hour)
		}
		synctest.Wait()
		if n := ca.requests(); n < 3*4*15 || n > 3*4*45 {
			t.Errorf("%d requests in 4 hours of refusals, want about one in 150 s for each of 3", n)
		}
		if n := out.count("certificate not issued"); n != 4 {
			t.Errorf("%d lines for 4 answers", n)
		}
		ca.fail(nil)
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if n := out.count("issued again"); n != 1 {
			t.Errorf("%d lines for the end", n)
		}
		stop()
		<-donec
	})
}

type logLines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}
func (l *logLines) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

func logTo(l *logLines) *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }
