package outbound

import (
	"fmt"
	"net/netip"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// serviceWaypoint is the waypoint of this connection: one of several by
// weight, drawn anew for each, else the single one.
func serviceWaypoint(svc *mesh.Service, rnd uint64) *mesh.GatewayAddress {
	var total uint64
	for _, w := range svc.WeightedWaypoints {
		total += uint64(w.Weight)
	}
	if total == 0 {
		return svc.Waypoint
	}
	n := rnd % total // weights are small: the bias is below 2^-50
	for i := range svc.WeightedWaypoints {
		w := &svc.WeightedWaypoints[i]
		if n < uint64(w.Weight) {
			return &w.Gateway
		}
		n -= uint64(w.Weight)
	}
	return svc.Waypoint
}

// viaWaypoint sends the original destination, untranslated, to the waypoint. A
// waypoint that cannot be found fails the connection: going past it would skip
// what it enforces.
func viaWaypoint(m *mesh.Snapshot, r Request, gw *mesh.GatewayAddress, of string) (Plan, error) {
	w, svc, at, why := resolveGateway(m, r, gw)
	if w == nil {
		return Plan{}, &RouteError{r.Dst, fmt.Sprintf("waypoint %s of %s: %s", gatewayName(gw), of, why)}
	}
	p, err := direct(r, w, svc, at.Addr(), at.Port())
	if err != nil {
		return p, err
	}
	// The HBONE port of a waypoint is where it says, and whatever the pod
	// speaks otherwise, a waypoint speaks HBONE.
	p.Transport, p.Addr, p.Authority = flow.HBONE, at, r.Dst.String()
	p.Peers, p.Waypoint = peers(w, svc), true
	return p, nil
}

// resolveGateway finds a waypoint's workload, the service that stands for it,
// and the address to dial.
func resolveGateway(m *mesh.Snapshot, r Request, gw *mesh.GatewayAddress) (*mesh.Workload, *mesh.Service, netip.AddrPort, string) {
	port := gw.HBONEPort
	if port == 0 {
		port = portHBONE
	}
	svc := gatewayService(m, r.Src, gw)
	if svc != nil {
		c, why := m.PickWaypoint(svc, r.Src, netip.AddrPortFrom(r.Dst.Addr(), port), r.Rand)
		return c.Endpoint.Workload, svc, netip.AddrPortFrom(c.Addr, c.Port), why
	}
	if gw.Addr.IsValid() {
		if w := m.WorkloadByAddr(gw.Network, gw.Addr); w != nil {
			return w, nil, netip.AddrPortFrom(gw.Addr, port), ""
		}
	}
	return nil, nil, netip.AddrPort{}, "not known"
}

func gatewayService(m *mesh.Snapshot, src *mesh.Workload, gw *mesh.GatewayAddress) *mesh.Service {
	if gw.Addr.IsValid() {
		return m.ServiceByVIP(gw.Network, gw.Addr, src.Namespace)
	}
	return m.Service(gw.Host)
}

// ownWaypoint reports whether src is an instance of the waypoint itself, which
// then goes on to the workload directly.
func ownWaypoint(m *mesh.Snapshot, src *mesh.Workload, gw *mesh.GatewayAddress) bool {
	if gw.Addr.IsValid() && gw.Network == src.Network && src.HasAddr(gw.Addr) {
		return true
	}
	svc := gatewayService(m, src, gw)
	return svc != nil && m.Endpoints(svc.Host).Contains(src.UID)
}

func gatewayName(gw *mesh.GatewayAddress) string {
	if gw.Addr.IsValid() {
		return gw.Addr.String()
	}
	return gw.Host.String()
}
