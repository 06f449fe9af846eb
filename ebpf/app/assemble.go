package app

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/lease"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/xds/boot"
)

// parts is an agent that is put together and not running yet.
type parts struct {
	agent    *agent.Agent
	redirect *redirector
	host     *redirect.Host
	status   *agent.StatusDir
	node     agent.NodeStatus
	server   *handoff.Server
	leases   *redirect.Leases // nil: none are granted
	granter  *lease.Server
	cni      *attach.Server // nil: none
	home     *netns.NS
	ready    *boot.Ready
	registry *prometheus.Registry
	log      *slog.Logger
}

func assemble(cfg Config, log *slog.Logger) (_ *parts, err error) {
	p := &parts{ready: boot.NewReady(), registry: boot.NewRegistry("ambit-node"), log: log}
	dirs, err := cfg.dirs()
	if err != nil {
		return nil, err
	}
	if p.status, err = agent.OpenStatusDir(cfg.StatusDir); err != nil {
		return nil, err
	}
	if p.home, err = netns.Current(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			if p.redirect != nil {
				p.redirect.close()
			}
			if p.server != nil {
				p.server.Close()
			}
			if p.granter != nil {
				p.granter.Close()
			}
			_ = p.home.Close() // err says more
		}
	}()
	// First, because it tells whether another agent is at work.
	p.server, err = handoff.Listen(handoff.ServerConfig{
		Path: cfg.ZDSPath, Logger: boot.Scoped(log, "zds"), Registerer: p.registry,
		// The agent is made from the server; no proxy is served before both are.
		Admit:          func(c *handoff.Caller) error { return p.redirect.admit(c, p.agent.NamespaceOf, p.agent.Rewrite) },
		SnapshotResult: func(uid string, err error) { p.agent.SnapshotResult(uid, err) },
	})
	if err != nil {
		return nil, err
	}
	if p.host, err = redirect.NewHost(cfg.redirect(log), p.home); err != nil {
		return nil, err
	}
	if p.redirect, err = choose(cfg, p.home, log); err != nil {
		return nil, err
	}
	p.redirect.register(p.registry)
	lacking, err := missing(p.redirect.kind)
	if err != nil {
		return nil, err
	}
	log.Info("pods are captured with "+p.redirect.kind, "requested", cfg.Redirect, "why", p.redirect.reason)
	for _, c := range lacking {
		log.Warn("a capability is missing", "capability", c)
	}
	c := agent.Config{Status: p.status, NodeNS: p.home.Inode(), Propagation: cfg.Propagation, Drain: cfg.Drain,
		Synced: p.ready.Block("pods"), Logger: boot.Scoped(log, "agent"), Registerer: p.registry}
	p.redirect.into(&c)
	if p.leases, c.Accelerates = p.redirect.leases(); p.leases != nil {
		c.Gone = p.redirect.hooks.Gone
	}
	if err := p.probes(cfg, &c); err != nil {
		return nil, err
	}
	verify := c.Verify
	c.Verify = func() { verify(); p.writeNode(cfg, lacking) }
	p.writeNode(cfg, lacking)
	if p.leases != nil {
		p.granter, err = lease.Listen(lease.ServerConfig{Path: lease.Path(cfg.ZDSPath), Holder: p.leases, Admit: p.isProxy, Logger: boot.Scoped(log, "lease"), Registerer: p.registry})
		if err != nil {
			return nil, err
		}
	}
	c.Proxies = p.server
	d := agent.DirConfig{
		Dirs: dirs, Node: cfg.Node, Excluded: cfg.ExcludeNamespaces, DNS: cfg.DNSCapture, Logger: boot.Scoped(log, "source"),
	}
	if err := cfg.keep(&c, &d, log); err != nil {
		return nil, err
	}
	c.Source = agent.NewDirSource(d)
	p.agent = agent.New(c)
	if err := p.listenCNI(cfg, log); err != nil {
		return nil, err
	}
	return p, nil
}

// probes lets the node's own connections to pods pass: programs know them by
// themselves, rules by an address.
func (p *parts) probes(cfg Config, c *agent.Config) error {
	if p.redirect.kind == kindEBPF {
		if !p.redirect.bare {
			// What the other redirector's pods needed, once there are none.
			c.Tried = p.host.Remove
		}
		return nil
	}
	if !cfg.HostProbes {
		return nil
	}
	// The kernel is asked now, so that a node that cannot do it says so at once.
	if err := p.host.Set([]netip.Addr{}); err != nil {
		return fmt.Errorf("exempt the node's probes (--host-probes=false does without): %w", err)
	}
	c.Host = p.host
	return nil
}

// isProxy reports whether a process is one that pods are handed to, which is who
// may ask for leases.
func (p *parts) isProxy(peer handoff.Peer) error {
	if peer.PID != 0 && slices.ContainsFunc(p.server.Peers(), func(o handoff.Peer) bool { return o == peer }) {
		return nil
	}
	return fmt.Errorf("process %d is not the node's proxy: it is not connected to the ZDS socket", peer.PID)
}

// writeNode writes the node's status if it says something else than before.
func (p *parts) writeNode(cfg Config, lacking []string) {
	s := p.redirect.nodeStatus(cfg.Redirect, lacking)
	if p.node.Equal(s) {
		return
	}
	s.Since = time.Now().UTC().Truncate(time.Second)
	if old, err := p.status.Node(); err == nil && old.Redirector == s.Redirector {
		s.Since = old.Since
	}
	if err := p.status.WriteNode(s); err != nil {
		p.log.Error("node status cannot be written", "err", err)
		return
	}
	p.node = s
}

// uninstall takes everything away that this agent and those before it left.
func (p *parts) uninstall(dir string) (int, error) {
	return cleanup(p.status, p.host, p.redirect.table, dir)
}

func (p *parts) close() {
	if p.cni != nil {
		p.cni.Close()
	}
	p.server.Close()
	if p.granter != nil {
		p.granter.Close()
	}
	p.redirect.close()
	_ = p.home.Close() // only ever entered
}
