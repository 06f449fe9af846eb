package redirect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
	"github.com/ambit-mesh/ambit/ebpf/lease"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
)

const (
	// sweepEvery is how soon the kernel's table and ours are compared.
	sweepEvery = time.Second
	// connecting bounds the time between connect(2) and its SYN, which are one
	// system call: what is older never came to be.
	connecting = 10 * time.Second
)

// Leases puts leases in force: it is the lease.Holder of Hooks.
//
// Order matters. A lease is deleted first, then the connections that the kernel's
// table has under it are destroyed; a connection enters that table before it looks
// at its lease for the last time. So one that races with the end of its lease is
// either seen here or sees it ended (lease.h).
type Leases struct {
	h   *Hooks
	log *slog.Logger

	mu    sync.Mutex // all below
	held  map[lease.Key]*held
	pairs map[uint64]*pair // by id, as long as it has a lease or connections
	conns map[uint64]*directConn
	next  uint64
	ttl   time.Duration
	left  map[uint64]bool // pods that had connections when this agent began
}

// held is one lease in force.
type held struct {
	owner lease.Events // nil: of an agent before this one, until somebody asks again
	until uint64
	pairs []*pair
}

// pair is a target of a key. Its id is never used again, so that connections tell
// under what they were made.
type pair struct {
	id     uint64
	owner  lease.Events
	key    lease.Key
	target lease.Target
	ended  bool
}

type directConn struct {
	pair   *pair
	told   bool
	missed int // sweeps that did not see it
}

// NewLeases takes over what an agent before this one granted. It holds for TTL
// unless a proxy asks for it again. A kernel that cannot end connections from
// outside has no leases: *UnsupportedError.
func (h *Hooks) NewLeases() (*Leases, error) {
	if err := sockdiag.CanDestroy(); errors.Is(err, sockdiag.ErrNoDestroy) {
		return nil, &UnsupportedError{Feature: "ending connections from outside (CONFIG_INET_DIAG_DESTROY)", Err: err}
	} else if err != nil {
		return nil, err
	}
	l := &Leases{h: h, log: h.cfg.Logger, held: map[lease.Key]*held{}, pairs: map[uint64]*pair{}, conns: map[uint64]*directConn{},
		ttl: lease.TTL, left: map[uint64]bool{}}
	// Later than any id of an earlier agent, which counted from its own start.
	l.next = monotonic()
	var (
		k bpf.CgroupLeaseKey
		v bpf.CgroupLease
	)
	it := h.maps[bpf.CgroupMapMeshLeases].Iterate()
	for it.Next(&k, &v) {
		key := keyOf(k)
		hd := &held{until: l.next + uint64(l.ttl)}
		for _, t := range v.Target {
			if t.Id != 0 {
				p := &pair{id: t.Id, key: key, target: lease.Target{NetNS: t.Netns, Addr: endpoint(t.Addr, t.Port)}}
				hd.pairs = append(hd.pairs, p)
				l.pairs[t.Id] = p
			}
		}
		l.held[key] = hd
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read leases: %w", err)
	}
	err := l.each(func(_ uint64, d *bpf.CgroupDirect) error {
		l.left[d.Key.Netns], l.left[d.To] = true, true
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read direct connections: %w", err)
	}
	h.mu.Lock()
	h.leases = l
	h.mu.Unlock()
	return l, nil
}

// monotonic is the clock that programs read (bpf_ktime_get_ns).
func monotonic() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic("BUG: no monotonic clock: " + err.Error())
	}
	return uint64(ts.Nano())
}

// Grant implements lease.Holder.
func (l *Leases) Grant(owner lease.Events, g lease.Grant) error {
	if err := g.Check(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(g.Targets) > 0 {
		if err := l.admissible(g); err != nil {
			return err
		}
	}
	old := l.held[g.Key]
	if len(g.Targets) == 0 && (old == nil || old.owner != owner) {
		return nil // somebody else's by now
	}
	next := &held{owner: owner, until: monotonic() + uint64(l.ttl)}
	kept := map[*pair]bool{}
	for _, t := range g.Targets {
		p := l.pairOf(old, owner, g.Key, t)
		kept[p] = true
		next.pairs = append(next.pairs, p)
	}
	if err := l.put(g.Key, next); err != nil {
		return err
	}
	if old == nil {
		return nil
	}
	return l.end(old, g.Cut, func(p *pair) bool { return kept[p] })
}

// admissible asks what the proxy cannot know: that both pods are accelerated, and
// that the addresses are theirs.
func (l *Leases) admissible(g lease.Grant) error {
	if l.h.acceleratedNS(g.Key.NetNS) == nil {
		return &lease.RefusedError{Reason: "the source pod is not accelerated"}
	}
	for _, t := range g.Targets {
		if l.h.acceleratedNS(t.NetNS) == nil {
			return &lease.RefusedError{Reason: fmt.Sprintf("the pod at %v is not accelerated", t.Addr)}
		}
		var owner uint64
		if err := l.h.maps[bpf.CgroupMapMeshPods].Lookup(address16(t.Addr.Addr()), &owner); err != nil || owner != t.NetNS {
			return &lease.RefusedError{Reason: fmt.Sprintf("%v is not the pod's address", t.Addr.Addr())}
		}
		switch t.Addr.Port() {
		case PortOutbound, PortInbound, PortHBONE, PortDNS:
			return &lease.RefusedError{Reason: fmt.Sprintf("%v is the proxy's own", t.Addr)}
		}
	}
	return nil
}

// pairOf finds the pair that the key has already, or makes one. Connections that
// an earlier owner's proxy or agent knew are the new one's.
func (l *Leases) pairOf(old *held, owner lease.Events, k lease.Key, t lease.Target) *pair {
	if old != nil {
		for _, p := range old.pairs {
			if p.target.NetNS != t.NetNS || p.target.Addr != t.Addr {
				continue
			}
			p.target.Share = t.Share
			if p.owner != owner {
				l.handOver(p, owner)
			}
			return p
		}
	}
	l.next++
	p := &pair{id: l.next, owner: owner, key: k, target: t}
	l.pairs[p.id] = p
	return p
}

// handOver gives a pair and its connections to another owner, whom the next sweep
// tells of them.
func (l *Leases) handOver(p *pair, owner lease.Events) {
	for cookie, c := range l.conns {
		if c.pair != p {
			continue
		}
		if c.told && p.owner != nil {
			p.owner.Closed(lease.Closed{Conn: cookie, Lost: true})
		}
		c.told = false
	}
	p.owner = owner
}

func (l *Leases) put(k lease.Key, hd *held) error {
	if len(hd.pairs) == 0 {
		return l.drop(k)
	}
	v := bpf.CgroupLease{Until: hd.until}
	var upto uint64
	for i, p := range hd.pairs {
		upto += uint64(p.target.Share)
		v.Target[i] = bpf.CgroupLeaseTarget{
			Addr: address16(p.target.Addr.Addr()), Port: port16(p.target.Addr), Upto: uint32(upto), Id: p.id, Netns: p.target.NetNS,
		}
	}
	if err := l.h.maps[bpf.CgroupMapMeshLeases].Put(rawKey(k), v); err != nil {
		// What was there before may say too much.
		return errors.Join(fmt.Errorf("write lease: %w", err), l.drop(k))
	}
	l.held[k] = hd
	return nil
}

func (l *Leases) drop(k lease.Key) error {
	delete(l.held, k)
	if err := l.h.maps[bpf.CgroupMapMeshLeases].Delete(rawKey(k)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete lease: %w", err)
	}
	return nil
}

// end is for pairs that the kernel no longer has.
func (l *Leases) end(old *held, cut bool, kept func(*pair) bool) error {
	gone := map[uint64]bool{}
	for _, p := range old.pairs {
		if kept != nil && kept(p) {
			continue
		}
		p.ended = true
		gone[p.id] = true
	}
	if !cut || len(gone) == 0 {
		return nil
	}
	return l.destroyIf(func(d *bpf.CgroupDirect) bool { return gone[d.Lease] })
}

// Renew implements lease.Holder.
func (l *Leases) Renew(owner lease.Events) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	until := monotonic() + uint64(l.ttl)
	var errs []error
	for k, hd := range l.held {
		if hd.owner == owner {
			hd.until = until
			errs = append(errs, l.put(k, hd))
		}
	}
	return errors.Join(errs...)
}

// Cut implements lease.Holder.
func (l *Leases) Cut(owner lease.Events, conn uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var d bpf.CgroupDirect
	if err := l.h.maps[bpf.CgroupMapMeshDirect].Lookup(conn, &d); errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read connection: %w", err)
	}
	if p := l.pairs[d.Lease]; p == nil || p.owner != owner {
		return &lease.RefusedError{Reason: "the connection is not the proxy's"}
	}
	return l.kill(conn, &d)
}

// Abandon implements lease.Holder.
func (l *Leases) Abandon(owner lease.Events) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endWhere("the proxy is gone", true, func(k lease.Key, hd *held) bool { return hd.owner == owner })
	if err := l.destroyIf(func(d *bpf.CgroupDirect) bool { p := l.pairs[d.Lease]; return p != nil && p.owner == owner }); err != nil {
		l.log.Warn("direct connections of a proxy that is gone may live on until the next look", "err", err)
	}
	for _, p := range l.pairs {
		if p.owner == owner {
			p.owner = nil
		}
	}
}

// leave ends the leases that concern a pod.
func (l *Leases) leave(cookie uint64, cut bool) {
	l.endWhere("a pod left", cut, func(k lease.Key, hd *held) bool {
		return k.NetNS == cookie || slices.ContainsFunc(hd.pairs, func(p *pair) bool { return p.target.NetNS == cookie })
	})
	if !cut {
		return
	}
	if err := l.destroyIf(func(d *bpf.CgroupDirect) bool { return d.Key.Netns == cookie || d.To == cookie }); err != nil {
		l.log.Warn("direct connections of a pod that left may live on", "err", err)
	}
}

// endWhere ends leases, with their connections or without.
func (l *Leases) endWhere(why string, cut bool, f func(lease.Key, *held) bool) {
	for k, hd := range l.held {
		if !f(k, hd) {
			continue
		}
		if err := errors.Join(l.drop(k), l.end(hd, cut, nil)); err != nil {
			l.log.Warn("a lease cannot be ended at once", "destination", k.Addr, "why", why, "err", err)
		}
	}
}

// destroyIf destroys the connections that f names.
func (l *Leases) destroyIf(f func(*bpf.CgroupDirect) bool) error {
	return l.each(func(cookie uint64, d *bpf.CgroupDirect) error {
		if !f(d) {
			return nil
		}
		return l.kill(cookie, d)
	})
}

// each calls f for each connection that the kernel knows. All of them are read
// first: the kernel deletes as f destroys.
func (l *Leases) each(f func(uint64, *bpf.CgroupDirect) error) error {
	type entry struct {
		cookie uint64
		d      bpf.CgroupDirect
	}
	var (
		all []entry
		e   entry
	)
	it := l.h.maps[bpf.CgroupMapMeshDirect].Iterate()
	for it.Next(&e.cookie, &e.d) {
		all = append(all, e)
	}
	errs := []error{it.Err()}
	for i := range all {
		errs = append(errs, f(all[i].cookie, &all[i].d))
	}
	return errors.Join(errs...)
}

// kill ends both ends of a connection. One without a SYN yet sees for itself that
// its lease has ended.
func (l *Leases) kill(cookie uint64, d *bpf.CgroupDirect) error {
	if d.Flow.Netns == 0 {
		return nil
	}
	local, remote := endpoint(d.Flow.Local, d.Flow.LocalPort), endpoint(d.Flow.Remote, d.Flow.RemotePort)
	errs := []error{l.killEnd(d.Flow.Netns, local, remote, cookie), l.killEnd(d.To, remote, local, 0)}
	if errors.Is(errs[0], sockdiag.ErrNoSocket) {
		// Its entry outlived it, or will go with its last event.
		if err := l.h.maps[bpf.CgroupMapMeshDirect].Delete(cookie); err == nil {
			l.closed(lease.Closed{Conn: cookie, Lost: true})
		}
		errs[0] = nil
	}
	if errors.Is(errs[1], sockdiag.ErrNoSocket) {
		errs[1] = nil
	}
	return errors.Join(errs...)
}

// killEnd ends the socket of a pod by its addresses; socket is its number, 0 where
// the kernel's table does not have it.
func (l *Leases) killEnd(pod uint64, local, remote netip.AddrPort, socket uint64) error {
	ns := l.h.acceleratedNS(pod)
	if ns == nil {
		return sockdiag.ErrNoSocket // gone, or going with all that is in it
	}
	return sockdiag.DestroyConnection(ns, local, remote, socket)
}

// Run hears of connections and ends leases that nobody renews, until ctx ends.
// What is in force stays so, for the next agent, for TTL at most.
func (l *Leases) Run(ctx context.Context) error {
	r, err := ringbuf.NewReader(l.h.maps[bpf.CgroupMapMeshDirectEvents])
	if err != nil {
		return fmt.Errorf("read events of direct connections: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { <-ctx.Done(); return r.Close() })
	g.Go(func() error { return l.read(r) })
	g.Go(func() error {
		t := time.NewTicker(sweepEvery)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-t.C:
				if err := l.Sweep(); err != nil {
					l.log.Warn("direct connections cannot be looked after", "err", err)
				}
			}
		}
	})
	return g.Wait()
}

func (l *Leases) read(r *ringbuf.Reader) error {
	var (
		rec ringbuf.Record
		e   bpf.CgroupDirectEvent
	)
	for {
		if err := r.ReadInto(&rec); errors.Is(err, os.ErrClosed) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read events of direct connections: %w", err)
		}
		if err := decodeEvent(rec.RawSample, &e); err != nil {
			return err
		}
		l.event(&e)
	}
}

func (l *Leases) event(e *bpf.CgroupDirectEvent) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch e.Kind {
	case bpf.CgroupDirectKindDIRECT_VOID:
		if err := l.kill(e.Cookie, &e.Direct); err != nil {
			l.log.Debug("a connect whose lease has ended waits for its timeout", "err", err)
		}
	case bpf.CgroupDirectKindDIRECT_OPENED:
		l.opened(e.Cookie, &e.Direct, e.At)
	case bpf.CgroupDirectKindDIRECT_CLOSED:
		l.opened(e.Cookie, &e.Direct, e.At) // if it has not been told yet
		l.closed(lease.Closed{Conn: e.Cookie, Failed: e.Direct.Open == 0, Sent: e.Sent, Received: e.Received, RTT: time.Duration(e.Rtt) * time.Microsecond,
			Retransmits: e.Retransmits, Took: time.Duration(e.At - e.Direct.Since)})
	}
}

// opened tells the owner, once.
func (l *Leases) opened(cookie uint64, d *bpf.CgroupDirect, now uint64) {
	c := l.conns[cookie]
	if c == nil {
		p := l.pairs[d.Lease]
		if p == nil {
			return // nobody's: the next sweep ends it
		}
		c = &directConn{pair: p}
		l.conns[cookie] = c
	}
	c.missed = 0
	if c.told || c.pair.owner == nil {
		return
	}
	c.told = true
	c.pair.owner.Opened(lease.Opened{Conn: cookie, Key: c.pair.key, Target: d.To, Age: time.Duration(now - d.Since),
		Src: endpoint(d.Flow.Local, d.Flow.LocalPort), Dst: endpoint(d.Flow.Remote, d.Flow.RemotePort)})
}

func (l *Leases) closed(e lease.Closed) {
	c := l.conns[e.Conn]
	if c == nil {
		return
	}
	delete(l.conns, e.Conn)
	if c.told && c.pair.owner != nil {
		c.pair.owner.Closed(e)
	}
}

// Sweep compares tables with the kernel's: events may be lost, owners hang, and
// what an agent before this one left may be nobody's.
func (l *Leases) Sweep() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := monotonic()
	l.endWhere("nobody renewed it", true, func(_ lease.Key, hd *held) bool { return hd.until <= now })
	seen := map[uint64]bool{}
	inUse := map[*pair]bool{}
	err := l.each(func(cookie uint64, d *bpf.CgroupDirect) error {
		p := l.pairs[d.Lease]
		switch {
		case d.Flow.Netns == 0 && now-min(now, d.Since) > uint64(connecting):
			if err := l.h.maps[bpf.CgroupMapMeshDirect].Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("forget a connect that came to nothing: %w", err)
			}
			return nil
		case p == nil || p.ended && p.owner == nil:
			return l.kill(cookie, d)
		case d.Open != 0:
			l.opened(cookie, d, now)
		}
		seen[cookie], inUse[p] = true, true
		return nil
	})
	for cookie, c := range l.conns {
		if seen[cookie] {
			inUse[c.pair] = true
			continue
		}
		if c.missed++; c.missed > 1 {
			l.closed(lease.Closed{Conn: cookie, Lost: true})
		}
	}
	for id, p := range l.pairs {
		if p.ended && !inUse[p] {
			delete(l.pairs, id)
		}
	}
	return err
}

// enrolAccelerated attaches what leases need before a program can find one. Where
// that fails, the pod is captured as any other.
func (h *Hooks) enrolAccelerated(p *pod, rules PodRules) error {
	h.leaseHooks.Lock()
	defer h.leaseHooks.Unlock()
	if err := h.accelerate(p); err != nil {
		h.cfg.Logger.Warn("a pod cannot be accelerated: its connections go through the proxy", "err", err)
		rules.Accelerate = false
	}
	return h.enrol(p.cookie, p.enrolment(rules))
}

// pruneLeaseHooks detaches what leases need once no pod is accelerated.
func (h *Hooks) pruneLeaseHooks() error {
	if _, err := os.Stat(h.path(leaseDir)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	h.leaseHooks.Lock()
	defer h.leaseHooks.Unlock()
	var (
		c uint64
		e bpf.CgroupEnrolment
	)
	it := h.maps[bpf.CgroupMapMeshEnrolled].Iterate()
	for it.Next(&c, &e) {
		if e.Flags&bpf.CgroupEnrolmentFlagENROL_ACCELERATE != 0 {
			return nil
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read enrolments: %w", err)
	}
	if err := os.RemoveAll(h.path(leaseDir)); err != nil {
		return fmt.Errorf("detach what acceleration needs: %w", err)
	}
	return nil
}

// accelerate keeps what it takes to end a pod's connections.
func (h *Hooks) accelerate(p *pod) error {
	if err := h.attachCgroup(h.cfg.CgroupRoot, h.path(leaseDir), leaseHooks, h.lease); err != nil {
		return fmt.Errorf("attach what acceleration needs: %w", err)
	}
	return h.enter(p.cookie, p.ns)
}

func (h *Hooks) enter(cookie uint64, ns *netns.NS) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.accelerated[cookie] != nil {
		return nil
	}
	ns, err := ns.Dup()
	if err != nil {
		return err
	}
	h.accelerated[cookie] = ns
	return nil
}

// retire ends a pod's leases; its connections may come to their ends. The kernel
// knows already that it takes no new ones.
func (h *Hooks) retire(cookie uint64) {
	h.mu.Lock()
	l := h.leases
	h.mu.Unlock()
	if l != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.leave(cookie, false)
	}
}

// decelerate ends a pod's leases and direct connections.
func (h *Hooks) decelerate(cookie uint64, ns *netns.NS) {
	h.mu.Lock()
	l := h.leases
	h.mu.Unlock()
	if l != nil {
		l.mu.Lock() // until the namespace is closed: who holds the lock enters it
		defer l.mu.Unlock()
		if ns != nil && l.left[cookie] && h.acceleratedNS(cookie) == nil {
			if err := h.enter(cookie, ns); err != nil {
				h.cfg.Logger.Warn("direct connections of a pod may live on", "err", err)
			}
		}
		delete(l.left, cookie)
		if h.acceleratedNS(cookie) != nil {
			l.leave(cookie, true)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if ns := h.accelerated[cookie]; ns != nil {
		delete(h.accelerated, cookie)
		_ = ns.Close() // only ever entered
	}
}

// Gone ends what is held of a namespace that is being given up: it would not end
// while somebody holds it.
func (h *Hooks) Gone(ns *netns.NS) {
	c, err := ns.Cookie()
	if err != nil {
		h.cfg.Logger.Warn("a namespace that is gone is held", "err", err)
		return
	}
	h.decelerate(c, ns)
}

func (h *Hooks) acceleratedNS(cookie uint64) *netns.NS {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.accelerated[cookie]
}
