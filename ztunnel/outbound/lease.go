package outbound

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

const (
	// leaseDenied is how long a failure holds before it is tried again.
	leaseDenied = 10 * time.Second
	// maxLeases is when unused ones are swept.
	maxLeases = 1024
)

// LeaseConfig configures Leases. Probe is required.
type LeaseConfig struct {
	// Probe makes a handshake over the network.
	Probe func(ctx context.Context, k LeaseKey) error
	// Every is how often the network is asked again while a lease is in use:
	// NetworkPolicy takes effect on live connections within that time. 30 s.
	Every time.Duration
	// First bounds the first handshake, for which a connection waits: one SYN
	// may be lost. 2 s.
	First time.Duration
	// Again bounds later ones, for which nobody waits, and whose failure cuts
	// connections: three SYNs may be lost. 8 s.
	Again time.Duration

	Registerer prometheus.Registerer // nil: not registered
}

// LeaseKey is who talks to whom. The addresses are part of it because
// NetworkPolicy is about addresses, of which a pod may have two.
type LeaseKey struct {
	Src, Dst string // the pods' present stays on the node
	From, To netip.Addr
}

// Leases are the network's present permissions to go past it: a connection
// inside the proxy does not cross the destination's interface, where
// NetworkPolicy is enforced, so that a handshake that does cross it has to show,
// now and then, that it could. Safe for use by any goroutine.
type Leases struct {
	cfg   LeaseConfig
	asked *prometheus.CounterVec
	wg    sync.WaitGroup // renewals

	mu     sync.Mutex
	leases map[LeaseKey]*lease // guarded by mu, as are the leases' fields
	closed bool
}

type lease struct {
	donec chan struct{} // closed when the first handshake is over
	err   error         // why there is no lease
	since time.Time     // of the last handshake, or of its failure
	timer *time.Timer   // renews; nil while unused
	users map[*leaseUse]struct{}
}

type leaseUse struct{ cut func(error) }

// ErrNoLease is a pair of pods between which the network does not let a
// connection through, as far as can be seen.
var ErrNoLease = errors.New("no handshake from pod to pod")

// NewLeases returns no leases.
func NewLeases(cfg LeaseConfig) *Leases {
	for _, d := range []struct {
		p   *time.Duration
		def time.Duration
	}{{&cfg.Every, 30 * time.Second}, {&cfg.First, 2 * time.Second}, {&cfg.Again, 8 * time.Second}} {
		if *d.p == 0 {
			*d.p = d.def
		}
	}
	l := &Leases{cfg: cfg, leases: map[LeaseKey]*lease{}, asked: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "ambit_ztunnel_local_handshakes_total",
		Help: "Handshakes between pods of this node that ask the network whether they may be joined inside the proxy, by result.",
	}, []string{"result"})}
	for _, result := range []string{"ok", "error"} {
		l.asked.WithLabelValues(result) // exist before the first
	}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(l.asked)
	}
	return l
}

// Acquire waits for a lease and holds it until release. When it ends before,
// cut is called with the reason.
func (l *Leases) Acquire(ctx context.Context, k LeaseKey, cut func(error)) (release func(), err error) {
	ls, first := l.enter(k)
	if ls == nil {
		return nil, ErrNoLease
	}
	if first {
		l.begin(ctx, k, ls)
	}
	select {
	case <-ls.donec:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return l.hold(k, ls, cut)
}

// enter finds the lease; of a new one the caller makes the first handshake.
func (l *Leases) enter(k LeaseKey) (ls *lease, first bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, false
	}
	if ls := l.leases[k]; ls != nil && !l.overLocked(ls) {
		return ls, false
	}
	if len(l.leases) >= maxLeases {
		for k, ls := range l.leases {
			if l.overLocked(ls) {
				delete(l.leases, k)
			}
		}
	}
	ls = &lease{donec: make(chan struct{}), users: map[*leaseUse]struct{}{}}
	l.leases[k] = ls
	return ls, true
}

// overLocked reports whether a lease says nothing any more: nobody renews it,
// and its last handshake is too long ago.
func (l *Leases) overLocked(ls *lease) bool {
	select {
	case <-ls.donec:
	default:
		return false
	}
	age := time.Since(ls.since)
	if ls.err != nil {
		return age >= leaseDenied
	}
	return len(ls.users) == 0 && age >= l.cfg.Every
}

// begin makes the first handshake, on behalf of all that wait.
func (l *Leases) begin(ctx context.Context, k LeaseKey, ls *lease) {
	err := l.handshake(context.WithoutCancel(ctx), k, l.cfg.First)
	l.mu.Lock()
	defer l.mu.Unlock()
	ls.err, ls.since = err, time.Now()
	close(ls.donec)
}

func (l *Leases) handshake(ctx context.Context, k LeaseKey, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := l.cfg.Probe(ctx, k); err != nil {
		l.asked.WithLabelValues("error").Inc()
		return fmt.Errorf("%w: %s → %s: %w", ErrNoLease, k.From, netip.AddrPortFrom(k.To, portHBONE), err)
	}
	l.asked.WithLabelValues("ok").Inc()
	return nil
}

func (l *Leases) hold(k LeaseKey, ls *lease, cut func(error)) (release func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ls.err != nil || l.closed {
		return nil, errors.Join(ls.err, ErrNoLease)
	}
	u := &leaseUse{cut}
	ls.users[u] = struct{}{}
	if ls.timer == nil {
		ls.timer = time.AfterFunc(max(l.cfg.Every-time.Since(ls.since), 0), func() { l.renew(k, ls) })
	}
	return func() { l.release(ls, u) }, nil
}

func (l *Leases) release(ls *lease, u *leaseUse) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(ls.users, u)
	if len(ls.users) == 0 && ls.timer != nil {
		ls.timer.Stop()
		ls.timer = nil
	}
}

// renew asks the network again. It runs on the lease's timer.
func (l *Leases) renew(k LeaseKey, ls *lease) {
	l.mu.Lock()
	if l.closed || len(ls.users) == 0 {
		l.mu.Unlock()
		return
	}
	l.wg.Add(1)
	defer l.wg.Done()
	l.mu.Unlock()

	err := l.handshake(context.Background(), k, l.cfg.Again)

	l.mu.Lock()
	ls.err, ls.since = err, time.Now()
	var users []*leaseUse
	if err != nil {
		for u := range ls.users {
			users = append(users, u)
		}
	} else if ls.timer != nil && !l.closed {
		ls.timer.Reset(l.cfg.Every)
	}
	l.mu.Unlock()
	for _, u := range users {
		u.cut(flow.Failed(flow.ReasonHBONETimeout, fmt.Errorf("connection closed because the network no longer lets it through (maybe a NetworkPolicy): %w", err)))
	}
}

// Close ends all leases and waits for handshakes under way; who holds one is
// not told.
func (l *Leases) Close() {
	l.mu.Lock()
	l.closed = true
	for _, ls := range l.leases {
		if ls.timer != nil {
			ls.timer.Stop()
		}
	}
	l.mu.Unlock()
	l.wg.Wait()
}
