package outbound

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
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
	// Addr is dialled: the target itself, or the HBONE port in front of it. It
	// is invalid while Hostname has to be resolved; At completes the plan then.
	Addr     netip.AddrPort
	Hostname string
	// Authority of the CONNECT request, with Transport HBONE.
	Authority string
	// Peers that may answer, with Transport HBONE.
	Peers []identity.ID
	// Inner are the peers that may answer within the tunnel to another
	// network's gateway; nil without one.
	Inner []identity.ID
	// Dst is the workload chosen, nil for a passthrough; Hop is the one that is
	// dialled, which in front of another network is its gateway.
	Dst, Hop *mesh.Workload
	// Service that the application addressed, if any.
	Service *mesh.Service
	// Waypoint says that Dst is a waypoint in front of the target.
	Waypoint bool
	// SameNode says that Dst is on this node and may be reached without a
	// tunnel, if this node's proxy serves it.
	SameNode bool

	target, tunnel uint16 // ports of the target and of its HBONE listener
}

// At completes the plan with the address of its host name.
func (p Plan) At(a netip.Addr) Plan {
	target := netip.AddrPortFrom(a, p.target)
	if p.Addr = target; p.Transport == flow.HBONE {
		p.Addr = netip.AddrPortFrom(a, p.tunnel)
		if p.Authority == "" {
			p.Authority = target.String()
		}
	}
	return p
}

// through makes the plan an HBONE tunnel that asks for an authority.
func (p Plan) through(authority string, peers []identity.ID) Plan {
	p.Transport, p.Authority, p.Peers = flow.HBONE, authority, peers
	return p
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
	// Except is the uid of a workload that is not to be dialled: it has just
	// failed this connection.
	Except string
	// Avoid names workloads to be dialled only if there is no other; nil: none.
	Avoid mesh.Skip
	// Elsewhere says whether a peer that has left or fallen silent is to be
	// given up for another; nil: no.
	Elsewhere func() bool

	early *early // nil: nothing goes along with the request for a tunnel
}

// pick tries to do without what is to be avoided.
func (r *Request) pick(try func(mesh.Skip) (mesh.Choice, string)) (mesh.Choice, string) {
	except := func(w *mesh.Workload) bool { return w.UID == r.Except }
	if r.Avoid != nil {
		if c, why := try(func(w *mesh.Workload) bool { return except(w) || r.Avoid(w) }); why == "" {
			return c, why
		}
	}
	if r.Except == "" {
		return try(nil)
	}
	return try(except)
}

// Route decides. It is the reference's tree in the reference's order:
//
//	proxy's own port            → refused
//	service with a waypoint     → HBONE to the waypoint, original authority
//	service                     → an endpoint of it; none → refused
//	… in another network        → HBONE within HBONE to that network's gateway
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
	if svc != nil && byAddr.IsPod() && svc.Namespace != r.Src.Namespace && svc.Namespace != byAddr.Namespace {
		svc = nil // not the reference's: a ServiceEntry would take the pod's connections in the whole mesh
	}
	// An address that is a workload's is no service's for waypoints, but it is
	// for load balancing: the reference's order, kept to the letter.
	if byAddr == nil && svc != nil {
		if gw := serviceWaypoint(svc, r.Rand); gw != nil {
			return viaWaypoint(m, r, gw, svc, "service "+svc.Host.String())
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
	c, why := r.pick(func(skip mesh.Skip) (mesh.Choice, string) { return m.PickOther(svc, r.Src, r.Dst, r.Rand, skip) })
	if why != "" {
		return Plan{Service: svc}, &RouteError{r.Dst, fmt.Sprintf("service %s: %s", svc.Host, why)}
	}
	return direct(m, r, c.Endpoint.Workload, svc, c.Addr, c.Port)
}

func toWorkload(m *mesh.Snapshot, r Request, w *mesh.Workload) (Plan, error) {
	if w.Waypoint != nil && !ownWaypoint(m, r.Src, w.Waypoint) {
		return viaWaypoint(m, r, w.Waypoint, nil, "workload "+w.Namespace+"/"+w.Name)
	}
	return direct(m, r, w, nil, r.Dst.Addr(), r.Dst.Port())
}

// direct goes to an address of w, or to its host name if there is no address.
func direct(m *mesh.Snapshot, r Request, w *mesh.Workload, svc *mesh.Service, addr netip.Addr, port uint16) (Plan, error) {
	p := Plan{Transport: flow.Plaintext, Dst: w, Hop: w, Service: svc, target: port, tunnel: portHBONE}
	if w.Network != r.Src.Network {
		return throughGateway(m, r, p, svc)
	}
	if w.Tunnel == workload.TunnelProtocol_HBONE {
		p = p.through("", peers(w, svc))
		p.SameNode = w.SameNode == ambit.WorkloadExtension_SAME_NODE_LOCAL && w.Node != "" && w.Node == r.Src.Node
	}
	return p.located(r, addr)
}

// located completes the plan for the address chosen, or leaves the host name
// to be resolved.
func (p Plan) located(r Request, addr netip.Addr) (Plan, error) {
	if addr.IsValid() {
		return p.At(addr), nil
	}
	if p.Hostname = p.Hop.Hostname; p.Hostname == "" {
		return p, &RouteError{r.Dst, fmt.Sprintf("workload %s has neither an address nor a host name", p.Hop.UID)}
	}
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
