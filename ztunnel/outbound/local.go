package outbound

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// Neighbours reaches pods of the same node inside the proxy.
type Neighbours interface {
	// Open asks the destination's side for a connection. ErrNotLocal means that
	// there is no such way, now or at all, and a tunnel is to be taken; any
	// other error is the destination's answer, as one to a CONNECT would be.
	Open(ctx context.Context, r LocalRequest) (*LocalPath, error)
}

// ErrNotLocal is a destination that cannot be reached inside the proxy.
var ErrNotLocal = errors.New("not reachable inside the proxy")

// LocalRequest is to a neighbour what a CONNECT is to a peer.
type LocalRequest struct {
	Stay   string         // of the source pod
	Src    netip.AddrPort // of the application
	Self   *mesh.Workload
	Peer   identity.ID // of the source pod: this proxy holds its namespace, which proves it
	Dst    *mesh.Workload
	Target netip.AddrPort
	Asked  netip.AddrPort // by the application

	Service     *mesh.Service
	TraceParent string
	Stats       *relay.Stats // one pair of sockets, one count
	Cut         func(error)  // ends the connection
}

// LocalPath is an open connection to a neighbour's application.
type LocalPath struct {
	Conn relay.Conn
	// Ctx ends when either side's connection is to be cut.
	Ctx context.Context
	// End must be called once, with how the connection ended.
	End func(error)
}

// neighbourError is a neighbour's answer: final, as a peer's status is.
type neighbourError struct{ err error }

func (e *neighbourError) Error() string { return e.err.Error() }
func (e *neighbourError) Unwrap() error { return e.err }

// local tries the way inside the proxy. The source address must be the pod's
// own: it is what identifies the pod to policy, and what the lease is about.
// Between trust domains it is for certificates to say whether they trust.
func (p *Proxy) local(ctx context.Context, c *flow.Conn, plan Plan, r Request) (*LocalPath, error) {
	src := c.Record().SrcAddr
	target := netip.AddrPortFrom(plan.Addr.Addr(), plan.target)
	if p.cfg.Neighbours == nil || !plan.SameNode || r.Src.UID == plan.Dst.UID || !r.Src.HasAddr(src.Addr()) ||
		src.Addr().Is4() != target.Addr().Is4() || r.Src.TrustDomain != plan.Dst.TrustDomain {
		return nil, ErrNotLocal
	}
	path, err := p.cfg.Neighbours.Open(ctx, LocalRequest{
		Stay: p.cfg.Tunnel, Src: src, Self: r.Src, Peer: r.Src.Identity, Dst: plan.Dst, Target: target, Asked: r.Dst,
		Service: plan.Service, TraceParent: c.TraceParent(), Stats: c.Stats, Cut: c.Cut,
	})
	if err != nil && !errors.Is(err, ErrNotLocal) {
		return nil, &neighbourError{err}
	}
	return path, err
}

// asLocal is the plan of a connection that takes the way inside the proxy.
func (p Plan) asLocal() Plan {
	p.Transport, p.Addr = flow.Local, netip.AddrPortFrom(p.Addr.Addr(), p.target)
	p.Authority, p.Peers = "", nil
	return p
}

// DeniedThere keeps the destination's denial apart from our own
// decisions: it is counted there.
func DeniedThere(err error) error {
	if d, ok := errors.AsType[*flow.DenyError](err); ok {
		return flow.Failed(flow.ReasonPolicy, fmt.Errorf("denied by destination's policy: %s", d.Error()))
	}
	return err
}
