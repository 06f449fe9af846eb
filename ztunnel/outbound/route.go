package outbound

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// Ports of the proxy itself, in every pod's namespace.
const (
	portOutbound  = 15001
	portPlaintext = 15006
	portHBONE     = 15008
	portSOCKS     = 15080
)

// OwnPort reports whether a port belongs to the proxy: nobody connects to it
// through the proxy.
func OwnPort(p uint16) bool {
	return p == portOutbound || p == portPlaintext || p == portHBONE || p == portSOCKS
}

// Plan is what to do with one connection.
type Plan struct {
	Transport flow.Transport
	// Addr is dialled: the target itself, or the HBONE port in front of it.
	Addr netip.AddrPort
	// Authority of the CONNECT request, with Transport HBONE.
	Authority string
	// Peers that may answer, with Transport HBONE.
	Peers []identity.ID
	// Dst is the workload chosen, nil for a passthrough.
	Dst *mesh.Workload
	// Service that the application addressed, if any.
	Service *mesh.Service
	// Waypoint says that Dst is a waypoint in front of the target.
	Waypoint bool
}

// RouteError says why there is nowhere to go.
type RouteError struct {
	Dst    netip.AddrPort
	Reason string
}

func (e *RouteError) Error() string { return fmt.Sprintf("no route to %s: %s", e.Dst, e.Reason) }

// ErrSelfCall is an application that connects to the proxy's own port.
var ErrSelfCall = errors.New("connection to the proxy's own port")

// Request is one connection of a workload to an address.
type Request struct {
	Src *mesh.Workload
	Dst netip.AddrPort
	// Rand is any random number: the same one gives the same plan.
	Rand uint64
}

// Route decides. It is the reference's tree in the reference's order:
//
//	proxy's own port            → refused
//	service with a waypoint     → HBONE to the waypoint, original authority
//	service                     → an endpoint of it; none → refused
//	workload with a waypoint    → HBONE to the waypoint, original authority
//	workload                    → HBONE or plain TCP, as it speaks
//	anything else               → passthrough
func Route(m *mesh.Snapshot, r Request) (Plan, error) {
	dst := netip.AddrPortFrom(r.Dst.Addr().Unmap(), r.Dst.Port())
	r.Dst = dst
	if OwnPort(dst.Port()) && (dst.Addr().IsLoopback() || r.Src.HasAddr(dst.Addr())) {
		return Plan{}, ErrSelfCall
	}
	byAddr := m.WorkloadByAddr(r.Src.Network, dst.Addr())
	svc := m.ServiceByVIP(r.Src.Network, dst.Addr(), r.Src.Namespace)
	// An address that is a workload's is no service's for waypoints, but it is
	// for load balancing: the reference's order, kept to the letter.
	if byAddr == nil && svc != nil {
		if gw := serviceWaypoint(svc, r.Rand); gw != nil {
			p, err := viaWaypoint(m, r, gw, "service "+svc.Host.String())
			p.Service = svc
			return p, err
		}
	}
	switch {
	case svc != nil && svc.Mode == workload.LoadBalancing_PASSTHROUGH:
		return Plan{Transport: flow.Passthrough, Addr: dst, Service: svc, Dst: byAddr}, nil
	case svc != nil:
		return toService(m, r, svc)
	case byAddr != nil:
		return toWorkload(m, r, byAddr)
	}
	return Plan{Transport: flow.Passthrough, Addr: dst}, nil
}

func toService(m *mesh.Snapshot, r Request, svc *mesh.Service) (Plan, error) {
	c, why := m.Pick(svc, r.Src, r.Dst, r.Rand)
	if why != "" {
		return Plan{Service: svc}, &RouteError{r.Dst, fmt.Sprintf("service %s: %s", svc.Host, why)}
	}
	p, err := direct(r, c.Endpoint.Workload, svc, c.Addr, c.Port)
	p.Service = svc
	return p, err
}

func toWorkload(m *mesh.Snapshot, r Request, w *mesh.Workload) (Plan, error) {
	if w.Waypoint != nil && !ownWaypoint(m, r.Src, w.Waypoint) {
		return viaWaypoint(m, r, w.Waypoint, "workload "+w.Namespace+"/"+w.Name)
	}
	return direct(r, w, nil, r.Dst.Addr(), r.Dst.Port())
}

func direct(r Request, w *mesh.Workload, svc *mesh.Service, addr netip.Addr, port uint16) (Plan, error) {
	p := Plan{Dst: w}
	if w.Network != r.Src.Network {
		return p, &RouteError{r.Dst, fmt.Sprintf("workload %s is in network %q, this node in %q: other networks are not supported by this build",
			w.UID, w.Network, r.Src.Network)}
	}
	if !addr.IsValid() {
		return p, &RouteError{r.Dst, fmt.Sprintf("workload %s has no address but the host name %q: resolving it is not supported by this build", w.UID, w.Hostname)}
	}
	target := netip.AddrPortFrom(addr, port)
	if w.Tunnel != workload.TunnelProtocol_HBONE {
		p.Transport, p.Addr = flow.Plaintext, target
		return p, nil
	}
	p.Transport, p.Addr, p.Authority = flow.HBONE, netip.AddrPortFrom(addr, portHBONE), target.String()
	p.Peers = peers(w, svc)
	return p, nil
}

// peers may answer for w: itself, and whom the service names besides.
func peers(w *mesh.Workload, svc *mesh.Service) []identity.ID {
	ids := []identity.ID{w.Identity}
	if svc != nil {
		for _, id := range svc.SANs {
			if !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	return ids
}
