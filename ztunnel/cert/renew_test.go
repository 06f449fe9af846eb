package cert

import (
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// backdated is how a CA certifies that allows for clocks that differ.
func backdated(by, life time.Duration) meshca.Option {
	return func(t *x509.Certificate) {
		t.NotBefore, t.NotAfter = time.Now().Add(-by), time.Now().Add(life)
	}
}

// TestShortBackdatedLivesAreNotRenewedInALoop: half-life counts from when the
// certificate came, not from when its CA says that it began.
func TestShortBackdatedLivesAreNotRenewedInALoop(t *testing.T) {
	for _, c := range []struct {
		life     time.Duration
		min, max int // requests within 20 s
	}{
		{time.Minute, 1, 1},
		{20 * time.Second, 2, 4},
		{3 * time.Second, 8, 21},
		{time.Second, 10, 21},           // the floor
		{100 * time.Millisecond, 4, 21}, // over at once: the backoff of failures
	} {
		t.Run(c.life.String(), func(t *testing.T) {
			run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
				ca.bend = func(pub *ecdsa.PublicKey, i identity.ID) []string {
					if ca.requests() > 1000 {
						time.Sleep(time.Hour) // a loop must fail the test, not hang it
					}
					return ca.ca.ChainPEM(ca.ca.Sign(t, pub, i, backdated(2*time.Minute, c.life)))
				}
				m.Retain([]identity.ID{id("a")})
				time.Sleep(20*time.Second - time.Millisecond)
				synctest.Wait()
				if n := ca.requests(); n < c.min || n > c.max {
					t.Errorf("%d requests in 20 s, want %d to %d", n, c.min, c.max)
				}
			})
		})
	}
}

func TestRenewAt(t *testing.T) {
	t0 := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(begins, ends time.Duration) *Certificate {
		return &Certificate{Leaf: &x509.Certificate{NotBefore: t0.Add(begins), NotAfter: t0.Add(ends)}}
	}
	for _, c := range []struct {
		name         string
		cert         *Certificate
		first, least time.Duration // without jitter, and with all of it
	}{
		{"a day, backdated", at(-2*time.Minute, 24*time.Hour), 12 * time.Hour, 9*time.Hour + 36*time.Minute},
		{"a minute, backdated by two", at(-2*time.Minute, time.Minute), 30 * time.Second, 24 * time.Second},
		{"shorter than the floor allows", at(-2*time.Minute, time.Second), time.Second, time.Second},
		{"begins later, as the CA's clock has it", at(time.Minute, 3*time.Minute), 2 * time.Minute, 108 * time.Second},
	} {
		if got := c.cert.renewAt(t0, 0).Sub(t0); got != c.first {
			t.Errorf("%s: renewed after %v, want %v", c.name, got, c.first)
		}
		if got := c.cert.renewAt(t0, 1).Sub(t0); got != c.least {
			t.Errorf("%s: with jitter renewed after %v, want %v", c.name, got, c.least)
		}
	}
}

// TestExpiredIsAsUrgentAsMissing: a certificate that ended while the CA was
// away is fetched before those that only grow old.
func TestExpiredIsAsUrgentAsMissing(t *testing.T) {
	now := time.Now()
	old := &entry{}
	old.cert.Store(&Certificate{Leaf: &x509.Certificate{NotBefore: now.Add(-time.Hour), NotAfter: now.Add(-time.Second)}})
	valid := &entry{}
	valid.cert.Store(&Certificate{Leaf: &x509.Certificate{NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Second)}})
	if old.rank(now) != (&entry{}).rank(now) || old.rank(now) >= valid.rank(now) {
		t.Errorf("ranks: expired %d, missing %d, valid %d", old.rank(now), (&entry{}).rank(now), valid.rank(now))
	}
}

var errAway = errors.New("the CA is away")

// TestFailedRenewalIsNotHurriedByTheEnd: tries before the end keep their
// distance, however near the end is.
func TestFailedRenewalIsNotHurriedByTheEnd(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		ca.life = 10 * time.Second
		m.Retain([]identity.ID{id("a")})
		synctest.Wait()
		ca.mu.Lock()
		ca.err = errAway
		ca.mu.Unlock()
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := ca.requests(); n < 4 || n > 12 {
			t.Errorf("%d requests in the minute in which the CA was away", n)
		}
	})
}
