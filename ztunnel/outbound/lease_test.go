package outbound

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// network is what handshakes find.
type network struct {
	mu    sync.Mutex
	down  bool
	asked int
}

func (n *network) probe(ctx context.Context, _ LeaseKey) error {
	n.mu.Lock()
	n.asked++
	down := n.down
	n.mu.Unlock()
	if down {
		<-ctx.Done() // a dropped SYN
		return ctx.Err()
	}
	return nil
}

func (n *network) set(down bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = down
}

func (n *network) want(t *testing.T, asked int) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.asked != asked {
		t.Fatalf("%d handshakes, want %d", n.asked, asked)
	}
}

var leaseAB = LeaseKey{Src: "a#1", Dst: "b#1", From: netip.MustParseAddr("10.0.0.1"), To: netip.MustParseAddr("10.0.0.2")}

func acquire(t *testing.T, l *Leases, k LeaseKey, cut func(error)) func() {
	t.Helper()
	if cut == nil {
		cut = func(err error) { t.Errorf("cut: %v", err) }
	}
	release, err := l.Acquire(t.Context(), k, cut)
	if err != nil {
		t.Fatal(err)
	}
	return release
}

func TestLeaseIsRenewedWhileInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		l := NewLeases(LeaseConfig{Probe: n.probe})
		defer l.Close()
		release := acquire(t, l, leaseAB, nil)
		again := acquire(t, l, leaseAB, nil)
		n.want(t, 1)
		time.Sleep(10*l.cfg.Every + time.Second)
		n.want(t, 11)
		release()
		release = acquire(t, l, leaseAB, nil) // while the other holds it
		n.want(t, 11)
		again()
		release()
		time.Sleep(10 * l.cfg.Every)
		n.want(t, 11) // nobody uses it
		acquire(t, l, leaseAB, nil)()
		n.want(t, 12)
	})
}

func TestLeaseUnusedHoldsForItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		l := NewLeases(LeaseConfig{Probe: n.probe})
		defer l.Close()
		acquire(t, l, leaseAB, nil)()
		time.Sleep(l.cfg.Every - time.Second)
		release := acquire(t, l, leaseAB, nil)
		n.want(t, 1)
		time.Sleep(2 * time.Second) // renewed when its time is over, not 30 s after the second use
		n.want(t, 2)
		release()
		other := leaseAB
		other.Dst = "b#2" // the pod came back: another stay, another lease
		acquire(t, l, other, nil)()
		n.want(t, 3)
	})
}

func TestLeaseThatEndsCutsItsUsers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		l := NewLeases(LeaseConfig{Probe: n.probe})
		defer l.Close()
		cuts := make(chan error, 10)
		cut := func(err error) { cuts <- err }
		one, two := acquire(t, l, leaseAB, cut), acquire(t, l, leaseAB, cut)
		other := leaseAB
		other.Src = "c#1"
		defer acquire(t, l, other, func(error) {})()
		n.set(true)
		time.Sleep(l.cfg.Every + l.cfg.Again + time.Second)
		for range 2 {
			err := <-cuts
			if f, ok := errors.AsType[*flow.FlagError](err); !ok || f.Flag != flow.FlagNetworkPolicy || !errors.Is(err, ErrNoLease) {
				t.Errorf("cut with %v", err)
			}
		}
		one()
		two()
		if _, err := l.Acquire(t.Context(), leaseAB, cut); !errors.Is(err, ErrNoLease) {
			t.Errorf("a lease that has ended was given: %v", err)
		}
		n.set(false)
		time.Sleep(leaseDenied)
		acquire(t, l, leaseAB, nil)()
	})
}

func TestNoLeaseWithoutHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{down: true}
		l := NewLeases(LeaseConfig{Probe: n.probe})
		defer l.Close()
		start := time.Now()
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := l.Acquire(t.Context(), leaseAB, nil); !errors.Is(err, ErrNoLease) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if d := time.Since(start); d != l.cfg.First {
			t.Errorf("waited %v", d)
		}
		if _, err := l.Acquire(t.Context(), leaseAB, nil); !errors.Is(err, ErrNoLease) {
			t.Error(err)
		}
		n.want(t, 1) // one for all, and none again so soon
	})
}

func TestLeaseWaiterGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &network{down: true}
		l := NewLeases(LeaseConfig{Probe: n.probe})
		defer l.Close()
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = l.Acquire(t.Context(), leaseAB, nil) })
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := l.Acquire(ctx, leaseAB, nil); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		wg.Wait()
	})
}

func TestLeasesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLeases(LeaseConfig{Probe: (&network{}).probe})
		defer l.Close()
		k := leaseAB
		for i := range 3 * maxLeases {
			k.From = netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
			acquire(t, l, k, nil)()
			time.Sleep(l.cfg.Every / maxLeases * 2)
		}
		if n := len(l.leases); n > maxLeases {
			t.Errorf("%d leases", n)
		}
		l.Close()
		if _, err := l.Acquire(t.Context(), k, nil); !errors.Is(err, ErrNoLease) {
			t.Errorf("after Close: %v", err)
		}
	})
}
