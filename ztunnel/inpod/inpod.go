// Package inpod keeps the proxy's listeners in the network namespaces of
// enrolled pods.
//
//	handoff ─→ AddPod ─→ listeners 15001 15006 15008 15053 in the pod ─→ Handlers
//	        ─→ DelPod ─→ stop accepting → GOAWAY → deadline → cut
//	        ─→ SnapshotDone ─→ pods the agent no longer names: as DelPod
//
// AddPod, DelPod and SnapshotDone come from handoff's one goroutine; lookups
// may come from any. Each accepted connection runs on its own goroutine, which
// the pod waits for.
package inpod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// Config of a Manager.
type Config struct {
	// Serve returns what serves a pod.
	Serve func(p handoff.Pod) (Handlers, error)
	// DrainTimeout is how long connections of a pod that leaves may go on.
	// Default handoff.DrainTime, which the agent waits for.
	DrainTimeout time.Duration
	// Mark of the listeners' sockets.
	Mark int
	// IPv6 listens on [::]; false, or a kernel without IPv6, on 0.0.0.0.
	IPv6 bool
	// DNSAddrs is where DNS is served; default port 15053 of both loopbacks, for
	// datagrams of all addresses that stand for a captured server.
	DNSAddrs []netip.AddrPort
	// NoPortReuse keeps another proxy from listening beside this one.
	NoPortReuse bool
	// Liveness of accepted connections.
	Liveness sockopt.Liveness
	// Changed is called after the set of pods or of pending ones changed.
	Changed    func()
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Manager holds the pods.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	metrics metrics
	wg      sync.WaitGroup // drains under way

	mu      sync.Mutex
	pods    map[string]*pod
	pending map[string]string // uid → why it is not served
	closed  bool
}

// New returns a manager without pods.
func New(cfg Config) *Manager {
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = handoff.DrainTime
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Changed == nil {
		cfg.Changed = func() {}
	}
	m := &Manager{cfg: cfg, log: cfg.Logger, pods: map[string]*pod{}, pending: map[string]string{}}
	m.metrics = newMetrics(cfg.Registerer, m)
	return m
}

// ErrClosing refuses pods while the process ends.
var ErrClosing = errors.New("the proxy is shutting down")

// AddPod serves a pod. The same namespace again is no change; another one
// replaces it.
func (m *Manager) AddPod(ctx context.Context, p handoff.Pod) error {
	m.mu.Lock()
	old := m.pods[p.UID]
	closed := m.closed
	m.mu.Unlock()
	if closed {
		return ErrClosing
	}
	if old != nil && old.info.NS.Inode() == p.NS.Inode() && sameInfo(old.info, p) {
		_ = p.NS.Close() // ours now, and not needed twice
		return nil
	}
	if old != nil {
		// The listeners of the same namespace must be gone before the next
		// ones are made, or the kernel would share connections among both.
		m.remove(p.UID, "replaced")
	}
	np, err := m.start(ctx, p)
	if err != nil {
		m.setPending(p.UID, err.Error())
		m.log.Warn("pod not served", "pod", p.Namespace+"/"+p.Name, "uid", p.UID, "error", err.Error())
		return err
	}
	m.mu.Lock()
	m.pods[p.UID] = np
	delete(m.pending, p.UID)
	m.mu.Unlock()
	m.metrics.started.Inc()
	m.log.Info("pod served", "pod", p.Namespace+"/"+p.Name, "uid", p.UID, "netns", p.NS.Inode())
	m.cfg.Changed()
	return nil
}

func sameInfo(a, b handoff.Pod) bool {
	return a.Name == b.Name && a.Namespace == b.Namespace && a.ServiceAccount == b.ServiceAccount
}

func (m *Manager) setPending(uid, why string) {
	m.mu.Lock()
	m.pending[uid] = why
	m.mu.Unlock()
	m.cfg.Changed()
}

// DelPod stops serving a pod; its connections drain in the background.
func (m *Manager) DelPod(uid string) error {
	m.mu.Lock()
	delete(m.pending, uid)
	m.mu.Unlock()
	m.remove(uid, "deleted")
	m.cfg.Changed()
	return nil
}

// SnapshotDone drains the pods that the agent did not name.
func (m *Manager) SnapshotDone(known []string) {
	named := make(map[string]bool, len(known))
	for _, uid := range known {
		named[uid] = true
	}
	m.mu.Lock()
	var gone []string
	for uid := range m.pods {
		if !named[uid] {
			gone = append(gone, uid)
		}
	}
	for uid := range m.pending {
		if !named[uid] {
			delete(m.pending, uid)
		}
	}
	m.mu.Unlock()
	for _, uid := range gone {
		m.remove(uid, "not in the agent's snapshot")
	}
	m.cfg.Changed()
}

func (m *Manager) remove(uid, why string) {
	m.mu.Lock()
	p := m.pods[uid]
	delete(m.pods, uid)
	if p != nil {
		m.wg.Add(1) // under the lock that Shutdown takes before it waits
	}
	m.mu.Unlock()
	if p == nil {
		return
	}
	m.log.Info("pod no longer served", "pod", p.info.Namespace+"/"+p.info.Name, "uid", uid, "why", why)
	p.stopAccepting()
	m.metrics.stopped.Inc()
	go func() {
		defer m.wg.Done()
		ctx, cancel := context.WithTimeout(context.Background(), m.cfg.DrainTimeout)
		defer cancel()
		p.drain(ctx)
	}()
}

// Shutdown stops accepting for every pod, drains until ctx ends, and cuts.
func (m *Manager) Shutdown(ctx context.Context) {
	m.mu.Lock()
	m.closed = true
	pods := make([]*pod, 0, len(m.pods))
	for _, p := range m.pods {
		pods = append(pods, p)
	}
	clear(m.pods)
	m.mu.Unlock()
	for _, p := range pods {
		p.stopAccepting()
	}
	for _, p := range pods {
		m.wg.Go(func() { p.drain(ctx) })
	}
	m.wg.Wait()
}

// NS is the network namespace of a pod, nil if it is not served. It stays open
// while connections of the pod exist.
func (m *Manager) NS(uid string) *netns.NS {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.pods[uid]; p != nil {
		return p.info.NS
	}
	return nil
}

// Pods lists what is served.
func (m *Manager) Pods() []handoff.Pod {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]handoff.Pod, 0, len(m.pods))
	for _, p := range m.pods {
		out = append(out, p.info)
	}
	return out
}

// Pending names the pods that could not be served, with the reason.
func (m *Manager) Pending() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make(map[string]string, len(m.pending))
	for k, v := range m.pending {
		out[k] = v
	}
	return out
}

type metrics struct{ started, stopped prometheus.Counter }

func newMetrics(reg prometheus.Registerer, m *Manager) metrics {
	ms := metrics{
		started: prometheus.NewCounter(prometheus.CounterOpts{Name: "workload_manager_proxies_started_total", Help: "The total number of pod proxies that were started."}),
		stopped: prometheus.NewCounter(prometheus.CounterOpts{Name: "workload_manager_proxies_stopped_total", Help: "The total number of pod proxies that were stopped."}),
	}
	if reg != nil {
		reg.MustRegister(ms.started, ms.stopped,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "workload_manager_active_proxy_count", Help: "The number of pod proxies now running."},
				func() float64 { return float64(len(m.Pods())) }),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "workload_manager_pending_proxy_count", Help: "The number of pods that wait for their proxy."},
				func() float64 { return float64(len(m.Pending())) }))
	}
	return ms
}

func (m *Manager) start(ctx context.Context, info handoff.Pod) (*pod, error) {
	h, err := m.cfg.Serve(info)
	if err != nil {
		return nil, err
	}
	p := newPod(info, h, m.log.With("pod", info.Namespace+"/"+info.Name))
	for _, l := range []struct {
		port    string
		account *ledger.Account
		serve   Handler
	}{{outboundPort, h.Account, h.Outbound}, {plaintextPort, h.Account, h.Plaintext}, {hbonePort, nil, h.HBONE}, {socksPort, h.Account, h.SOCKS}} { // hbone counts its own
		if l.serve == nil {
			continue
		}
		ln, err := m.listen(ctx, info.NS, l.port)
		if err != nil {
			p.abandon()
			return nil, fmt.Errorf("listen in pod %s/%s on port %s: %w", info.Namespace, info.Name, l.port, err)
		}
		p.accept(ln, l.account, l.serve)
	}
	if err := m.startDNS(ctx, info, p); err != nil {
		p.abandon()
		return nil, err
	}
	return p, nil
}

// abandon ends a pod that could not be served in full.
func (p *pod) abandon() {
	p.stopAccepting()
	p.cancel(ErrClosing)
	if p.handlers.Close != nil {
		p.handlers.Close()
	}
}
