// Package direct has connections between accelerated pods of the node go without
// the proxy, once it has joined one itself.
//
//	outbound joined a pair ─▶ Offer ─▶ plan: shares, policy, identity ─▶ lease.Client ─▶ agent
//	configuration changed, every Interval ─▶ plan again ─▶ Grant what differs, Renew
//	agent ─▶ Opened, Closed ─▶ flow: two records, as of a connection that the proxy joins
//	flow cuts a record (policy, pod gone, drain) ─▶ Cut
//
// The plan is made of the same configuration by the same functions as the proxy's
// own connections. Nobody waits for anything here: what cannot be leased, or not
// now, goes through the proxy. When the proxy dies, its leases end by the clock.
//
// One goroutine (Run) owns the state; everything else puts a note on its queue.
// The package knows neither sockets nor kernels.
package direct

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/lease"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
)

const (
	// maxLeases bounds what is looked at after each change; further pairs go
	// through the proxy.
	maxLeases = 4096
	// idle is how long a lease that nobody uses is kept: after it, one connection
	// in between goes through the proxy.
	idle = 5 * time.Minute
	// backoff is how long a failing pair goes through the proxy, which tells better
	// why and tries elsewhere, and for how long at most the agent is not asked again
	// for what it refused.
	backoff = 30 * time.Second
	// refusedAtFirst is how long it is not asked at first, twice as long each time: an
	// agent that begins refuses what it has not looked at yet.
	refusedAtFirst = lease.Interval
	// reunion is how long connections wait to be heard of again from an agent that
	// came back.
	reunion = lease.TTL
)

// Agent grants leases; *lease.Client is one.
type Agent interface {
	Grant(lease.Grant) error
	Renew() error
	Cut(conn uint64) error
}

// Pod is a pod that this proxy serves.
type Pod struct {
	UID   string
	NetNS uint64         // cookie
	Self  *mesh.Workload // nil: not known, or no longer
	// Enter registers a connection of the pod's, which its drain waits for and its
	// end cuts.
	Enter func(cut func(error)) (leave func(), ok bool)
}

// Pods knows them.
type Pods interface {
	// ByStay is a pod by its present stay.
	ByStay(stay string) (Pod, bool)
	// ByWorkload is the pod that a workload is.
	ByWorkload(w *mesh.Workload) (Pod, bool)
	// Certified reports that the pod's identity has a certificate at this moment.
	Certified(w *mesh.Workload) bool
}

// Config of a Keeper.
type Config struct {
	Agent      Agent
	Pods       Pods
	View       func() *store.View
	Flow       *flow.Table
	Logger     *slog.Logger // nil: none
	Registerer prometheus.Registerer
}

// Keeper keeps leases in line with the configuration.
type Keeper struct {
	cfg     Config
	metrics *metrics
	wakec   chan struct{} // cap 1

	mu    sync.Mutex
	queue []note // guarded by mu; bounded by offers alone: events are the kernel's connections
	offer int    // offers in queue
	// shared are the leases that take a share of a service's connections: what
	// comes to the proxy is for the others.
	shared map[offer]map[netip.Addr]bool // guarded by mu

	// Owned by Run.
	up     bool
	since  time.Time // of up
	leases map[lease.Key]*entry
	conns  map[uint64]*conn
}

// note is something to be done by Run; one field is set.
type note struct {
	offer   *offer
	opened  *lease.Opened
	closed  *lease.Closed
	cut     uint64
	up      bool
	down    bool
	changed bool
	left    string
}

type offer struct {
	stay string
	to   netip.AddrPort
}

// entry is one lease, or a pair that has none for a while.
type entry struct {
	stay    string
	granted []lease.Target // sorted as planned; none while until runs
	used    time.Time
	until   time.Time     // backoff
	refused time.Duration // by the agent that is there: the last wait; 0: it did not refuse
}

// New returns a Keeper that does nothing until Run.
func New(cfg Config) *Keeper {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	k := &Keeper{cfg: cfg, wakec: make(chan struct{}, 1), leases: map[lease.Key]*entry{}, conns: map[uint64]*conn{},
		shared: map[offer]map[netip.Addr]bool{}}
	k.metrics = newMetrics(cfg.Registerer)
	return k
}

// maxOffers bounds offers that wait: whoever is dropped offers again with its next
// connection.
const maxOffers = 1024

// Offer says that the proxy has just joined a connection of a pod to an address
// with a pod of this node.
func (k *Keeper) Offer(stay string, to netip.AddrPort) { k.put(note{offer: &offer{stay, to}}) }

// Has reports whether a pod's connections to an address go to a workload by
// themselves, as far as they are for it.
func (k *Keeper) Has(stay string, to netip.AddrPort, w *mesh.Workload) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.ContainsFunc(w.Addrs, func(a netip.Addr) bool { return k.shared[offer{stay, to}][a] })
}

// share publishes what Has says.
func (k *Keeper) share(to netip.AddrPort, e *entry) {
	k.mu.Lock()
	defer k.mu.Unlock()
	o := offer{e.stay, to}
	delete(k.shared, o)
	if len(e.granted) == 0 {
		return
	}
	k.shared[o] = map[netip.Addr]bool{}
	for _, t := range e.granted {
		k.shared[o][t.Addr.Addr()] = true
	}
}

// Changed says that the configuration did.
func (k *Keeper) Changed(_, _ *store.View, _ store.Change) { k.put(note{changed: true}) }

// Left says that a stay takes no connections any more.
func (k *Keeper) Left(stay string) { k.put(note{left: stay}) }

// Opened implements lease.Events.
func (k *Keeper) Opened(o lease.Opened) { k.put(note{opened: &o}) }

// Closed implements lease.Events.
func (k *Keeper) Closed(c lease.Closed) { k.put(note{closed: &c}) }

// Connected is for lease.ClientConfig.
func (k *Keeper) Connected() { k.put(note{up: true}) }

// Disconnected is for lease.ClientConfig.
func (k *Keeper) Disconnected() { k.put(note{down: true}) }

func (k *Keeper) put(n note) {
	k.mu.Lock()
	if n.offer != nil {
		if k.offer >= maxOffers {
			k.mu.Unlock()
			return
		}
		k.offer++
	}
	k.queue = append(k.queue, n)
	k.mu.Unlock()
	select {
	case k.wakec <- struct{}{}:
	default: // it will look anyway
	}
}

// Run keeps leases until ctx ends. The agent ends them when the connection to it
// does.
func (k *Keeper) Run(ctx context.Context) error {
	t := time.NewTicker(lease.Interval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			k.end()
			return nil
		case <-k.wakec:
			k.work()
		case <-t.C:
			k.look()
			k.renew()
		}
	}
}

// work does what is queued. Changes and ends come before offers and events, and
// once for all of them.
func (k *Keeper) work() {
	k.mu.Lock()
	notes := k.queue
	k.queue, k.offer = nil, 0
	k.mu.Unlock()
	look := false
	for _, n := range notes {
		look = look || n.changed || n.left != ""
	}
	if look {
		k.look()
	}
	for _, n := range notes {
		switch {
		case n.up:
			k.connected()
		case n.down:
			k.disconnected()
		case n.offer != nil:
			k.offered(*n.offer)
		case n.opened != nil:
			k.opened(*n.opened)
		case n.closed != nil:
			k.closed(*n.closed)
		case n.cut != 0:
			k.cut(n.cut)
		}
	}
}

// connected asks an agent for everything anew: it may be another one.
func (k *Keeper) connected() {
	k.up, k.since = true, time.Now()
	for _, c := range k.conns {
		c.heard = false
	}
	for key, e := range k.leases {
		if e.refused > 0 {
			e.refused, e.until = 0, time.Time{} // the other one's word
		}
		k.update(key, e)
	}
}

// disconnected is the end of all leases.
func (k *Keeper) disconnected() {
	k.up = false
	for key, e := range k.leases {
		e.granted = nil
		k.share(key.Addr, e)
	}
}

func (k *Keeper) offered(o offer) {
	p, ok := k.cfg.Pods.ByStay(o.stay)
	if !ok || p.NetNS == 0 || !k.up {
		return
	}
	key := lease.Key{NetNS: p.NetNS, Addr: o.to}
	e := k.leases[key]
	if e == nil {
		if len(k.leases) >= maxLeases {
			return
		}
		e = &entry{stay: o.stay}
		k.leases[key] = e
	}
	e.stay, e.used = o.stay, time.Now()
	k.update(key, e)
}

// look plans all leases again.
func (k *Keeper) look() {
	now := time.Now()
	for key, e := range k.leases {
		if now.Sub(e.used) > idle && !k.inUse(key) {
			e.until = now.Add(time.Hour) // plans nothing
			k.update(key, e)
			delete(k.leases, key)
			continue
		}
		k.update(key, e)
	}
	for id, c := range k.conns {
		k.cutAgain(id, c)
	}
	k.metrics.leases.Set(float64(len(k.leases)))
	if k.up && now.Sub(k.since) > reunion {
		for id, c := range k.conns {
			if !c.heard {
				k.closed(lease.Closed{Conn: id, Lost: true})
			}
		}
	}
}

func (k *Keeper) inUse(key lease.Key) bool {
	for _, c := range k.conns {
		if c.key == key {
			return true
		}
	}
	return false
}

// renew says that this goroutine still looks.
func (k *Keeper) renew() {
	if !k.up {
		return
	}
	if err := k.cfg.Agent.Renew(); err != nil {
		k.cfg.Logger.Warn("leases cannot be renewed: connections of accelerated pods go through the proxy", "err", err)
	}
}

// update makes the agent's lease what the plan says.
func (k *Keeper) update(key lease.Key, e *entry) {
	if !k.up {
		return
	}
	targets, cut := k.plan(key, e)
	if slices.Equal(targets, e.granted) {
		return
	}
	for _, c := range k.conns {
		c.doubtful = c.doubtful || cut && c.key == key
	}
	err := k.cfg.Agent.Grant(lease.Grant{Key: key, Targets: targets, Cut: cut})
	if err == nil {
		if len(targets) > 0 && len(e.granted) == 0 {
			k.metrics.granted.Inc()
		}
		e.granted, e.refused = targets, 0
		k.share(key.Addr, e)
		return
	}
	if errors.Is(err, lease.ErrNoAgent) {
		return // which Disconnected is about to say: the next one is asked at once
	}
	if _, refused := errors.AsType[*lease.RefusedError](err); !refused {
		k.cfg.Logger.Warn("lease is not in force", "destination", key.Addr, "err", err)
	}
	// Most pods are not accelerated, which only the agent knows.
	e.refused = min(max(2*e.refused, refusedAtFirst), backoff)
	e.until = time.Now().Add(e.refused)
	if len(e.granted) == 0 {
		return
	}
	e.granted = nil
	k.share(key.Addr, e)
	if err := k.cfg.Agent.Grant(lease.Grant{Key: key, Cut: true}); err != nil && !errors.Is(err, lease.ErrNoAgent) {
		k.cfg.Logger.Warn("lease cannot be ended; the agent ends it in a moment", "destination", key.Addr, "err", err)
	}
}

// plan is who may be reached how often, at this moment; cut says that somebody no
// longer named must not be talked to either.
func (k *Keeper) plan(key lease.Key, e *entry) (targets []lease.Target, cut bool) {
	was := map[uint64]bool{}
	for _, t := range e.granted {
		was[t.NetNS] = true
	}
	if time.Now().Before(e.until) {
		return nil, false
	}
	src, ok := k.cfg.Pods.ByStay(e.stay)
	if !ok || src.NetNS != key.NetNS || src.Self == nil || !k.cfg.Pods.Certified(src.Self) {
		return nil, true
	}
	v := k.cfg.View()
	var from netip.Addr
	for _, a := range src.Self.Addrs {
		if a.Is4() == key.Addr.Addr().Is4() {
			from = a
			break
		}
	}
	if !from.IsValid() {
		return nil, true
	}
	allowed := map[uint64]bool{}
	var sum uint64
	for _, s := range outbound.Straights(v.Mesh, src.Self, key.Addr) {
		dst, ok := k.cfg.Pods.ByWorkload(s.Dst)
		if !ok || dst.NetNS == 0 {
			continue
		}
		verdict := v.Policies.Authorize(s.Dst.Namespace, s.Dst.Policies, policy.Conn{Peer: src.Self.Identity, Src: netip.AddrPortFrom(from, 0), Dst: s.Addr})
		if !verdict.Allowed {
			continue
		}
		allowed[dst.NetNS] = true
		share := uint64(math.Round(s.Share * lease.All))
		share = min(share, lease.All-sum)
		if s.Dst.Terminating || share == 0 || len(targets) == lease.MaxTargets {
			continue
		}
		sum += share
		targets = append(targets, lease.Target{NetNS: dst.NetNS, Addr: s.Addr, Share: uint32(share)})
	}
	for ns := range was {
		cut = cut || !allowed[ns] && k.denied(v, src.Self, ns, from, e)
	}
	return targets, cut
}

// denied tells a pod that may no longer be talked to from one that takes no new
// connections: what it has lives on, as through the proxy.
func (k *Keeper) denied(v *store.View, src *mesh.Workload, ns uint64, from netip.Addr, e *entry) bool {
	for _, t := range e.granted {
		if t.NetNS != ns {
			continue
		}
		w := v.Mesh.WorkloadByAddr(src.Network, t.Addr.Addr())
		if w == nil {
			return true
		}
		if p, ok := k.cfg.Pods.ByWorkload(w); !ok || p.NetNS != ns {
			return true
		}
		if !v.Policies.Authorize(w.Namespace, w.Policies, policy.Conn{Peer: src.Identity, Src: netip.AddrPortFrom(from, 0), Dst: t.Addr}).Allowed {
			return true
		}
	}
	return false
}

func (k *Keeper) cut(id uint64) {
	c := k.conns[id]
	if c == nil {
		return
	}
	c.asked = true
	if err := k.cfg.Agent.Cut(id); err != nil && !errors.Is(err, lease.ErrNoAgent) {
		k.cfg.Logger.Warn("a direct connection that must end lives on until its lease does", "err", err)
	}
}

// cutAgain ends a connection that was to end and is still there: the agent may have
// been away, or have failed.
func (k *Keeper) cutAgain(id uint64, c *conn) {
	if k.up && c.asked && (c.inCtx.Err() != nil || c.outCtx.Err() != nil) {
		k.cut(id)
	}
}

// end is the proxy's: its connections end with its leases.
func (k *Keeper) end() {
	for id := range k.conns {
		k.closed(lease.Closed{Conn: id, Lost: true})
	}
}
