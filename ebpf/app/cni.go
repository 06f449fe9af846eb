package app

import (
	"log/slog"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/xds/boot"
)

// keep opens what outlives the agent: where pods are attached, and what the CNI
// plugin decides by while no agent answers.
func (c Config) keep(a *agent.Config, d *agent.DirConfig, log *slog.Logger) error {
	if c.StateDir == "" {
		return nil
	}
	var err error
	if a.Attachments, err = attach.OpenStore(c.StateDir); err != nil {
		return err
	}
	facts, err := attach.OpenFacts(c.StateDir)
	if err != nil {
		return err
	}
	d.Facts = func(f attach.Facts) {
		if err := facts.Write(f); err != nil {
			log.Error("no pod but excluded namespaces' will start on this node while the agent is away", "err", err)
		}
	}
	return nil
}

// listenCNI makes the plugin's socket, if there shall be one.
func (p *parts) listenCNI(cfg Config, log *slog.Logger) (err error) {
	if cfg.CNISocket == "" {
		return nil
	}
	p.cni, err = attach.Listen(attach.ServerConfig{Path: cfg.CNISocket, Handler: p.agent, Logger: boot.Scoped(log, "cni"), Registerer: p.registry})
	return err
}
