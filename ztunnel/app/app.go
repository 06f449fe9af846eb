// Package app wires ztunnel: the only place where its parts meet.
//
//	control plane ─→ xds/client ─→ store ─→ views ─┬→ inbound, outbound (per pod)
//	              ─→ cert ─────────────────────────┤
//	node agent    ─→ handoff ─→ inpod ─→ listeners ┘
//	operator      ─→ admin 15000, metrics 15020, readiness 15021
//
// Order of a start: admin and metrics, xDS and certificates, and once each
// type had its first answer, the agent's pods. Order of an end: stop
// accepting, GOAWAY, drain until the deadline, cut, then everything else.
package app

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/inpod"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
	"github.com/ambit-mesh/ambit/ztunnel/pace"
	"github.com/ambit-mesh/ambit/ztunnel/reclaim"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

func (c *Config) trustDomainAliases() []string {
	return slices.DeleteFunc(strings.Split(c.TrustDomainAliases, ","), func(s string) bool { return strings.TrimSpace(s) == "" })
}

// Run is the process. It returns when ctx has ended and everything is drained,
// or with the error that ended it.
func Run(ctx context.Context, cfg Config, log *slog.Logger, levels *boot.LevelControl, reg *prometheus.Registry) error {
	for _, w := range cfg.Warnings {
		log.Warn(w)
	}
	if n, err := boot.RaiseNoFile(); err != nil {
		log.Warn("open files stay limited", "limit", n, "error", err.Error())
	}
	limit := reclaim.ReadLimit()
	limitRuntime(limit)
	if cfg.Workers > 0 && cfg.Workers != runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(cfg.Workers)
	}
	if cfg.Mode == dedicated {
		if err := cfg.degrade(log, probe); err != nil {
			return err
		}
	}
	levels.Rename(scopeOf)
	a, err := newApp(cfg, log, reg)
	if err != nil {
		return err
	}
	if a.limit = limit; limit > 0 {
		a.limitMemory(limit)
	}
	return a.run(ctx, levels, reg)
}

type app struct {
	cfg   Config
	log   *slog.Logger
	ready *boot.Ready
	ca    io.Closer
	node  *node
	pods  *inpod.Manager
	own   *inpod.Manager // of the proxy's own pod
	gate  *gate
	pacer *pace.Pacer // nil: the number of processors stays

	memory    *reclaim.Reclaimer
	limit     reclaim.Limit // of the container at the start
	statsPort uint16        // set before anything is served

	static  *store.View // what LOCAL_XDS described, nil if nothing
	xdsTLS  func() (*tls.Config, error)
	syncedc chan struct{} // closed when each type had its first answer
}

func newApp(cfg Config, log *slog.Logger, reg *prometheus.Registry) (*app, error) {
	ca, err := cert.NewClient(cert.CAConfig{
		Target: cfg.CAAddress, TLS: cfg.serverTLS("CA_ROOT_CA", cfg.CARootCA, cfg.CAAddress, cfg.AltCAHostname),
		Token: cfg.token, ClusterID: cfg.ClusterID, Headers: cfg.CAHeaders, Direct: cfg.Mode == dedicated,
	})
	if err != nil {
		return nil, err
	}
	a := assemble(cfg, log, reg, ca)
	a.ca, a.xdsTLS = ca, cfg.serverTLS("XDS_ROOT_CA", cfg.XDSRootCA, cfg.XDSAddress, cfg.AltXDSHostname)
	return a, nil
}

// assemble joins the parts that do not depend on how the control plane is reached.
func assemble(cfg Config, log *slog.Logger, reg *prometheus.Registry, authority cert.Authority) *app {
	a := &app{cfg: cfg, log: log, ready: boot.NewReady(), syncedc: make(chan struct{}), memory: reclaim.New(boot.Scoped(log, "memory"))}
	a.node = newNode(cfg, log, reg, authority)
	a.gate = &gate{ready: a.ready, blocked: map[string]func(){}}
	dnsAddrs, _ := cfg.dnsAddrs() // checked with the configuration
	a.pods = inpod.New(inpod.Config{
		DNSAddrs: dnsAddrs,
		Serve: func(p handoff.Pod) (inpod.Handlers, error) {
			return a.node.serve(p, podNet{originalDst: originalDst}), nil
		},
		DrainTimeout: cfg.TerminationDeadline, Mark: int(cfg.PacketMark), IPv6: cfg.IPv6Enabled, NoPortReuse: !cfg.InpodPortReuse, Liveness: cfg.liveness(),
		Changed: a.podsChanged, Logger: boot.Scoped(log, "inpod"), Registerer: reg,
	})
	if a.own = a.newOwn(); cfg.Adaptive && cfg.Workers > 1 {
		a.pacer = pace.New(pace.Config{Limit: cfg.Workers, Logger: boot.Scoped(log, "pace"), Registerer: reg})
	}
	reg.MustRegister(istioBuild(cfg.Metadata))
	return a
}

// istioBuild is what dashboards made for the reference look for.
func istioBuild(meta map[string]any) prometheus.Collector {
	tag, ok := meta["ISTIO_VERSION"].(string) // ISTIO_META_ISTIO_VERSION
	if !ok {
		tag = boot.Version
	}
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "istio_build", Help: "Istio component build info",
		ConstLabels: prometheus.Labels{"component": "ztunnel", "tag": tag}})
	g.Set(1)
	return g
}

// inboundDst is what the client of a captured inbound connection asked for. Rules
// translate it to the listener's port and the kernel remembers what it was; programs
// hand the connection to the listener as it is (sk_lookup), and nothing is remembered.
func inboundDst(translated func(net.Conn) (netip.AddrPort, error)) func(net.Conn) (netip.AddrPort, error) {
	return func(c net.Conn) (netip.AddrPort, error) {
		if local := outbound.AddrPort(c.LocalAddr()); local.IsValid() && !outbound.OwnPort(local.Port()) {
			return local, nil
		}
		return translated(c)
	}
}

func originalDst(c net.Conn) (netip.AddrPort, error) {
	t, ok := sockopt.SocketOf(c)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("BUG: original destination of a %T", c)
	}
	return sockopt.OriginalDst(t)
}

func (a *app) run(ctx context.Context, levels *boot.LevelControl, reg *prometheus.Registry) error {
	defer a.ca.Close()
	defer a.node.store.Close()
	// The parts outlive ctx by the drain: connections still need certificates.
	work, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	ctx, quit := context.WithCancel(ctx)
	defer quit()
	for _, task := range a.cfg.tasks() {
		a.gate.block(task)
	}

	g := boot.NewGroup(work, a.log)
	if err := a.serveHTTP(g, levels, reg, quit); err != nil {
		stop(err)
		return errors.Join(err, g.Wait())
	}
	if err := a.describeMesh(g, reg); err != nil {
		stop(err)
		return errors.Join(err, g.Wait())
	}
	if a.pacer != nil {
		g.Go("processors", a.pacer.Run)
	}
	g.Go("memory", a.memory.Run)
	if a.limit > 0 {
		g.Go("memory limit", func(ctx context.Context) error { return reclaim.Follow(ctx, a.limit, reclaim.ReadLimit, a.limitMemory) })
	}
	g.Go("certificates", a.node.certs.Run)
	if w, ok := a.ca.(cert.TrustWatcher); ok {
		g.Go("trust", func(ctx context.Context) error { return a.node.certs.FollowTrust(ctx, w) })
	}
	if path := a.cfg.CARootCA; path != "SYSTEM" && !strings.Contains(path, "-----BEGIN") {
		g.Go("root file", func(ctx context.Context) error { return a.node.certs.FollowRootFile(ctx, path) })
	}
	if a.cfg.CRLPath != "" {
		g.Go("revocation lists", func(ctx context.Context) error { return a.node.certs.FollowCRL(ctx, a.cfg.CRLPath) })
	}
	g.Go("connections", a.node.flow.Run)
	g.Go("origins", a.node.origins.Run)
	g.Go("identities", func(ctx context.Context) error { return a.node.identities(ctx, a.allPods) })
	if a.cfg.Mode == dedicated {
		g.Go("workload", func(gctx context.Context) error { return a.serveOne(ctx, gctx) })
	} else {
		g.Go("direct connections", a.node.runDirect)
		g.Go("agent", func(gctx context.Context) error { return a.agent(ctx, gctx) })
	}
	if a.cfg.hasOwn() {
		g.Go("own port", func(gctx context.Context) error { return a.serveOwn(ctx, gctx) })
	}
	a.log.Info("ztunnel started", "node", a.cfg.NodeName, "xds", a.cfg.XDSAddress, "ca", a.cfg.CAAddress, "agent", a.cfg.InpodUDS, "version", boot.Version)

	select {
	case <-ctx.Done():
	case <-g.Context().Done():
	}
	a.shutdown()
	stop(nil)
	return g.Wait()
}

// tasks are what readiness waits for at a start, by the reference's names.
func (c *Config) tasks() []string {
	tasks := []string{"state manager", "workload proxy manager"}
	if c.Mode == dedicated && c.EnableProxy { // there are no pods whose ports would count
		tasks = append(tasks, "proxy")
	}
	if c.Mode == dedicated && c.DNSCapture {
		tasks = append(tasks, "dns proxy")
	}
	return tasks
}

// shutdown lets connections end by themselves until the deadline, then cuts.
func (a *app) shutdown() {
	a.gate.block("shutting down")
	a.log.Info("draining", "deadline", a.cfg.TerminationDeadline.String(), "connections", a.node.flow.Len(""))
	ctx, cancel := context.WithTimeout(context.Background(), a.cfg.TerminationDeadline)
	defer cancel()
	// Accepted connections hold their streams, so draining the pods waits for
	// both directions; tunnels without streams go at once.
	a.pods.Shutdown(ctx)
	a.own.Shutdown(ctx)
	a.node.flow.CutPod("", flow.ErrDrained)
	_ = a.node.tunnels.Close() // every stream has ended or was cut
	a.node.leases.Close()
	a.log.Info("drained")
}

// agent follows the node agent once the mesh is known, so that no pod is
// served before there is anything to decide by. It stops with the signal,
// before the drain.
func (a *app) agent(ctx, group context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(group, cancel)()
	select {
	case <-a.syncedc:
	case <-ctx.Done():
		return nil
	}
	c := handoff.NewClient(handoff.ClientConfig{
		Path: a.cfg.InpodUDS, Handler: &agentHandler{Manager: a.pods, gate: a.gate}, Logger: boot.Scoped(a.log, "agent"),
		Disconnected: func(error) { a.gate.block("workload proxy manager") },
	})
	return c.Run(ctx)
}

// agentHandler opens the readiness gate when the agent's list is complete.
type agentHandler struct {
	*inpod.Manager
	gate *gate
}

func (h *agentHandler) SnapshotDone(known []string) {
	h.Manager.SnapshotDone(known)
	h.gate.open("workload proxy manager")
}

// podsChanged follows pods that cannot be served: the process is not ready
// while one is pending.
func (a *app) podsChanged() {
	var names []string
	for uid := range a.pods.Pending() {
		names = append(names, "pod "+uid)
	}
	a.gate.set("pod ", names)
	a.node.changed.signal()
}

func (a *app) xdsClient(reg prometheus.Registerer) (*client.Client, error) {
	n, err := a.nodeInfo()
	if err != nil {
		return nil, err
	}
	var once sync.Once
	return client.New(client.Config{
		Target: a.cfg.XDSAddress, TLS: a.xdsTLS,
		Token: a.cfg.token, Headers: a.cfg.XDSHeaders, ClusterID: a.cfg.ClusterID, Node: n,
		Types: []string{api.AddressType, api.AuthorizationType}, Handler: a.node.store,
		OnDemand: a.cfg.onDemandType(), Has: a.node.knows,
		Synced: func() {
			once.Do(a.meshKnown)
			a.node.certs.Nudge() // the certificate authority is usually back with it
		},
		Much:   a.memory.Left,
		Logger: boot.Scoped(a.log, "xds"), Registerer: reg,
	})
}

// nodeInfo introduces this proxy as the reference does: control planes of both
// projects key on the type in the id.
func (a *app) nodeInfo() (*discovery.Node, error) {
	c := &a.cfg
	fields := map[string]any{}
	for k, v := range c.Metadata {
		fields[k] = v
	}
	fields["NAME"], fields["NAMESPACE"] = c.PodName, c.PodNamespace
	fields["INSTANCE_IPS"], fields["NODE_NAME"] = c.InstanceIP, c.NodeName
	fields["CLUSTER_ID"], fields["NETWORK"] = c.ClusterID, c.Network
	meta, err := structpb.NewStruct(fields)
	if err != nil {
		return nil, fmt.Errorf("node metadata: %w", err)
	}
	return &discovery.Node{
		Id:       fmt.Sprintf("ztunnel~%s~%s.%s~%s.svc.cluster.local", c.instanceIP(), c.PodName, c.PodNamespace, c.PodNamespace),
		Metadata: meta,
	}, nil
}

func (a *app) serveHTTP(g *boot.Group, levels *boot.LevelControl, reg *prometheus.Registry, quit func()) error {
	servers := []struct {
		name, addr string
		h          http.Handler
	}{
		{"admin", a.cfg.AdminAddr, a.admin(levels, quit)},
		{"metrics", a.cfg.StatsAddr, boot.Metrics(reg)},
		{"readiness", a.cfg.ReadinessAddr, boot.ReadyMux(a.ready)},
	}
	for _, s := range servers {
		ctx, cancel := context.WithTimeout(g.Context(), 5*time.Second)
		ln, err := boot.Listen(ctx, s.addr)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if s.name == "metrics" {
			a.statsPort = addrPortOf(ln.Addr()).Port()
		}
		a.log.Info("listening", "port", s.name, "addr", ln.Addr().String())
		g.Go(s.name, func(ctx context.Context) error { return boot.ServeHTTP(ctx, ln, s.h, boot.Scoped(a.log, s.name)) })
	}
	return nil
}

// gate names what readiness waits for; each name at most once.
type gate struct {
	ready *boot.Ready

	mu      sync.Mutex
	blocked map[string]func()
}

func (g *gate) block(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.blocked[name] == nil {
		g.blocked[name] = g.ready.Block(name)
	}
}

func (g *gate) open(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if done := g.blocked[name]; done != nil {
		done()
		delete(g.blocked, name)
	}
}

// set makes names the blocked ones among those with a prefix.
func (g *gate) set(prefix string, names []string) {
	g.mu.Lock()
	var open []string
	for n := range g.blocked {
		if strings.HasPrefix(n, prefix) && !slices.Contains(names, n) {
			open = append(open, n)
		}
	}
	g.mu.Unlock()
	for _, n := range names {
		g.block(n)
	}
	for _, n := range open {
		g.open(n)
	}
}
