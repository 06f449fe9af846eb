package app

import (
	"fmt"
	"os"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/local"
)

// describeMesh starts what tells this process of the mesh: a file first, read
// once, then the control plane, if there is one.
func (a *app) describeMesh(g *boot.Group, reg prometheus.Registerer) error {
	if err := a.loadLocal(); err != nil {
		return err
	}
	if a.cfg.XDSAddress == "" {
		a.meshKnown()
		return nil
	}
	xds, err := a.xdsClient(reg)
	if err != nil {
		return err
	}
	if a.cfg.OnDemand {
		a.node.demand = xds.Demand // before any workload is served
	}
	g.Go("xds client", xds.Run)
	return nil
}

// meshKnown lets workloads be served.
func (a *app) meshKnown() {
	close(a.syncedc)
	a.gate.open("state manager")
}

func (a *app) loadLocal() error {
	text, from := []byte(a.cfg.LocalXDS), "LOCAL_XDS"
	if path := a.cfg.LocalXDSPath; path != "" {
		var err error
		if text, err = os.ReadFile(path); err != nil {
			return fmt.Errorf("LOCAL_XDS_PATH: %w", err)
		}
		from = path
	}
	if len(text) == 0 {
		return nil
	}
	deltas, err := local.Parse(text)
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	for _, d := range deltas {
		if rejects := a.node.store.Apply(d); len(rejects) > 0 {
			return fmt.Errorf("%s: %s: %s", from, rejects[0].Name, rejects[0].Reason)
		}
	}
	v := a.node.store.View()
	a.static = v
	a.log.Info("mesh described by a file", "file", from, "workloads", v.Mesh.Workloads(), "services", v.Mesh.Services(), "policies", v.Policies.Len())
	return nil
}
