package flow

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/origin"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// Causes with which connections are cut.
var (
	ErrDrained = errors.New("connection closed due to connection drain")
	ErrPodGone = errors.New("connection closed because its pod left the node")
)

// Config of a Table.
type Config struct {
	View   func() *store.View
	Logger *slog.Logger // the access log
	// PolicyLogger gets a line per decision, at level debug, or at info with
	// PolicyInfo.
	PolicyLogger *slog.Logger
	PolicyInfo   bool
	Registerer   prometheus.Registerer
	// MaxSeries bounds label sets of istio_tcp_*; beyond it connections count
	// under one set of "unknown". Default 20000.
	MaxSeries int
	// SeriesDelay is how long an unused series of a workload that is gone
	// stays visible to scrapes. Default 5 min.
	SeriesDelay time.Duration
	// SumInterval is how long identical refusals are gathered into one line of
	// the access log. Default 10 s.
	SumInterval time.Duration
	// Names are the executable and the container of an origin, "" while they are
	// not known. It must not wait. Nil: none are.
	Names func(o origin.Origin) (executable, container string)
}

// Table of live connections.
type Table struct {
	cfg      Config
	log      *slog.Logger
	metrics  *metrics
	refusals *refusals
	wakec    chan struct{} // cap 1: the configuration changed
	hook     func(step string)
	nextID   atomic.Uint64

	mu      sync.Mutex
	conns   map[*Conn]struct{}
	idlec   chan struct{} // closed when conns becomes empty, nil when nobody waits
	pending step          // changes that no sweep has taken yet
}

// New returns an empty table. Run sweeps it.
func New(cfg Config) *Table {
	if cfg.MaxSeries == 0 {
		cfg.MaxSeries = 20_000
	}
	if cfg.SeriesDelay == 0 {
		cfg.SeriesDelay = 5 * time.Minute
	}
	if cfg.SumInterval == 0 {
		cfg.SumInterval = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.PolicyLogger == nil {
		cfg.PolicyLogger = slog.New(slog.DiscardHandler)
	}
	t := &Table{cfg: cfg, log: cfg.Logger, wakec: make(chan struct{}, 1), conns: map[*Conn]struct{}{}, hook: func(string) {}}
	t.metrics, t.refusals = newMetrics(t), newRefusals(cfg.SumInterval)
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(t.metrics)
	}
	return t
}

// Conn is one live connection.
type Conn struct {
	// Stats are counted by relay.Join(downstream, upstream, Stats). A connection
	// that is joined under another one's name takes over that one's before Describe.
	Stats *relay.Stats

	stats relay.Stats // its own

	t       *Table
	id      uint64
	trace   Trace // of the peer's once Join was called, before Describe
	started time.Time
	took    time.Duration // set by End
	cancel  context.CancelCauseFunc
	rec     Record // owned by the serving goroutine until Describe, then read-only
	opened  bool
	decided bool // of the serving goroutine, as opened
	ended   bool
	series  atomic.Pointer[series]
	flushed struct{ sent, received atomic.Uint64 }

	mu         sync.Mutex
	subject    *Subject // set by Authorize
	generation uint64   // of the configuration that decided, 0 before
	verdict    policy.Verdict
	peer       identity.ID // proven by the other end of an outbound tunnel
}

// Begin registers a connection. The returned context ends with its cause when
// the connection is cut: policy, pod gone, drain.
func (t *Table) Begin(ctx context.Context, rec Record) (*Conn, context.Context) {
	ctx, cancel := context.WithCancelCause(ctx)
	c := &Conn{t: t, id: t.nextID.Add(1), trace: newTrace(), started: time.Now(), cancel: cancel, rec: rec}
	c.Stats = &c.stats
	t.mu.Lock()
	t.conns[c] = struct{}{}
	t.mu.Unlock()
	return c, ctx
}

// ID is unique in this process.
func (c *Conn) ID() uint64 { return c.id }

// Record is what is known of the connection; change it before Describe.
func (c *Conn) Record() *Record { return &c.rec }

// Describe says that the record is complete: the connection counts as opened.
func (c *Conn) Describe() {
	if c.opened {
		return
	}
	c.opened = true
	if c.rec.Transport != Local { // those have two records and one Stats
		c.Stats.Untimed = !c.t.Logs() || !c.rec.logs(true)
	}
	c.series.Store(c.t.metrics.acquire(&c.rec, FlagNone))
	c.series.Load().opened.Add(1)
	c.t.metrics.socketsOpen(c.rec.Direction).Add(1)
	if c.t.log.Enabled(context.Background(), slog.LevelDebug) && c.rec.logs(false) {
		c.t.log.LogAttrs(context.Background(), slog.LevelDebug, "connection opened", c.attrs(nil, nil)...)
	}
}

// Cut ends the connection with a cause. Any goroutine.
func (c *Conn) Cut(cause error) { c.cancel(cause) }

// End removes the connection, counts it and writes its line. err is nil for a
// connection that ended as its ends wanted.
func (c *Conn) End(err error) {
	if c.ended {
		return
	}
	c.ended = true
	c.cancel(nil)
	c.t.mu.Lock()
	delete(c.t.conns, c)
	if len(c.t.conns) == 0 && c.t.idlec != nil {
		close(c.t.idlec)
		c.t.idlec = nil
	}
	c.t.mu.Unlock()
	c.took = time.Since(c.started)
	o := c.outcome(err)
	if deny, ok := errors.AsType[*DenyError](err); ok {
		c.t.metrics.denied(deny)
	}
	if c.opened {
		c.t.metrics.end(c, o.flag, o.failed)
	} else if o.failed {
		c.t.metrics.early(c.rec.Direction, o.reason)
	}
	c.report(o)
}

// Refuse counts and logs a connection that failed before it could be
// registered: a handshake, a malformed request, an unknown workload.
func (t *Table) Refuse(rec Record, err error) {
	c := &Conn{t: t, rec: rec}
	o := c.outcome(err)
	t.metrics.early(rec.Direction, o.reason)
	c.report(o)
}

// Len is the number of live connections, of one pod unless pod is "".
func (t *Table) Len(pod string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if pod == "" {
		return len(t.conns)
	}
	n := 0
	for c := range t.conns {
		if c.rec.Pod == pod {
			n++
		}
	}
	return n
}

// CutPod cuts a pod's connections, all of them when pod is "".
func (t *Table) CutPod(pod string, cause error) {
	for _, c := range t.live() {
		if pod == "" || c.rec.Pod == pod {
			c.cancel(cause)
		}
	}
}

// Idle waits until no connection is live.
func (t *Table) Idle(ctx context.Context) error {
	t.mu.Lock()
	if len(t.conns) == 0 {
		t.mu.Unlock()
		return nil
	}
	if t.idlec == nil {
		t.idlec = make(chan struct{})
	}
	idlec := t.idlec
	t.mu.Unlock()
	select {
	case <-idlec:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// live is a copy, so that callers work without the lock.
func (t *Table) live() []*Conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*Conn, 0, len(t.conns))
	for c := range t.conns {
		out = append(out, c)
	}
	return out
}

// SetPeer is the identity that the other end proved, once it is known.
func (c *Conn) SetPeer(id identity.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.peer = id
}

// Cause is why a connection with this context ended: the reason it was cut
// for, if it was, rather than the error that the cut produced.
func Cause(ctx context.Context, err error) error {
	if err == nil || ctx.Err() == nil {
		return err
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}
