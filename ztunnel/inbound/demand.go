package inbound

import (
	"context"
	"net/netip"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

// learn asks for what an authority names, if it is neither this pod nor known: a
// service of the pod, or what the pod is the waypoint of.
func (p *Proxy) learn(ctx context.Context, self *mesh.Workload, authority string, local netip.Addr) error {
	if p.cfg.Demand == nil {
		return nil
	}
	host, _, err := splitAuthority(authority)
	if err != nil {
		return nil // Target says it
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if a = a.Unmap(); a == local {
			return nil
		}
		return p.cfg.Demand(ctx, mesh.NetAddr{Network: self.Network, Addr: a}.String())
	}
	for h := range self.Services {
		if h.Name == host {
			return p.cfg.Demand(ctx, h.String())
		}
	}
	return nil
}
