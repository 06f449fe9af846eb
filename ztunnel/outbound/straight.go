package outbound

import (
	"net/netip"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

// Straight is a pod of the client's node to which connections need no proxy, as
// far as routing goes.
type Straight struct {
	Dst     *mesh.Workload
	Addr    netip.AddrPort
	Service *mesh.Service
	Share   float64 // of the connections
}

// Straights are the pods of the same node among which Route would choose for an
// address, with the share that it would give them. It is stricter than Route where
// more than addresses counts: behind a waypoint, between trust domains and where
// the application is not at the address, nothing goes straight.
func Straights(m *mesh.Snapshot, src *mesh.Workload, dst netip.AddrPort) []Straight {
	r := Request{Src: src, Dst: dst}
	byAddr := m.WorkloadByAddr(src.Network, dst.Addr())
	svc := m.ServiceByVIP(src.Network, dst.Addr(), src.Namespace)
	if svc != nil && byAddr.IsPod() && svc.Namespace != src.Namespace && svc.Namespace != byAddr.Namespace {
		svc = nil // as Route has it
	}
	var out []Straight
	add := func(w *mesh.Workload, svc *mesh.Service, addr netip.Addr, port uint16, share float64) {
		if w.Waypoint != nil || w.AppTunnel != nil || w.UID == src.UID || w.TrustDomain != src.TrustDomain || OwnPort(port) {
			return
		}
		p, err := direct(m, r, w, svc, addr, port)
		if err != nil || !p.SameNode || p.Waypoint || p.Inner != nil || !p.Addr.IsValid() || p.Addr.Addr().Is4() != dst.Addr().Is4() {
			return
		}
		out = append(out, Straight{w, netip.AddrPortFrom(p.Addr.Addr(), p.target), svc, share})
	}
	switch {
	case svc != nil && (svc.Waypoint != nil || len(svc.WeightedWaypoints) > 0 || svc.Mode == workload.LoadBalancing_PASSTHROUGH):
	case svc != nil:
		for c, share := range m.Shares(svc, src, dst, nil) {
			add(c.Endpoint.Workload, svc, c.Addr, c.Port, share)
		}
	case byAddr != nil:
		add(byAddr, nil, dst.Addr(), dst.Port(), 1)
	}
	return out
}
