package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

const (
	retryMin = 50 * time.Millisecond
	retryMax = 5 * time.Second
)

// phase is how far a pod is out of the mesh again.
//
//	serving ──un-enrol──▶ released ──Propagation──▶ draining ──Drain──▶ clean
//	   ▲                     │                         │
//	   └────── enrol ────────┴─────────────────────────┘
type phase int

const (
	serving  phase = iota // or on the way there
	released              // not captured any more; the proxy still serves
	draining              // the proxy has been told to stop
)

// worker reconciles one pod.
type worker struct {
	agent *Agent
	uid   string
	name  string // namespace/name
	log   *slog.Logger
	wakec chan struct{} // cap 1: "look again"

	mu      sync.Mutex
	desired *Pod // nil: the pod is gone
	check   bool // compare the rules with the kernel
	refused bool // a proxy's snapshot did not take the pod
	shown   Status
	rewrite bool   // apply the rules again
	asked   uint64 // counts wishes, also those to compare the rules
	done    uint64 // the last wish that was tried
	enabled uint64 // number of the namespace that is captured and served as wished; 0: none
	failure string // of the last try

	// Owned by run's goroutine.
	ns       *netns.NS
	rules    redirect.PodRules // what was applied last, if applied
	applied  bool
	captured bool // by an earlier agent, whose state still stands
	vanished bool // there is no such namespace
	waiting  bool // captured, and waits for the proxy before it changes over
	acked    bool
	handed   Pod  // what acked is about
	again    bool // the proxy was asked to listen again, in vain so far
	phase    phase
	until    time.Time // of released and draining
	attempts int
	dns      bool   // the proxy answers DNS in the pod
	cleared  bool   // nothing of an earlier agent's is left
	older    *older // nil before the first rules

	rewriting bool // the rules are right for the pod, and not what Rules make now
}

func (w *worker) want(p *Pod) {
	w.mu.Lock()
	w.desired = p
	w.asked++
	w.mu.Unlock()
	w.wake()
}

func (w *worker) wake() {
	select {
	case w.wakec <- struct{}{}:
	default: // it will look anyway
	}
}

func (w *worker) verify() {
	w.mu.Lock()
	w.check = true
	w.asked++
	w.mu.Unlock()
	w.wake()
}

func (w *worker) snapshot(err error) {
	w.mu.Lock()
	w.refused = err != nil
	w.mu.Unlock()
	w.wake()
}

// run looks at the pod whenever something may have changed.
func (w *worker) run(ctx context.Context) {
	defer w.closeNS()
	for {
		wait, done := w.step(ctx)
		if ctx.Err() != nil {
			return
		}
		if done && w.agent.retire(w) {
			return
		}
		if !w.sleep(ctx, wait) {
			return
		}
	}
}

// sleep waits for a wake-up, or for d if it is not 0.
func (w *worker) sleep(ctx context.Context, d time.Duration) bool {
	var timec <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timec = t.C
	}
	select {
	case <-ctx.Done():
		return false
	case <-w.wakec:
	case <-timec:
	}
	return true
}

// step does what is to be done now. It returns when to come back without being
// woken (0: never), and whether the worker has nothing left to do.
func (w *worker) step(ctx context.Context) (time.Duration, bool) {
	defer func() { w.agent.progress(w.uid, !w.waiting, w.settled()) }()
	w.mu.Lock()
	var d *Pod
	if w.desired != nil {
		p := *w.desired
		d = &p
	}
	check, asked := w.check, w.asked
	w.rewriting = w.rewriting || w.rewrite
	w.check, w.rewrite = false, false
	if w.refused {
		w.acked = false
	}
	w.refused = false
	w.mu.Unlock()

	switch {
	case d == nil:
		w.tell(asked, 0, nil)
		return w.retry(w.drop(ctx)), true
	case d.Enrolled:
		w.phase = serving
		err := w.enrol(ctx, *d, check)
		if err != nil && ctx.Err() == nil {
			w.show(*d, w.despite(*d), err.Error())
			w.agent.metrics.failures.Inc()
		}
		if err != nil {
			w.tell(asked, 0, err)
		} else {
			w.tell(asked, w.ns.Inode(), nil)
		}
		return w.sooner(w.retry(err), *d), false
	default:
		w.tell(asked, 0, nil)
		return w.unenrol(ctx, d.Why)
	}
}

// settled reports whether the pod is captured, leaves, or is gone.
func (w *worker) settled() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.applied || w.vanished || w.desired == nil || !w.desired.Enrolled
}

// tell has Admit hear what came of a wish.
func (w *worker) tell(asked, enabled uint64, err error) {
	w.mu.Lock()
	w.done, w.enabled, w.failure = asked, enabled, ""
	if err != nil {
		w.failure = err.Error()
	}
	w.mu.Unlock()
	w.agent.notify()
}

// despite is what a pod is called that cannot be enrolled at the moment. One
// that was enabled and is still captured stays so, without a proxy and after a
// restart of the agent: clients that were told otherwise would reach it in clear
// text, or try to.
func (w *worker) despite(p Pod) Redirection {
	w.mu.Lock()
	defer w.mu.Unlock()
	if (w.applied || w.captured) && w.shown.Redirection == Enabled && w.shown.NetNS == p.NetNS {
		return Enabled
	}
	return Pending
}

// retry returns how long to wait after err, jittered so that pods of one cause
// do not come back together.
func (w *worker) retry(err error) time.Duration {
	if err == nil {
		w.attempts = 0
		return 0
	}
	d := min(retryMin<<min(w.attempts, 16), retryMax)
	w.attempts++
	return d/2 + rand.N(d)
}

func (w *worker) enrol(ctx context.Context, p Pod, check bool) error {
	if err := w.open(ctx, p); err != nil {
		return err
	}
	if !w.applied {
		w.dns = w.resolves(p) // of a proxy that an earlier agent handed the pod to
	}
	rules := redirect.PodRules{
		BypassInbound: p.BypassInbound, DNS: p.DNS && w.dns,
		IPv6:            slices.ContainsFunc(p.Addrs, func(a netip.Addr) bool { return a.Is6() && !a.Is4In6() }),
		ExcludeOutbound: p.ExcludeOutbound, ExcludeInbound: p.ExcludeInbound,
		Accelerate: p.Accelerate && w.agent.cfg.Accelerates == "",
	}
	if p.Accelerate && !rules.Accelerate {
		p.note(annotationAccelerate + " has no effect on this node: " + w.agent.cfg.Accelerates)
	}
	// The node's probes first: once rules are there, others are refused.
	if err := w.agent.probes.put(w.uid, p.Addrs); err != nil {
		return fmt.Errorf("exempt the node's probes: %w", err)
	}
	fresh := !w.acked
	first, handed := w.listeners(ctx, p)
	if w.waiting = first && handed != nil; w.waiting {
		return handed
	}
	if !w.applied || w.rules != rules || w.rewriting || check {
		if err := w.agent.kernel(ctx, func() error { return w.apply(rules) }); err != nil {
			return fmt.Errorf("redirect: %w", err)
		}
		w.meetOlder(ctx, rules)
	}
	w.tendOlder(ctx, p, rules, check)
	w.agent.progress(w.uid, true, true) // the proxy may take its time
	if handed != nil {
		return handed
	}
	if err := w.hand(ctx, p); err != nil {
		return err
	}
	if fresh || p.DNS && !w.dns {
		w.dns = w.resolves(p)
		if fresh && p.DNS && !w.dns {
			w.log.Info("DNS is not captured: the proxy does not answer it in the pod (ISTIO_META_DNS_CAPTURE)")
		}
	}
	if rules.DNS = p.DNS && w.dns; w.rules != rules {
		if err := w.agent.kernel(ctx, func() error { return w.apply(rules) }); err != nil {
			return fmt.Errorf("redirect DNS: %w", err)
		}
	}
	w.cleared = true
	w.show(p, Enabled, p.reason())
	return nil
}

// listeners hands over a pod that these rules do not capture yet: until now it
// has talked without the mesh, and for as long as it takes the proxy to listen
// its connections would be refused. Rules follow whatever comes of it; from there
// on it fails closed. But a pod that rules of another sort capture (first) is
// closed already, and changes over once the proxy is there.
func (w *worker) listeners(ctx context.Context, p Pod) (first bool, err error) {
	w.waiting = false
	if w.applied {
		return false, nil
	}
	w.captured, err = w.agent.cfg.Rules.Present(w.ns)
	if err != nil {
		return false, nil // comes again with the rules, where it is told
	}
	if f := w.agent.cfg.Waiting; f != nil && w.captured {
		if first, err = f(w.ns); err != nil {
			return false, fmt.Errorf("look for another redirector's state: %w", err)
		}
	}
	if !first && (w.captured || w.agent.holding()) {
		return false, nil
	}
	return first, w.hand(ctx, p)
}

// open makes w.ns the namespace at the pod's path.
func (w *worker) open(ctx context.Context, p Pod) error {
	if p.NetNS == "" {
		return errors.New("the pod's network namespace is not known yet")
	}
	if w.ns != nil {
		inode, err := netns.Inode(p.NetNS)
		if err == nil && inode == w.ns.Inode() {
			return nil
		}
		w.log.Info("network namespace is gone or another one", "path", p.NetNS)
		w.forget(ctx)
	}
	ns, err := w.agent.open(p.NetNS)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, netns.ErrNotNetNS) {
			w.forget(ctx) // also what the first snapshot named
			w.vanished = true
		}
		return err
	}
	if err := w.claim(ns, p); err != nil {
		return errors.Join(err, ns.Close())
	}
	w.ns, w.vanished = ns, false
	return nil
}

// forget drops what belongs to a namespace that is no more. Its rules went with it.
func (w *worker) forget(ctx context.Context) {
	if err := w.agent.cfg.Proxies.Del(ctx, w.uid); err != nil && ctx.Err() == nil {
		w.log.Warn("proxy was not told that the pod is gone", "err", err)
	}
	if w.ns != nil && w.agent.cfg.Gone != nil {
		w.agent.cfg.Gone(w.ns)
	}
	w.closeNS()
	w.cleared = false // its path may lead there again, rules and all
}

func (w *worker) closeNS() {
	if w.ns != nil {
		_ = w.ns.Close() // only ever entered and passed on
		w.unclaim()
	}
	w.ns, w.applied, w.captured, w.acked, w.dns, w.older = nil, false, false, false, false, nil
}

func (w *worker) apply(rules redirect.PodRules) error {
	if w.applied && w.rules == rules && !w.rewriting {
		err := w.agent.cfg.Rules.Check(w.ns, rules)
		if err == nil {
			return nil
		}
		if errors.Is(err, redirect.ErrDrift) {
			w.log.Warn("redirection was changed by somebody else: repairing it", "err", err)
			w.agent.metrics.repairs.Inc()
		}
	}
	w.applied = false
	if err := w.agent.cfg.Rules.Apply(w.ns, rules); err != nil {
		return err
	}
	w.rules, w.applied, w.rewriting = rules, true, false
	return nil
}

// hand makes the proxy serve the pod, with listeners that the rules know.
func (w *worker) hand(ctx context.Context, p Pod) error {
	listening := func() (bool, error) {
		if w.agent.cfg.Listening == nil {
			return true, nil
		}
		return w.agent.cfg.Listening(w.ns)
	}
	if err := w.add(ctx, p); err != nil {
		return err
	}
	ok, err := listening()
	if ok || err != nil {
		w.again = w.again && !ok
		return err
	}
	// Another proxy may have come since, or none be there.
	w.acked = false
	if err := w.add(ctx, p); err != nil {
		return err
	}
	if ok, err = listening(); ok || err != nil {
		return err
	}
	if w.again {
		w.acked = false
		return errListening // asking ends the pod's connections: once is enough
	}
	// A proxy keeps the listeners of a pod that it has, and these are older than
	// the rules' knowledge of the proxy.
	w.again = true
	w.log.Info("the proxy has to listen again: its listeners are older than the redirection")
	w.acked = false
	if err := w.agent.cfg.Proxies.Del(ctx, w.uid); err != nil {
		return fmt.Errorf("have ztunnel listen again: %w", err)
	}
	if err := w.add(ctx, p); err != nil {
		return err
	}
	if ok, err = listening(); ok || err != nil {
		return err
	}
	w.acked = false
	return errListening
}

var errListening = errors.New("ztunnel took the pod, but the redirection sees no listener of it there: connections are refused")

func (w *worker) add(ctx context.Context, p Pod) error {
	same := w.handed.Name == p.Name && w.handed.Namespace == p.Namespace && w.handed.ServiceAccount == p.ServiceAccount
	if w.acked && same {
		return nil
	}
	w.acked = false
	err := w.agent.cfg.Proxies.Add(ctx, handoff.Pod{
		UID: p.UID, Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, NS: w.ns,
	})
	if err != nil {
		return fmt.Errorf("hand over to ztunnel: %w", err)
	}
	w.acked, w.handed = true, p
	return nil
}

// unenrol takes a living pod out of the mesh, one phase per call.
func (w *worker) unenrol(ctx context.Context, why string) (time.Duration, bool) {
	if w.ns == nil && !w.cleared {
		if err := w.resume(ctx); err != nil {
			w.log.Warn("cannot see whether an earlier agent left redirection in the pod", "err", err)
			return w.retry(err), false
		}
		w.cleared = true
	}
	switch {
	case w.ns == nil:
		w.forgetStatus(ctx)
		return 0, true
	case w.phase == serving:
		w.hide()
		if err := w.agent.kernel(ctx, func() error { return w.agent.cfg.Rules.Release(w.ns) }); err != nil {
			w.log.Warn("capture cannot be ended", "err", err)
			return w.retry(err), false
		}
		w.log.Info("pod leaves the mesh: capture has ended, the proxy drains", "why", why)
		w.applied = false
		w.phase, w.until = released, time.Now().Add(w.agent.cfg.Propagation)
		w.attempts = 0
		return w.agent.cfg.Propagation, false
	case time.Now().Before(w.until):
		return time.Until(w.until), false
	case w.phase == released:
		if err := w.agent.cfg.Proxies.Del(ctx, w.uid); err != nil && ctx.Err() == nil {
			// A proxy that lost its connection learns it from its next snapshot.
			w.log.Warn("proxy was not told that the pod left the mesh", "err", err)
		}
		w.acked = false
		w.phase, w.until = draining, time.Now().Add(w.agent.cfg.Drain)
		return w.agent.cfg.Drain, false
	default:
		if err := w.remove(ctx); err != nil {
			w.log.Warn("redirection cannot be removed", "err", err)
			return w.retry(err), false
		}
		w.closeNS()
		w.log.Info("pod left the mesh")
		return 0, true
	}
}

func (w *worker) remove(ctx context.Context) error {
	if err := w.agent.kernel(ctx, func() error { return w.agent.cfg.Rules.Remove(w.ns) }); err != nil {
		return err
	}
	w.cleared = true
	return w.agent.probes.put(w.uid, nil)
}

// resume opens the namespace of a pod that an earlier agent left captured, or was
// taking out of the mesh when it ended. How far it was nobody knows, and what the
// proxy carries for the pod needs its time again: un-enrolment begins anew.
func (w *worker) resume(ctx context.Context) error {
	w.mu.Lock()
	var p Pod
	if w.desired != nil {
		p = *w.desired
	}
	w.mu.Unlock()
	if p.NetNS == "" {
		return nil
	}
	ns, err := w.agent.open(p.NetNS)
	if err != nil {
		return nil // no namespace, no rules
	}
	if w.others(ns, p) || w.claim(ns, p) != nil {
		w.log.Warn("pod is not in the mesh, and names the network namespace of a pod that is", "path", p.NetNS)
		return ns.Close()
	}
	present := false
	err = w.agent.kernel(ctx, func() (err error) { present, err = w.agent.cfg.Rules.Present(ns); return err })
	if err != nil || !present {
		w.unclaim()
		return errors.Join(err, ns.Close())
	}
	w.log.Info("an earlier agent left redirection in the pod")
	w.ns, w.phase = ns, serving
	return nil
}

// forgetStatus takes away what an earlier agent said of a pod that is not enrolled.
func (w *worker) forgetStatus(ctx context.Context) {
	w.hide()
	if err := w.agent.cfg.Proxies.Del(ctx, w.uid); err != nil && ctx.Err() == nil {
		w.log.Warn("proxy was not told that the pod is not in the mesh", "err", err)
	}
	if err := w.agent.probes.put(w.uid, nil); err != nil {
		w.log.Warn("node rules cannot be written", "err", err)
	}
}

// drop lets go of a pod that is gone. Its rules go with its namespace, and while
// that one lasts they keep the pod's last connections from leaving in plaintext.
func (w *worker) drop(ctx context.Context) error {
	w.hide()
	w.forget(ctx)
	if err := w.agent.probes.put(w.uid, nil); err != nil {
		w.log.Warn("node rules cannot be written", "err", err)
	}
	w.log.Info("pod is gone")
	return nil
}

// show writes the pod's status if it says something else than before.
func (w *worker) show(p Pod, r Redirection, reason string) {
	w.mu.Lock()
	old := w.shown
	w.mu.Unlock()
	s := Status{
		UID: p.UID, Namespace: p.Namespace, Name: p.Name, NetNS: p.NetNS,
		Redirection: r, Reason: reason, Since: old.Since,
		PreEnrolment: w.older.count(),
	}
	if s.PreEnrolment > 0 {
		s.OnEnrol = p.OnEnrol.String()
	}
	switch {
	case w.applied:
		s.Via = w.agent.cfg.Via
	case w.captured:
		s.Via = old.Via
	}
	if old.Redirection != r {
		s.Since = time.Now().UTC().Truncate(time.Second)
	}
	if s == old {
		return
	}
	if err := w.agent.cfg.Status.Write(s); err != nil {
		w.log.Error("pod status cannot be written", "err", err)
		return
	}
	w.mu.Lock()
	w.shown = s
	w.mu.Unlock()
	level := slog.LevelInfo
	if r == Pending || reason != p.Why {
		level = slog.LevelWarn
	}
	w.log.Log(context.Background(), level, "pod redirection", "redirection", string(r), "why", reason)
}

// hide removes the pod's status.
func (w *worker) hide() {
	if err := w.agent.cfg.Status.Remove(w.uid); err != nil {
		w.log.Error("pod status cannot be removed", "err", err)
	}
	w.older = nil
	w.mu.Lock()
	w.shown = Status{}
	w.mu.Unlock()
}
