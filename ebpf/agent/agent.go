// Package agent brings the node's pods into the mesh and keeps them there: from
// the pods a Source wants enrolled to rules in their network namespaces, a proxy
// that serves them, and a status that says so.
//
//	Source ─ all local pods ─▶ one worker per pod
//	    enrol:    open namespace → rules → proxy's ack → status enabled
//	    un-enrol: status away → capture ends → proxy drains → rules away
//	    gone:     status away → proxy stops → namespace let go
//
// Capture comes before the proxy and goes before it, so that a pod is never
// believed to be captured when it is not; while the proxy is missing the pod's
// connections are refused. The order of un-enrolment lets peers hear of it first.
//
// Each worker owns its pod's state; workers share a bounded number of slots for
// kernel work and nothing else, so a pod that fails delays no other. The package
// does not know the rules' content (redirect) nor the protocol (handoff).
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
)

// Pod is a local pod as its Source sees it.
type Pod struct {
	UID            string
	Namespace      string
	Name           string
	ServiceAccount string
	NetNS          string // path of the network namespace, "" while unknown
	Addrs          []netip.Addr
	Enrolled       bool
	Why            string // what decided Enrolled
	Undecided      bool   // its namespace is not known yet, so Enrolled may change in a moment
	RuntimeUID     string // what the container runtime calls a static pod; "": as UID
	BypassInbound  bool
	DNS            bool // its queries are to go through the proxy, if that answers them

	OnEnrol                         OnEnrol
	Accelerate                      bool // connections with other such pods of the node may do without the proxy (Config.Accelerates)
	ExcludeOutbound, ExcludeInbound redirect.Ports
	Notes                           string // annotations that could not be read
}

// Source knows the node's pods.
type Source interface {
	// Run calls update with all pods of the node, first as soon as they are
	// known and then whenever one changed, from one goroutine, until ctx ends.
	Run(ctx context.Context, update func([]Pod)) error
}

// Proxies is how pods reach the node proxy; *handoff.Server is one.
type Proxies interface {
	Run(ctx context.Context) error
	Track(p handoff.Pod) error
	Add(ctx context.Context, p handoff.Pod) error
	Del(ctx context.Context, uid string) error
}

// Rules is how a pod is captured; *redirect.Dataplane is one, and *redirect.Hooks.
type Rules interface {
	Apply(ns *netns.NS, r redirect.PodRules) error
	Check(ns *netns.NS, r redirect.PodRules) error
	Release(ns *netns.NS) error
	Remove(ns *netns.NS) error
	Present(ns *netns.NS) (bool, error)
	Uncaptured(ns *netns.NS, r redirect.PodRules) (redirect.Uncaptured, error)
	Reset(ns *netns.NS, sockets []sockdiag.Socket) (int, error)
}

// HostRules exempts the node's own probes; *redirect.Host is one.
type HostRules interface {
	Set(pods []netip.Addr) error
}

const (
	// watchInterval is how soon a vanished namespace is noticed at the latest.
	watchInterval = 2 * time.Second
	// verifyInterval is how soon rules that somebody changed are repaired.
	verifyInterval = 30 * time.Second

	defaultPropagation = time.Second
	defaultDrain       = handoff.DrainTime

	// kernelSlots bounds concurrent rule changes: each opens a few sockets and
	// waits for the kernel's one lock on nftables. Arbitrary.
	kernelSlots = 8
)

// Config is what an Agent is made of.
type Config struct {
	Source  Source
	Proxies Proxies
	Rules   Rules
	Host    HostRules // nil: probes are not exempted
	Status  *StatusDir
	// Attachments keeps what container runtimes say across restarts; nil: it is
	// forgotten.
	Attachments *attach.Store

	Via string // the Rules' name in statuses

	// Waiting reports whether a pod is captured, but by Rules of another sort that
	// an agent before this one used; nil: there are none. Such a pod waits for the
	// proxy before it changes over.
	Waiting func(ns *netns.NS) (bool, error)
	// Listening reports whether Rules know the proxy's listeners in a pod; nil:
	// they need not.
	Listening func(ns *netns.NS) (bool, error)
	// Rebuilt says that Rules lost their state and let no pod that they may have
	// captured connect before it is captured again. Ready is called once that is so
	// of all enrolled pods that the Source named first, or they are gone: who fails
	// stays closed, and Ready would open it. nil: nothing waits for it.
	Rebuilt bool
	Ready   func() error
	// Tried is called once all those pods were tried, and none is Waiting; nil:
	// nothing waits for it.
	Tried func() error
	// Verify is called whenever rules are compared with the kernel; nil: nothing.
	Verify func()

	// Resolves reports whether the proxy answers DNS in a pod; default
	// ResolverListens.
	Resolves func(ns *netns.NS) (bool, error)

	// NodeNS is the number of the node's own network namespace, which no pod's
	// path may lead into; 0 if there is none to protect.
	NodeNS uint64

	// Accelerates is why Rules know no PodRules.Accelerate; "": they do.
	Accelerates string
	// Gone is told of a pod's namespace before it is given up; nil: nobody.
	Gone func(ns *netns.NS)

	// Propagation is how long peers get to learn that a pod left the mesh before
	// its proxy stops; default 1 s.
	Propagation time.Duration
	// Drain is how long proxied connections keep their way back after that. It
	// must not be shorter than the proxy's own drain; default handoff.DrainTime.
	Drain time.Duration

	Synced     func() // called once all pods are known and proxies are let in
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

func (c Config) withDefaults() Config {
	if c.Propagation <= 0 {
		c.Propagation = defaultPropagation
	}
	if c.Drain <= 0 {
		c.Drain = defaultDrain
	}
	if c.Resolves == nil {
		c.Resolves = ResolverListens
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Agent reconciles the node's pods.
type Agent struct {
	cfg     Config
	metrics *metrics
	older   *olderMetrics
	slots   chan struct{}
	probes  probes

	mu           sync.Mutex
	workers      map[string]*worker // by UID
	ready, tried stage
	admission    admission
	claims       map[uint64]*worker // by number of the namespace
	synced       bool               // the source has listed the pods; written by its goroutine
	wg           sync.WaitGroup     // workers
	endc         chan struct{}      // closed when Run ends

	// number is the namespace's, which stands at a path; tests have one for all pods.
	number func(inode uint64, path string) uint64

	// Owned by the source's goroutine.
	earlier map[string]Status // of an agent before this one, by UID
}

// New returns an Agent that does nothing until Run.
func New(cfg Config) *Agent {
	cfg = cfg.withDefaults()
	a := &Agent{
		cfg: cfg, slots: make(chan struct{}, kernelSlots), endc: make(chan struct{}), workers: map[string]*worker{},
		claims:    map[uint64]*worker{},
		number:    func(inode uint64, _ string) uint64 { return inode },
		probes:    probes{rules: cfg.Host, pods: map[string][]netip.Addr{}},
		admission: newAdmission(),
	}
	a.ready.name, a.ready.call = "captured", cfg.Ready
	a.tried.name, a.tried.call = "tried", cfg.Tried
	a.metrics = newMetrics(cfg.Registerer, a.counts)
	a.older = newOlderMetrics(cfg.Registerer, a.olderCount)
	return a
}

// Run reconciles until ctx ends. Rules, routes and statuses stay behind, so that
// pods stay in the mesh while an agent is replaced; Cleanup takes them away.
func (a *Agent) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { close(a.endc) })
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	firstc := make(chan struct{})
	a.loadAttachments()
	g.Go(func() error {
		err := a.cfg.Source.Run(ctx, func(pods []Pod) { a.update(ctx, pods, firstc) })
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("pod source: %w", errors.Join(err, errEnded(err)))
	})
	g.Go(func() error {
		// A proxy drains what its first snapshot does not name, so none is served
		// before all pods are known.
		select {
		case <-firstc:
		case <-ctx.Done():
			return nil
		}
		if a.cfg.Synced != nil {
			a.cfg.Synced()
		}
		return a.cfg.Proxies.Run(ctx)
	})
	g.Go(func() error { a.watchLoop(ctx); return nil })
	g.Go(func() error { a.attachLoop(ctx); return nil })
	err := g.Wait()
	a.wg.Wait()
	return err
}

func errEnded(err error) error {
	if err == nil {
		return errors.New("ended by itself")
	}
	return nil
}

// SnapshotResult hears from the proxies' side how a snapshot's pod was taken.
func (a *Agent) SnapshotResult(uid string, err error) {
	a.mu.Lock()
	w := a.workers[uid]
	a.mu.Unlock()
	if w != nil {
		w.snapshot(err)
	}
}

// update gives each worker its pod, on the source's goroutine.
func (a *Agent) update(ctx context.Context, pods []Pod, firstc chan struct{}) {
	if ctx.Err() != nil {
		return
	}
	if !a.synced {
		a.start(pods)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.listedLocked(pods)
	present := make(map[string]bool, len(pods))
	for _, p := range pods {
		present[p.UID] = true
		a.wantLocked(ctx, p)
	}
	clear(a.admission.dirty)
	for uid, w := range a.workers {
		if !present[uid] {
			w.want(nil)
		}
	}
	if !a.synced {
		a.synced = true
		a.wg.Go(a.advance) // there may be nothing to wait for
		close(firstc)
	}
	a.notifyLocked()
}

// wantLocked gives a pod that the source lists to its worker.
func (a *Agent) wantLocked(ctx context.Context, p Pod) {
	w := a.workers[p.UID]
	p, there := a.attachedLocked(p)
	switch {
	case w != nil && !there:
		w.want(nil)
	case w != nil:
		w.want(&p)
	case !there:
	case p.Enrolled, p.NetNS != "" && !a.synced:
		// A pod that is not enrolled gets a worker at the start alone, to clear
		// what an agent before this one may have left.
		a.spawnLocked(ctx, p)
	}
}

// start prepares the first snapshot and forgets statuses of pods that are gone.
func (a *Agent) start(pods []Pod) {
	enrolled := map[string]bool{}
	defer func() {
		a.mu.Lock()
		a.tried.left, a.ready.left = maps.Clone(enrolled), maps.Clone(enrolled)
		a.mu.Unlock()
	}()
	for _, p := range pods {
		a.mu.Lock()
		p, there := a.attachedLocked(p)
		a.mu.Unlock()
		if !p.Enrolled || !there {
			continue
		}
		enrolled[p.UID] = true
		if err := a.track(p); err != nil {
			a.cfg.Logger.Warn("pod is not in the first snapshot", "pod", p.Namespace+"/"+p.Name, "err", err)
		}
	}
	if err := a.cfg.Status.RemoveExcept(enrolled); err != nil {
		a.cfg.Logger.Error("old pod statuses remain", "err", err)
	}
	// What an earlier agent said stays until it is no longer true, with its time.
	// A file that cannot be read is replaced by the pod's worker.
	statuses, _ := a.cfg.Status.List()
	a.earlier = make(map[string]Status, len(statuses))
	for _, s := range statuses {
		a.earlier[s.UID] = s
	}
}

// track names p in snapshots. Without a path the proxy keeps a pod it already has.
func (a *Agent) track(p Pod) error {
	hp := handoff.Pod{UID: p.UID, Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount}
	if p.NetNS != "" {
		ns, err := a.open(p.NetNS)
		if err != nil {
			return err
		}
		defer ns.Close()
		hp.NS = ns
	}
	return a.cfg.Proxies.Track(hp)
}

var errNodeNS = errors.New("it is the node's own network namespace, not a pod's")

// open opens a pod's namespace. The path comes from whoever describes pods, and
// rules in the node's namespace would cut the node off.
func (a *Agent) open(path string) (*netns.NS, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return nil, err
	}
	if a.cfg.NodeNS != 0 && ns.Inode() == a.cfg.NodeNS {
		_ = ns.Close() // only looked at
		return nil, fmt.Errorf("open network namespace %s: %w", path, errNodeNS)
	}
	return ns, nil
}

func (a *Agent) spawnLocked(ctx context.Context, p Pod) {
	w := &worker{
		agent: a, uid: p.UID, name: p.Namespace + "/" + p.Name, wakec: make(chan struct{}, 1),
		log: a.cfg.Logger.With("pod", p.Namespace+"/"+p.Name, "uid", p.UID),
	}
	w.desired, w.asked, w.shown = &p, 1, a.earlier[p.UID]
	delete(a.earlier, p.UID)
	a.workers[p.UID] = w
	a.wg.Go(func() { w.run(ctx) })
}

// retire ends w's place in the table unless a new wish came in meanwhile.
func (a *Agent) retire(w *worker) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.desired != nil && w.desired.Enrolled {
		return false
	}
	delete(a.workers, w.uid)
	a.notifyLocked()
	return true
}

func (a *Agent) watchLoop(ctx context.Context) {
	watch, verify := time.NewTicker(watchInterval), time.NewTicker(verifyInterval)
	defer watch.Stop()
	defer verify.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-watch.C:
			a.eachWorker((*worker).wake)
			a.advance()
		case <-verify.C:
			a.eachWorker((*worker).verify)
			a.pruneAttachments(ctx)
			if a.cfg.Verify != nil {
				a.cfg.Verify()
			}
			if a.holding() {
				a.cfg.Logger.Warn("the redirection lost its state: pods that it may have captured cannot connect until all pods of the mesh are captured again")
			}
			if err := a.probes.rewrite(); err != nil {
				a.cfg.Logger.Warn("node rules cannot be written: probes to enrolled pods may fail", "err", err)
			}
		}
	}
}

func (a *Agent) eachWorker(f func(*worker)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range a.workers {
		f(w)
	}
}

func (a *Agent) counts() (enabled, pending int) {
	a.eachWorker(func(w *worker) {
		w.mu.Lock()
		defer w.mu.Unlock()
		switch w.shown.Redirection {
		case Enabled:
			enabled++
		case Pending:
			pending++
		}
	})
	return enabled, pending
}

// kernel runs f in one of the slots for kernel work.
func (a *Agent) kernel(ctx context.Context, f func() error) error {
	select {
	case a.slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-a.slots }()
	return f()
}
