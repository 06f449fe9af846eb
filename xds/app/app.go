// Package app is ambitd: the one place where the control plane's parts meet.
//
//	dir.Watch ─▶ derive.Engine ─▶ delta.Store ─▶ serve.Server ─▶ proxies
//	                  │ (RunsOn)                     ▲
//	                  └────────▶ ca.NodeRule ─▶ ca.Authority
//
// Run owns every goroutine; they are named in its group and all have ended
// when it returns. The source's goroutine is the only writer of the engine,
// the store and the report; everything else reads.
package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/ca"
	"github.com/ambit-mesh/ambit/xds/crd"
	"github.com/ambit-mesh/ambit/xds/delta"
	"github.com/ambit-mesh/ambit/xds/derive"
	"github.com/ambit-mesh/ambit/xds/dir"
	"github.com/ambit-mesh/ambit/xds/serve"
)

// drainTimeout is how long open calls may finish after the end. Streams end at
// once; a certificate takes milliseconds.
const drainTimeout = 5 * time.Second

// lastGood is where the state directory keeps policies as they were last good.
const lastGood = "last-good"

// Config is what ambitd's flags say.
type Config struct {
	// Sources are directories of Kubernetes and Istio YAML.
	Sources []string
	// StateDir keeps keys and last good policies; CADir holds an existing CA, if any.
	StateDir, CADir string
	// Listen are the addresses of xDS and the certificate API; Monitoring is
	// that of metrics, status and debugging.
	Listen     []string
	Monitoring string

	TrustDomain, ClusterID, ClusterDomain, Network string
	SystemNamespace, RootNamespace                 string
	// SameNode is how workloads of one node reach each other; "" is by their mTLS mode.
	SameNode crd.SameNode

	// DNSNames and IPs are added to those that the server's certificate has
	// anyway.
	DNSNames, IPs []string
	// NodeAccounts may ask for identities of pods on their node; empty means
	// ca.DefaultNodeAccounts.
	NodeAccounts []string
	Audiences    []string
	// MaxConnectionAge spreads proxies over replicas; 0: never.
	MaxConnectionAge time.Duration
}

func (c Config) withDefaults() Config {
	def := func(v *string, d string) {
		if *v == "" {
			*v = d
		}
	}
	def(&c.TrustDomain, "cluster.local")
	def(&c.ClusterID, "Kubernetes")
	def(&c.ClusterDomain, "cluster.local")
	def(&c.SystemNamespace, "ambit-system")
	def(&c.Monitoring, ":15014")
	if len(c.Listen) == 0 {
		c.Listen = []string{":15012"}
	}
	if len(c.NodeAccounts) == 0 {
		c.NodeAccounts = ca.DefaultNodeAccounts
	}
	return c
}

func (c Config) validate() error {
	var errs []error
	if len(c.Sources) == 0 {
		errs = append(errs, errors.New("no source: give --source dir:PATH"))
	}
	for _, d := range c.Sources {
		errs = append(errs, checkDir(d))
	}
	if c.StateDir == "" {
		errs = append(errs, errors.New("no state directory: give --state-dir DIR, where the CA's keys are kept"))
	}
	return errors.Join(errs...)
}

// serverNames are the names by which proxies may reach this process.
func (c Config) serverNames() []string {
	names := []string{
		"ambitd." + c.SystemNamespace + ".svc", "ambitd." + c.SystemNamespace,
		"ambitd." + c.SystemNamespace + ".svc." + c.ClusterDomain,
		"istiod.istio-system.svc", "localhost", "127.0.0.1", "::1",
	}
	names = append(names, c.DNSNames...)
	return append(names, c.IPs...)
}

// Run is ambitd: it returns when ctx ends (nil) or something it cannot do
// without fails.
func Run(ctx context.Context, c Config, log *slog.Logger, levels *boot.LevelControl, reg *prometheus.Registry) error {
	c = c.withDefaults()
	if err := c.validate(); err != nil {
		return err
	}
	a, err := assemble(ctx, c, log, reg)
	if err != nil {
		return err
	}
	defer a.close()
	log.Info("ambitd starts", "version", boot.Version, "sources", c.Sources, "state_dir", c.StateDir,
		"trust_domain", c.TrustDomain, "cluster", c.ClusterID, "ca", a.authority.Info().Subject)

	return a.run(ctx, levels, reg)
}

// run starts the process's goroutines and waits for them.
func (a *ambitd) run(ctx context.Context, levels *boot.LevelControl, reg *prometheus.Registry) error {
	g := boot.NewGroup(ctx, a.log)
	g.Go("source", func(ctx context.Context) error {
		src := dir.Source{Dirs: a.cfg.Sources, LastGood: filepath.Join(a.cfg.StateDir, lastGood), Log: boot.Scoped(a.log, "source")}
		return src.Watch(ctx, a.pipe.apply)
	})
	g.Go("monitoring", func(ctx context.Context) error {
		return boot.ServeHTTP(ctx, a.monitoring, a.handler(levels, reg), a.log)
	})
	g.Go("ca files", func(ctx context.Context) error { return a.authority.Run(ctx, boot.Scoped(a.log, "ca")) })
	g.Go("drain", a.drain)
	for _, ln := range a.listeners {
		g.Go("xds "+ln.Addr().String(), func(ctx context.Context) error { return a.serve(ctx, ln) })
	}
	err := g.Wait()
	a.log.Info("ambitd stopped")
	return err
}

// ambitd is the assembled process.
type ambitd struct {
	cfg        Config
	log        *slog.Logger
	ready      *boot.Ready
	authority  *ca.Authority
	serverTLS  *ca.ServerTLS
	store      *delta.Store
	server     *serve.Server
	pipe       *pipeline
	monitoring net.Listener
	listeners  []net.Listener
	started    time.Time
}

// assemble opens everything that can fail, so that a start either works or
// ends with one line.
func assemble(ctx context.Context, c Config, log *slog.Logger, reg *prometheus.Registry) (_ *ambitd, err error) {
	a := &ambitd{cfg: c, log: log, ready: boot.NewReady(), started: time.Now()}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	if a.authority, err = ca.Open(ca.Config{TrustDomain: c.TrustDomain, StateDir: c.StateDir, PluggedDir: c.CADir}); err != nil {
		return nil, err
	}
	if a.serverTLS, err = a.authority.ServerTLS(c.serverNames()); err != nil {
		return nil, err
	}
	tokens, err := ca.OpenTokens(c.StateDir, c.Audiences, nil)
	if err != nil {
		return nil, err
	}
	// Policies first: workloads name them.
	a.store = delta.NewStore(api.AuthorizationType, api.AddressType)
	engine := derive.New(derive.Config{
		ClusterID: c.ClusterID, TrustDomain: c.TrustDomain, SystemNamespace: c.SystemNamespace,
		RootNamespace: c.RootNamespace, ClusterDomain: c.ClusterDomain, Network: c.Network,
		SameNode: c.SameNode,
	})
	a.pipe = newPipeline(engine, a.store, boot.Scoped(log, "source"), a.ready.Block("first derivation of the source"))
	rule := &trust{engine: engine, accounts: c.NodeAccounts}
	a.server, err = serve.New(serve.Config{
		Store: a.store, Reviewer: tokens, Signer: a.authority, Trust: a.authority, TrustDomains: engine.TrustDomains, Rule: rule, TLS: a.serverTLS.Config(),
		Log: boot.Scoped(log, "xds"), Metrics: reg, MaxConnectionAge: c.MaxConnectionAge,
	})
	if err != nil {
		return nil, err
	}
	a.pipe.push, a.pipe.announce = a.server.Push, a.authority.Announce
	if err := registerMetrics(reg, a); err != nil {
		return nil, err
	}
	return a, a.listen(ctx)
}

func (a *ambitd) listen(ctx context.Context) (err error) {
	if a.monitoring, err = boot.Listen(ctx, a.cfg.Monitoring); err != nil {
		return fmt.Errorf("monitoring: %w (choose another address with --monitoring)", err)
	}
	for _, addr := range a.cfg.Listen {
		ln, err := boot.Listen(ctx, addr)
		if err != nil {
			return fmt.Errorf("xds: %w (choose another address with --listen)", err)
		}
		a.listeners = append(a.listeners, ln)
	}
	return nil
}

// close frees the listeners, also of a start that failed halfway. The servers
// have closed most of them: a second close says so, and nothing else.
func (a *ambitd) close() {
	if a.monitoring != nil {
		_ = a.monitoring.Close()
	}
	for _, ln := range a.listeners {
		_ = ln.Close()
	}
}

// serve answers proxies once there is a whole state to give: until then
// connections wait in the listener's queue, because a proxy takes its first
// response for everything there is.
func (a *ambitd) serve(ctx context.Context, ln net.Listener) error {
	select {
	case <-a.pipe.derived:
	case <-ctx.Done():
		return nil
	}
	a.log.Info("serving xds and certificates", "addr", ln.Addr().String())
	return a.server.Serve(ln)
}

// drain waits for the end and shuts the server down in time.
func (a *ambitd) drain(ctx context.Context) error {
	<-ctx.Done()
	deadline, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	a.server.Shutdown(deadline)
	return nil
}
