// Package cert keeps the certificates of the identities on this node.
//
//	pod enrolled ─→ Retain/Warm ─┐
//	connection   ─→ Get(ctx) ────┤ queue: waiting > warm-up > renewal
//	half-life    ─→ renewal ─────┘   │  8 at once, backoff, jitter
//	                                 ↓
//	                     Authority.Sign (CreateCertificate)
//	                                 ↓
//	            Certificate per identity ── Trust (roots by trust domain)
//	                                 ↓
//	              ClientConfig / ServerConfig → one Verify
//
// Keys are made here, never leave the process and are fresh for each issue.
// One scheduler goroutine (Run) owns the order of work; callers of Get wait on
// their context. A certificate, once issued, is immutable; trust is read
// without locks. The package knows no policy and opens no workload socket.
package cert

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/identity"
)

const (
	// concurrency of requests to the CA; the reference's number.
	concurrency = 8
	// Backoff per identity: about 1 s, doubled, at most 150 s.
	firstBackoff, maxBackoff = time.Second, 150 * time.Second
	// signTimeout bounds one request, so that a hung CA frees its slot.
	signTimeout = 10 * time.Second
	// callRetry: a connection that needs an identity whose last attempt failed
	// this long ago has it tried again at once, whatever the backoff. Between
	// such attempts the last answer is everybody's: connections neither wait out
	// a backoff nor multiply the requests to a CA that refuses.
	callRetry = 5 * time.Second
	// patience is how long a connection waits for an attempt that is planned: the
	// first after a failure, with its jitter, is within it.
	patience = 1500 * time.Millisecond
	// lookAgain bounds the scheduler's sleep. Timers follow the monotonic clock,
	// the ends of certificates the wall clock: one that was set forward, or a
	// machine that slept, is noticed within this time.
	lookAgain = time.Minute
)

// Config of a Manager.
type Config struct {
	Authority Authority
	// TTL asked for; the CA may shorten it. Default 24 h.
	TTL time.Duration
	// TrustDomainAliases are other names of the local domain, beside those that
	// the control plane pushes: peers of either name are the same, and are
	// judged by the roots of the local domain.
	TrustDomainAliases []string
	// TLS12 takes and offers TLS 1.2 too. PostQuantum takes only the hybrid key
	// exchange X25519MLKEM768, which TLS 1.2 does not have.
	TLS12, PostQuantum bool
	// ReplaceSpread is the time over which certificates are replaced that are
	// good but of yesterday's CA: a mesh must not ask at once for all of its
	// certificates. Default 1 min.
	ReplaceSpread time.Duration
	// Grace is how long an identity that left the node keeps its certificate:
	// a job's pods come and go. Default 1 min.
	Grace      time.Duration
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time
}

func (c Config) withDefaults() Config {
	if c.TTL == 0 {
		c.TTL = 24 * time.Hour
	}
	if c.ReplaceSpread == 0 {
		c.ReplaceSpread = time.Minute
	}
	if c.Grace == 0 {
		c.Grace = time.Minute
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// Manager holds one certificate per identity.
type Manager struct {
	cfg     Config
	trust   *Trust
	configs configCache
	metrics metrics
	wakec   chan struct{} // cap 1: the schedule changed
	live    live
	// withdrawn is when a root was last withdrawn, as Unix nanoseconds.
	withdrawn atomic.Int64
	// aliases of the trust domain: as configured, and as pushed.
	aliases atomic.Pointer[[]string]
	// pushed: the control plane pushes trust, and certificates bring none.
	pushed atomic.Bool

	mu      sync.RWMutex
	entries map[identity.ID]*entry
	seq     uint64
	contact time.Time // of the last certificate that the CA gave
	outage  outage
	// generation of the newest trust bundle.
	generation uint64

	crlMu sync.Mutex
	crls  map[string]*revocations // by where they come from; guarded by crlMu
}

// entry is one identity. Fields other than cert are guarded by Manager.mu.
type entry struct {
	id       identity.ID
	cert     atomic.Pointer[Certificate]
	retained bool
	forgetAt time.Time // when not retained
	waiting  int       // callers in Get
	inflight bool
	next     time.Time // the next attempt is not before; wall clock after a success
	last     time.Time // when the last attempt ended
	backoff  time.Duration
	err      error // of the last attempt, nil after success
	failing  time.Time
	donec    chan struct{} // closed when an attempt ends, then replaced
}

// New returns a manager; it works once Run runs.
func New(cfg Config) *Manager {
	cfg = cfg.withDefaults()
	m := &Manager{cfg: cfg, trust: NewTrust(), wakec: make(chan struct{}, 1), entries: map[identity.ID]*entry{}}
	m.live.tunnels = map[*liveTunnel]struct{}{}
	m.crls = map[string]*revocations{}
	m.aliases.Store(&cfg.TrustDomainAliases)
	m.metrics = newMetrics(cfg.Registerer, m)
	m.trust.OnChange(m.rootsChanged)
	return m
}

// rootsChanged follows the trust that it is given: what stood under a root that
// was withdrawn does not stand any more.
func (m *Manager) rootsChanged(removed bool) {
	if !removed {
		return
	}
	now := m.cfg.Now()
	m.withdrawn.Store(now.UnixNano())
	cut := m.rejudge(true)
	m.cfg.Logger.Warn("a root is no longer trusted", "tunnels_cut", cut)
	m.replaceOwn("their root is no longer trusted", func(c *Certificate) bool {
		return !c.stands(m.trust.pool(c.ID.TrustDomain()), now)
	})
}

// Trust is the live map of roots.
func (m *Manager) Trust() *Trust { return m.trust }

// UnavailableError says since when and why an identity has no certificate.
type UnavailableError struct {
	ID    identity.ID
	Since time.Time // zero: never tried
	Err   error
}

func (e *UnavailableError) Error() string {
	if e.Since.IsZero() {
		return fmt.Sprintf("no certificate for %s yet: %v", e.ID, e.Err)
	}
	return fmt.Sprintf("no certificate for %s since %s: %v", e.ID, e.Since.UTC().Format(time.RFC3339), e.Err)
}

func (e *UnavailableError) Unwrap() error { return e.Err }

// Get returns a valid certificate of id, waiting for one within ctx. An
// attempt that fails meanwhile is the answer, and so is the last one while
// none is due soon.
func (m *Manager) Get(ctx context.Context, id identity.ID) (*Certificate, error) {
	if id.IsZero() {
		return nil, errors.New("no certificate without an identity")
	}
	m.mu.RLock()
	e := m.entries[id]
	m.mu.RUnlock()
	if e != nil {
		if c := e.cert.Load(); c.Valid(m.cfg.Now()) {
			return c, nil
		}
	}
	return m.wait(ctx, id)
}

func (m *Manager) wait(ctx context.Context, id identity.ID) (*Certificate, error) {
	m.mu.Lock()
	e := m.entryLocked(id)
	// Again, now that no attempt can end unseen: donec would be the next one's.
	if c := e.cert.Load(); c.Valid(m.cfg.Now()) {
		m.mu.Unlock()
		return c, nil
	}
	if !e.hurry(ctx, m.cfg.Now()) {
		m.mu.Unlock()
		return nil, m.unavailable(e, e.err)
	}
	e.waiting++
	donec := e.donec
	m.mu.Unlock()
	m.wake()
	defer func() {
		m.mu.Lock()
		e.waiting--
		m.mu.Unlock()
	}()
	select {
	case <-donec:
		if c := e.cert.Load(); c.Valid(m.cfg.Now()) {
			return c, nil
		}
		return nil, m.unavailable(e, errors.New("the CA gave none"))
	case <-ctx.Done():
		return nil, m.unavailable(e, context.Cause(ctx))
	}
}

// hurry reports whether an attempt is under way or near enough to wait for; it
// moves one to now for a waiting connection if the last was not just before.
func (e *entry) hurry(ctx context.Context, now time.Time) bool {
	if e.err == nil || e.inflight {
		return true
	}
	if since := now.Sub(e.last); since >= callRetry || since < 0 {
		e.next = now
	}
	until := e.due(now)
	deadline, ok := ctx.Deadline()
	return until <= patience && (!ok || now.Add(until).Before(deadline))
}

// due is how long the next attempt must wait.
func (e *entry) due(now time.Time) time.Duration {
	c := e.cert.Load()
	switch since := now.Sub(e.last); {
	case e.err == nil && (c == nil || c.Valid(now)):
		return e.next.Sub(now)
	case since < 0: // the clock was set back: what was planned by it means nothing
		return 0
	case e.err != nil:
		return e.next.Sub(now)
	default:
		// The clock passed the certificate's end ahead of the plan, or went back
		// before its begin. The floor keeps a wild clock from making a loop.
		return renewFloor - since
	}
}

func (m *Manager) unavailable(e *entry, cause error) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if e.err != nil {
		cause = e.err
	}
	return &UnavailableError{ID: e.id, Since: e.failing, Err: cause}
}

// Retain tells which identities the node's pods have. Missing ones are fetched
// ahead of their first connection; the others are forgotten after a grace.
func (m *Manager) Retain(ids []identity.ID) {
	now := m.cfg.Now()
	m.mu.Lock()
	want := make(map[identity.ID]bool, len(ids))
	for _, id := range ids {
		if !id.IsZero() {
			want[id] = true
			m.entryLocked(id).retained = true
		}
	}
	for id, e := range m.entries {
		if e.retained && !want[id] {
			e.retained, e.forgetAt = false, now.Add(m.cfg.Grace)
		}
	}
	m.mu.Unlock()
	m.wake()
}

// Nudge makes failed identities try again now: the control plane is back.
func (m *Manager) Nudge() {
	m.mu.Lock()
	m.nudgeLocked()
	m.mu.Unlock()
	m.wake()
}

func (m *Manager) nudgeLocked() {
	now := m.cfg.Now()
	for _, e := range m.entries {
		if e.err != nil && !e.inflight {
			e.next, e.backoff = now, 0
		}
	}
}

func (m *Manager) entryLocked(id identity.ID) *entry {
	e := m.entries[id]
	if e == nil {
		e = &entry{id: id, donec: make(chan struct{}), forgetAt: m.cfg.Now().Add(m.cfg.Grace)}
		m.entries[id] = e
	}
	return e
}

func (m *Manager) wake() {
	select {
	case m.wakec <- struct{}{}:
	default: // one is pending already
	}
}

// Run issues and renews until ctx ends, then waits for requests under way.
func (m *Manager) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, concurrency)
	for {
		timer := time.NewTimer(m.schedule(ctx, slots, &wg))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-m.wakec:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// schedule starts what is due while slots are free, and returns how long
// nothing else will be. A node has some hundred identities, so one scan per
// event is cheaper than a heap that must follow every change of priority.
func (m *Manager) schedule(ctx context.Context, slots chan struct{}, wg *sync.WaitGroup) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.cfg.Now()
	for id, e := range m.entries {
		if !e.retained && e.waiting == 0 && !e.inflight && !now.Before(e.forgetAt) {
			delete(m.entries, id)
			m.configs.drop(id)
		}
	}
	for {
		e, idle := m.nextLocked(now)
		if e == nil {
			return idle
		}
		select {
		case slots <- struct{}{}:
		default:
			return lookAgain // a finished request wakes us
		}
		e.inflight = true
		m.seq++
		seq := m.seq
		wg.Go(func() {
			m.attempt(ctx, e, seq)
			<-slots
			m.wake()
		})
	}
}

// nextLocked picks the most urgent entry that is due.
func (m *Manager) nextLocked(now time.Time) (*entry, time.Duration) {
	var best *entry
	idle := lookAgain
	for _, e := range m.entries {
		if !e.retained {
			idle = min(idle, max(e.forgetAt.Sub(now), time.Millisecond))
		}
		if e.inflight || !e.retained && e.waiting == 0 {
			continue
		}
		if wait := e.due(now); wait > 0 {
			idle = min(idle, wait)
			continue
		}
		if best == nil || e.rank(now) < best.rank(now) || e.rank(now) == best.rank(now) && e.next.Before(best.next) {
			best = e
		}
	}
	return best, idle
}

// rank: lower is sooner. A certificate that has ended is as good as none.
func (e *entry) rank(now time.Time) int {
	switch {
	case e.waiting > 0:
		return 0
	case !e.cert.Load().Valid(now):
		return 1
	default:
		return 2
	}
}

func (m *Manager) attempt(ctx context.Context, e *entry, seq uint64) {
	c, err := m.issue(ctx, e.id, seq)
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.cfg.Now()
	e.inflight, e.last = false, now
	if err == nil {
		recovered := e.err != nil
		e.cert.Store(c)
		e.err, e.failing, e.backoff = nil, time.Time{}, 0
		e.next = c.renewAt(now.Round(0), rand.Float64()) // by the wall clock, as its end
		m.contact = now
		if recovered {
			m.nudgeLocked() // the CA is back for the others too
		}
		m.outage.over(m.cfg.Logger, now)
		m.metrics.issued.WithLabelValues("ok").Inc()
		m.cfg.Logger.Debug("certificate issued", "identity", e.id.String(), "expires", c.Leaf.NotAfter)
	} else {
		m.failedLocked(e, err, now)
	}
	close(e.donec)
	e.donec = make(chan struct{})
}

func (m *Manager) failedLocked(e *entry, err error, now time.Time) {
	if e.err == nil {
		e.failing = now
	}
	e.err = err
	e.backoff = min(max(2*e.backoff, firstBackoff), maxBackoff)
	wait := time.Duration(float64(e.backoff) * (0.8 + 0.4*rand.Float64()))
	// While a certificate is still valid it stays in use, and the last try
	// comes no later than its end.
	if c := e.cert.Load(); c.Valid(now) {
		wait = min(wait, c.Leaf.NotAfter.Sub(now))
	}
	e.next = now.Add(wait)
	m.metrics.issued.WithLabelValues("error").Inc()
	m.outage.failed(m.cfg.Logger, e, wait, now)
}

func (m *Manager) issue(ctx context.Context, id identity.ID, seq uint64) (*Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	key, csr, err := request(id)
	if err != nil {
		return nil, err
	}
	chain, err := m.cfg.Authority.Sign(ctx, id, csr, m.cfg.TTL)
	if err != nil {
		return nil, err
	}
	c, err := parse(id, key, chain, m.cfg.Now())
	if err != nil {
		return nil, err
	}
	if m.pushed.Load() && m.trust.pool(id.TrustDomain()) != nil {
		// Another replica of the control plane may answer by older files: what is
		// pushed counts, and grows by generation.
		return c, nil
	}
	// Aliases are other names of the local domain: the same roots answer.
	for _, td := range m.domains(id.TrustDomain()) {
		if err := m.trust.Set(td, c.Roots, seq); err != nil {
			return nil, err
		}
	}
	return c, nil
}
