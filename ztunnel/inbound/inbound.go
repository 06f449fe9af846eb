// Package inbound takes connections for an enrolled pod.
//
//	15008  TLS, CONNECT ─→ target ─┐
//	15006  original destination ───┴→ policy ─→ dial the application ─→ relay
//	                                  │           as the client (spoofed source)
//	                                  └ 401 or reset, with the reason in the log
//
// Files: inbound.go (the two ways in), target.go (what a CONNECT means, pure),
// tunnel.go (application tunnels), proxyproto.go (their header), dial.go (the
// way to the application).
//
// A Proxy serves one pod; its methods are called once per connection or stream
// and may return before that has ended. TLS and framing are hbone's.
package inbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
	"github.com/ambit-mesh/ambit/ztunnel/stack"
)

// Config of one pod's Proxy.
type Config struct {
	Pod string // uid
	// Self is the pod's workload; it waits a bounded time for one not known yet.
	Self func(ctx context.Context) (*mesh.Workload, error)
	View func() *store.View
	Flow *flow.Table
	// Dial reaches the application, from src if that is possible.
	Dial        func(ctx context.Context, src netip.Addr, dst netip.AddrPort) (net.Conn, error)
	OriginalDst func(net.Conn) (netip.AddrPort, error)
	// Demand asks the control plane for what is not known, by resource name or
	// network/address; nil: everything is known.
	Demand func(ctx context.Context, keys ...string) error
	// NoBaggage leaves the pod's description out of answers.
	NoBaggage bool
	// LocalTunnel sends connections with a PROXY header to the pod's loopback
	// address, where nobody but the proxy can reach the application.
	LocalTunnel bool
	// Only is the one port that peers may ask for; 0: any that is not the proxy's.
	Only uint16
}

// Proxy of one pod.
type Proxy struct{ cfg Config }

// New returns a Proxy.
func New(cfg Config) *Proxy { return &Proxy{cfg: cfg} }

// Serve takes one plaintext connection that was captured on its way in, which a
// close resets: its listener has seen to that. It may return when that is joined;
// ended is called once, when it has ended.
func (p *Proxy) Serve(ctx context.Context, down relay.Conn, ended func()) {
	stack.Reserve()
	rec := flow.Record{Direction: flow.Inbound, Pod: p.cfg.Pod, SrcAddr: outbound.AddrPort(down.RemoteAddr()), Transport: flow.Plaintext}
	c, ctx := p.cfg.Flow.Begin(ctx, rec)
	end := func(err error) {
		if err != nil {
			relay.Reset(down)
		}
		c.End(err)
		ended()
	}
	app, err := p.openPlaintext(ctx, c, down)
	if err != nil {
		end(err)
		return
	}
	ledger.Opened(ctx)
	relay.Start(ctx, down, app, c.Stats, func(err error) { end(flow.Cause(ctx, err)) })
}

// openPlaintext opens the way to the application.
func (p *Proxy) openPlaintext(ctx context.Context, c *flow.Conn, down relay.Conn) (relay.Conn, error) {
	rec := c.Record()
	dst, err := p.cfg.OriginalDst(down)
	if err != nil {
		return nil, err
	}
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	rec.DstAddr = dst
	if outbound.OwnPort(dst.Port()) {
		return nil, flow.Failed(flow.ReasonSelfCall, outbound.ErrSelfCall)
	}
	self, err := p.cfg.Self(ctx)
	if err != nil {
		return nil, err
	}
	m := p.cfg.View().Mesh
	rec.Dst, rec.Src = self, m.WorkloadByAddr(self.Network, rec.SrcAddr.Addr())
	name(rec, likelyService(m, self, dst.Port()))
	c.Describe()
	if err := c.Authorize(flow.Subject{UID: self.UID, Conn: policy.Conn{Src: rec.SrcAddr, Dst: dst}}); err != nil {
		return nil, err
	}
	app, err := p.cfg.Dial(ctx, rec.SrcAddr.Addr(), dst)
	if err != nil {
		return nil, p.dialError(ctx, dst, err)
	}
	return app.(relay.Conn), nil
}

// ServeConnect takes one CONNECT stream of a tunnel to the pod. It may return
// when that is joined.
func (p *Proxy) ServeConnect(ctx context.Context, r *hbone.Request) {
	stack.Reserve()
	rec := flow.Record{Direction: flow.Inbound, Pod: p.cfg.Pod, Transport: flow.HBONE,
		SrcAddr: unmap(r.RemoteAddr), DstAddr: unmap(r.LocalAddr), HBONEAddr: r.Authority, SrcID: r.Peer}
	c, ctx := p.cfg.Flow.Begin(ctx, rec)
	c.Join(r.Header("traceparent"))
	s, app, err := p.openConnect(ctx, c, r)
	if err != nil {
		c.End(err)
		return
	}
	ended := r.Keep()
	relay.Start(ctx, s, app, c.Stats, func(err error) {
		c.End(flow.Cause(ctx, err))
		ended()
	})
}

// openConnect opens what is to be joined.
func (p *Proxy) openConnect(ctx context.Context, c *flow.Conn, r *hbone.Request) (*hbone.Stream, relay.Conn, error) {
	rec := c.Record()
	reject := func(status int, err error) (*hbone.Stream, relay.Conn, error) {
		r.Reject(status)
		return nil, nil, err
	}
	self, err := p.cfg.Self(ctx)
	if err != nil {
		return reject(503, err)
	}
	if err := p.learn(ctx, self, r.Authority, rec.DstAddr.Addr()); err != nil {
		return reject(503, err)
	}
	m := p.cfg.View().Mesh
	target, err := p.target(m, self, r.Method, r.Authority, rec.DstAddr.Addr())
	p.describe(rec, m, self, r, target.Addr.Port())
	if err != nil {
		status := 503
		if t, ok := errors.AsType[*TargetError](err); ok {
			status = t.Status
		}
		return reject(status, flow.Failed(flow.ReasonBadRequest, err))
	}
	c.Describe()
	if err := c.Authorize(flow.Subject{UID: self.UID, Conn: policy.Conn{Peer: r.Peer, Src: rec.SrcAddr, Dst: target.Addr}}); err != nil {
		return reject(401, err)
	}
	app, err := p.dialApp(ctx, rec.SrcAddr, r.Peer, target)
	if err != nil {
		return reject(503, p.dialError(ctx, target.Addr, err))
	}
	var head []hbone.HeaderField
	if !p.cfg.NoBaggage {
		head = append(head, hbone.HeaderField{Name: "baggage", Value: outbound.Baggage(self)})
	}
	s, err := r.Accept(head...)
	if err != nil {
		relay.Reset(app) // the client is gone
		return nil, nil, flow.Failed(flow.ReasonClientGone, fmt.Errorf("accept stream of %s: %w", rec.SrcAddr, err))
	}
	return s, app, nil
}

// describe completes the record. The peer's address names its workload only if
// that workload has the proven identity: behind a waypoint or SNAT it has not.
func (p *Proxy) describe(rec *flow.Record, m *mesh.Snapshot, self *mesh.Workload, r *hbone.Request, port uint16) {
	rec.Dst, rec.DstID = self, self.Identity
	if from := r.Headers.Values(outbound.NetworkHeader); len(from) > 0 && from[0] != self.Network {
		// The address is a gateway's; only the peer knows who it is.
		rec.Src = outbound.FromBaggage(r.Headers.Values("baggage"), r.Peer)
	} else {
		rec.Src = peerWorkload(m, self.Network, rec.SrcAddr.Addr(), r.Peer)
	}
	svc := addressedService(m, self, r.Header("forwarded"))
	if svc == nil {
		svc = likelyService(m, self, port)
	}
	name(rec, svc)
}

// name puts a service into the record; nil is none.
func name(rec *flow.Record, svc *mesh.Service) {
	if svc != nil {
		rec.Service, rec.ServiceNS, rec.ServiceName = svc.Host.Name, svc.Namespace, svc.Name
	}
}

func peerWorkload(m *mesh.Snapshot, network string, a netip.Addr, peer identity.ID) *mesh.Workload {
	w := m.WorkloadByAddr(network, a)
	if w == nil || w.Identity != peer {
		return nil
	}
	return w
}

// dialError says whether the connection was cut meanwhile or the application
// did not take it.
func (p *Proxy) dialError(ctx context.Context, dst netip.AddrPort, err error) error {
	return flow.Cause(ctx, flow.DialFailed(true, fmt.Errorf("dial application at %s: %w", dst, err)))
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
