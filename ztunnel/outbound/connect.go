package outbound

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"syscall"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// connect routes and dials, and when an endpoint cannot be reached, tries one
// other. What the application has sent nobody can have acted on by then, or it is
// not tried again (early.go), so nothing can happen twice.
func (p *Proxy) connect(ctx context.Context, c *flow.Conn, r Request) (way, error) {
	m := p.cfg.View().Mesh
	r.Avoid = p.avoid(r.Dst)
	plan, err := Route(m, r)
	c.Decided()
	describe(c.Record(), plan, r.Dst)
	if err != nil {
		return way{}, nowhere(err)
	}
	routed := plan // before reach takes the way inside the proxy, which another endpoint need not have
	first := r
	first.Elsewhere = func() bool { _, ok := another(p.cfg.View().Mesh, r, routed); return ok }
	up, err := p.reach(ctx, c, &plan, first)
	if err == nil || ctx.Err() != nil {
		return up, explain(err, plan)
	}
	if !endpointFault(err, routed) {
		if errors.Is(err, hbone.ErrUncertain) { // this connection is for nobody else, the next one is
			p.cfg.Health.failed(p.cfg.Pod, plan.Hop, err)
		}
		return up, explain(err, plan)
	}
	p.cfg.Health.failed(p.cfg.Pod, plan.Hop, err)
	other, ok := another(p.cfg.View().Mesh, r, routed) // of now: others may have left too
	if !ok {
		return way{}, explain(err, plan)
	}
	c.Record().Retries = 1
	describe(c.Record(), other, r.Dst)
	up, err = p.reach(ctx, c, &other, r)
	p.cfg.Health.retried(err)
	if err != nil && ctx.Err() == nil && endpointFault(err, other) {
		p.cfg.Health.failed(p.cfg.Pod, other.Hop, err)
	}
	return up, explain(err, other)
}

// avoid is who need not be chosen: who has just failed, and who has its share of
// the connections without the proxy.
func (p *Proxy) avoid(dst netip.AddrPort) func(*mesh.Workload) bool {
	failed := p.cfg.Health.avoid(p.cfg.Pod)
	if p.cfg.Leased == nil {
		return failed
	}
	return func(w *mesh.Workload) bool { return p.cfg.Leased(dst, w) || failed != nil && failed(w) }
}

// way is an open connection to the destination.
type way struct {
	relay.Conn
	early int        // bytes of the application's that were sent with the request for it
	rest  *rest      // what goes there before anything else; nil: nothing
	local *LocalPath // of a neighbour's
}

// abandon ends a way that is not used.
func (w way) abandon(err error) {
	w.rest.forget()
	relay.Reset(w.Conn)
	if w.local != nil {
		w.local.End(err)
	}
}

// join relays until both ends have ended, which is the end of the connection. It may return before.
func (w way) join(ctx context.Context, c *flow.Conn, down relay.Conn, ended func()) {
	if w.local != nil {
		ctx = w.local.Ctx
	}
	var first io.WriterTo
	if w.rest != nil {
		first = w.rest
	}
	relay.StartAfter(ctx, first, down, w.Conn, c.Stats, func(err error) {
		err = flow.Cause(ctx, err)
		if w.local != nil {
			w.local.End(err)
			err = DeniedThere(err)
		}
		finish(c, down, err, ended)
	})
}

// finish is the end of every connection, joined or not.
func finish(c *flow.Conn, down relay.Conn, err error, ended func()) {
	if err != nil {
		relay.Reset(down)
	}
	c.End(err)
	ended()
}

// another is a plan for the same request that dials somebody else. It must not
// widen what the first one allowed: the same service, the same step in front of
// it, and no plaintext where there was a tunnel.
func another(m *mesh.Snapshot, r Request, first Plan) (Plan, bool) {
	if first.Hop == nil || first.Transport == flow.Passthrough {
		return Plan{}, false
	}
	r.Except = first.Hop.UID
	p, err := Route(m, r)
	if err != nil || p.Hop == nil || p.Hop.UID == first.Hop.UID {
		return Plan{}, false
	}
	same := p.Service == first.Service && p.Waypoint == first.Waypoint && p.Transport == first.Transport && (p.Inner == nil) == (first.Inner == nil)
	return p, same
}

// reach resolves what is to be resolved and dials.
func (p *Proxy) reach(ctx context.Context, c *flow.Conn, plan *Plan, r Request) (way, error) {
	if !plan.Addr.IsValid() {
		if p.cfg.Resolver == nil {
			return way{}, &ResolveError{plan.Hop, errors.New("no resolver is configured")}
		}
		a, err := p.cfg.Resolver.Resolve(ctx, r.Src, plan.Hostname, r.Dst.Addr().Is6())
		if err != nil {
			return way{}, &ResolveError{plan.Hop, err}
		}
		*plan = plan.At(a)
		describe(c.Record(), *plan, r.Dst)
	}
	path, err := p.local(ctx, c, *plan, r)
	if !errors.Is(err, ErrNotLocal) {
		*plan = plan.asLocal()
		describe(c.Record(), *plan, r.Dst)
		if err != nil {
			return way{}, err
		}
		return way{Conn: path.Conn, local: path}, nil
	}
	return p.dial(ctx, c, *plan, r)
}

// ResolveError is a workload whose host name has no address to be had.
type ResolveError struct {
	Workload *mesh.Workload
	Err      error
}

func (e *ResolveError) Error() string {
	return fmt.Sprintf("resolve host name %q of workload %s: %v", e.Workload.Hostname, e.Workload.UID, e.Err)
}

func (e *ResolveError) Unwrap() error { return e.Err }

// endpointFault reports whether an error is the endpoint's failure to be
// reached, before a byte was sent to its application. What a peer decided
// (policy, a certificate that is not accepted) is an answer and is final, and
// what failed on this side would fail again. That an application does not take
// connections is its endpoint's fault: nothing has reached it.
func endpointFault(err error, plan Plan) bool {
	if err == nil {
		return false
	}
	if s, ok := errors.AsType[*hbone.StatusError](err); ok {
		// Between networks and behind a waypoint the answer need not be the endpoint's.
		return s.Code == 503 && !plan.Waypoint && plan.Inner == nil
	}
	if n, ok := errors.AsType[*neighbourError](err); ok {
		_, denied := errors.AsType[*flow.DenyError](n.err)
		return !denied && unreachable(n.err)
	}
	if _, ok := errors.AsType[*cert.UnavailableError](err); ok {
		return false // waiting for the CA timed out, not the endpoint
	}
	if _, ok := errors.AsType[*ledger.ExhaustedError](err); ok {
		return false // nor is our own bound its fault
	}
	d, ok := errors.AsType[*hbone.DialError](err)
	if !ok {
		return unreachable(err)
	}
	switch d.Stage {
	case hbone.StageTCP:
		return d.Gone() || d.Timeout() || unreachable(d.Err)
	case hbone.StageTLS:
		return d.Timeout()
	case hbone.StageH2:
		return true
	case hbone.StageConnect:
		return d.Refused() || d.Gone()
	}
	return false
}

// unreachable tells the network's answers from our own shortages.
func unreachable(err error) bool {
	for _, e := range []error{syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ETIMEDOUT, os.ErrDeadlineExceeded} {
		if errors.Is(err, e) {
			return true
		}
	}
	t, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err)
	return ok && t.Timeout()
}
