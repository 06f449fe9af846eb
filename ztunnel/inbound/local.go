package inbound

import (
	"context"

	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// OpenLocal takes a connection of a pod on the same node. It decides as
// ServeConnect does, registers the connection on this side, and leaves joining
// the sockets to the caller.
func (p *Proxy) OpenLocal(ctx context.Context, r outbound.LocalRequest) (*outbound.LocalPath, error) {
	rec := flow.Record{Direction: flow.Inbound, Pod: p.cfg.Pod, Transport: flow.Local, SrcAddr: r.Src, DstAddr: r.Target, Src: r.Self, SrcID: r.Peer}
	c, ctx := p.cfg.Flow.Begin(ctx, rec)
	c.Stats = r.Stats
	c.Join(r.TraceParent)
	app, err := p.openLocal(ctx, c, r)
	if err != nil {
		err = flow.Cause(ctx, err)
		c.End(err)
		return nil, err
	}
	return &outbound.LocalPath{Conn: app, Ctx: ctx, End: c.End}, nil
}

func (p *Proxy) openLocal(ctx context.Context, c *flow.Conn, r outbound.LocalRequest) (relay.Conn, error) {
	self, err := p.cfg.Self(ctx)
	if err != nil {
		return nil, err
	}
	rec := c.Record()
	rec.Dst, rec.DstID = self, self.Identity
	name(rec, r.Service)
	target, err := p.target(p.cfg.View().Mesh, self, "CONNECT", r.Target.String(), r.Target.Addr())
	if err != nil {
		return nil, flow.Failed(flow.ReasonBadRequest, err)
	}
	c.Describe()
	if err := c.Authorize(flow.Subject{UID: self.UID, Conn: policy.Conn{Peer: r.Peer, Src: r.Src, Dst: target.Addr}}); err != nil {
		return nil, err
	}
	app, err := p.dialApp(ctx, r.Src, r.Peer, target)
	if err != nil {
		return nil, p.dialError(ctx, target.Addr, err)
	}
	return app, nil
}
