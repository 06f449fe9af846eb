package outbound

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
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

// viaWaypoint sends the original destination, untranslated, to the waypoint of
// a service or, with svc nil, of a workload. A waypoint that cannot be found
// fails the connection: going past it would skip what it enforces.
func viaWaypoint(m *mesh.Snapshot, r Request, gw *mesh.GatewayAddress, svc *mesh.Service, of string) (Plan, error) {
	w, gwSvc, at, why := resolveGateway(m, r, gw)
	if w == nil {
		return Plan{Service: svc}, &RouteError{r.Dst, fmt.Sprintf("waypoint %s of %s: %s", gatewayName(gw), of, why)}
	}
	p := Plan{Dst: w, Hop: w, Service: svc, Waypoint: true, tunnel: at.Port()}
	if w.Network != r.Src.Network {
		return throughGateway(m, r, p, gwSvc)
	}
	// Whatever the pod speaks otherwise, a waypoint speaks HBONE.
	return p.through(r.Dst.String(), peers(w, gwSvc)).located(r, at.Addr())
}

// throughGateway goes to a workload of another network, p.Dst, which was
// chosen for the service of: HBONE to that network's gateway, and within it
// HBONE to whom the gateway hands on. The gateway learns only the service's
// name and port, so nothing but services can be reached, and who answers must
// be one of the service's subject alternative names, since which endpoint it is
// the gateway decides.
func throughGateway(m *mesh.Snapshot, r Request, p Plan, of *mesh.Service) (Plan, error) {
	fail := func(format string, args ...any) (Plan, error) {
		return p, &RouteError{r.Dst, fmt.Sprintf("workload %s is in network %q, this node in %q: ", p.Dst.UID, p.Dst.Network, r.Src.Network) + fmt.Sprintf(format, args...)}
	}
	switch {
	case p.Service == nil:
		return fail("only services can be reached in other networks, not addresses of workloads")
	case p.Dst.NetworkGateway == nil:
		return fail("the workload has no network gateway")
	case of == nil || len(of.SANs) == 0:
		return fail("its service has no subject alternative names, so nobody there could prove to serve it")
	}
	gw, gwSvc, at, why := resolveGateway(m, r, p.Dst.NetworkGateway)
	if gw == nil {
		return fail("network gateway %s: %s", gatewayName(p.Dst.NetworkGateway), why)
	}
	p.Hop, p.Inner, p.tunnel = gw, of.SANs, at.Port()
	authority := net.JoinHostPort(p.Service.Host.Name, strconv.Itoa(int(r.Dst.Port())))
	return p.through(authority, gatewayPeers(m, gw, gwSvc)).located(r, at.Addr())
}

// gatewayPeers may answer for a gateway: itself, and whom its services name.
func gatewayPeers(m *mesh.Snapshot, gw *mesh.Workload, svc *mesh.Service) []identity.ID {
	ids := peers(gw, svc)
	for host := range gw.Services {
		if s := m.Service(host); s != nil {
			for _, id := range s.SANs {
				if !slices.Contains(ids, id) {
					ids = append(ids, id)
				}
			}
		}
	}
	return ids
}

// resolveGateway finds the workload of a waypoint or network gateway, the service that stands for it,
// and the address to dial.
func resolveGateway(m *mesh.Snapshot, r Request, gw *mesh.GatewayAddress) (*mesh.Workload, *mesh.Service, netip.AddrPort, string) {
	port := gw.HBONEPort
	if port == 0 {
		port = portHBONE
	}
	svc := gatewayService(m, r.Src, gw)
	if svc != nil {
		c, why := r.pick(func(skip mesh.Skip) (mesh.Choice, string) {
			return m.PickWaypoint(svc, r.Src, netip.AddrPortFrom(r.Dst.Addr(), port), r.Rand, skip)
		})
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
