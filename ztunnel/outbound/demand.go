package outbound

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// Demand returns when the control plane's word on each key is in force: a
// resource name, or network/address. An error means that it is not known, and
// then nothing may be decided: a destination that the mesh protects would be
// taken for one outside of it.
type Demand func(ctx context.Context, keys ...string) error

// learn asks for what a route to dst needs and the mesh, as far as it is known,
// does not have: first the destination, then the gateways that it names.
func (p *Proxy) learn(ctx context.Context, src *mesh.Workload, dst netip.Addr) error {
	if p.cfg.Demand == nil || dst.IsLoopback() || dst.IsMulticast() || dst.IsUnspecified() {
		return nil
	}
	if err := p.cfg.Demand(ctx, mesh.NetAddr{Network: src.Network, Addr: dst}.String()); err != nil {
		return flow.Failed(flow.ReasonOther, fmt.Errorf("destination %s: %w", dst, err))
	}
	if keys := gateways(p.cfg.View().Mesh, src, dst); len(keys) > 0 {
		if err := p.cfg.Demand(ctx, keys...); err != nil {
			return flow.Failed(flow.ReasonOther, fmt.Errorf("gateway in front of %s: %w", dst, err))
		}
	}
	return nil
}

// gateways are the waypoints of what dst is, and the gateways of its networks.
func gateways(m *mesh.Snapshot, src *mesh.Workload, dst netip.Addr) (keys []string) {
	add := func(g *mesh.GatewayAddress) {
		switch {
		case g == nil:
		case g.Addr.IsValid():
			keys = append(keys, mesh.NetAddr{Network: g.Network, Addr: g.Addr}.String())
		default:
			keys = append(keys, g.Host.String())
		}
	}
	if w := m.WorkloadByAddr(src.Network, dst); w != nil {
		add(w.Waypoint)
		add(w.NetworkGateway)
	}
	svc := m.ServiceByVIP(src.Network, dst, src.Namespace)
	if svc == nil {
		return keys
	}
	add(svc.Waypoint)
	for i := range svc.WeightedWaypoints {
		add(&svc.WeightedWaypoints[i].Gateway)
	}
	set := m.Endpoints(svc.Host)
	seen := map[mesh.GatewayAddress]bool{}
	for i := range set.Len() {
		w := set.At(i).Workload
		if g := w.NetworkGateway; g != nil && w.Network != src.Network && !seen[*g] {
			seen[*g] = true
			add(g)
		}
	}
	return keys
}
