package app

import (
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/xds/boot"
)

// parts is an agent that is put together and not running yet.
type parts struct {
	agent    *agent.Agent
	rules    *redirect.Dataplane
	host     *redirect.Host
	status   *agent.StatusDir
	server   *handoff.Server
	home     *netns.NS
	ready    *boot.Ready
	registry *prometheus.Registry
}

func assemble(cfg Config, log *slog.Logger) (_ *parts, err error) {
	p := &parts{ready: boot.NewReady(), registry: boot.NewRegistry("ambit-node")}
	if p.rules, err = redirect.New(cfg.redirect(log)); err != nil {
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
			_ = p.home.Close() // err says more
		}
	}()
	if p.host, err = redirect.NewHost(cfg.redirect(log), p.home); err != nil {
		return nil, err
	}
	// The kernel is asked now, so that a node that cannot do it says so at once.
	var hostRules agent.HostRules
	if cfg.HostProbes {
		if err := p.host.Set([]netip.Addr{}); err != nil {
			return nil, fmt.Errorf("exempt the node's probes (--host-probes=false does without): %w", err)
		}
		hostRules = p.host
	}
	dirs, err := cfg.dirs()
	if err != nil {
		return nil, err
	}
	p.server, err = handoff.Listen(handoff.ServerConfig{
		Path: cfg.ZDSPath, Logger: boot.Scoped(log, "zds"), Registerer: p.registry,
		// The agent is made from the server; no proxy is served before both are.
		SnapshotResult: func(uid string, err error) { p.agent.SnapshotResult(uid, err) },
	})
	if err != nil {
		return nil, err
	}
	p.agent = agent.New(agent.Config{
		Source: agent.NewDirSource(agent.DirConfig{
			Dirs: dirs, Node: cfg.Node, Excluded: cfg.ExcludeNamespaces, DNS: cfg.DNSCapture, Logger: boot.Scoped(log, "source"),
		}),
		Proxies: p.server, Rules: p.rules, Host: hostRules, Status: p.status, NodeNS: p.home.Inode(),
		Propagation: cfg.Propagation, Drain: cfg.Drain,
		Synced: p.ready.Block("pods"),
		Logger: boot.Scoped(log, "agent"), Registerer: p.registry,
	})
	return p, nil
}

func (p *parts) close() {
	p.server.Close()
	_ = p.home.Close() // only ever entered
}
