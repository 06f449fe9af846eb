package outbound

import (
	"context"
	"math/rand/v2"
	"net/netip"

	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// ServeTo takes a connection whose application named the destination itself
// (SOCKS). opened is told once what became of the way there, and answers the
// application; its failure ends the connection. A connection that could not be
// opened is left to the caller to close, so that the answer arrives.
func (p *Proxy) ServeTo(ctx context.Context, down relay.Conn, dst netip.AddrPort, opened func(error) error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	rec := flow.Record{Direction: flow.Outbound, Pod: p.cfg.Pod, SrcAddr: remote(down), DstAddr: dst}
	c, ctx := p.cfg.Flow.Begin(ctx, rec)
	up, err := p.open(ctx, c, dst, nil)
	told := opened(err)
	switch {
	case err != nil:
	case told != nil:
		err = flow.Cause(ctx, flow.Failed(flow.ReasonClientGone, told))
		up.abandon(err)
	default:
		ResetOnDeath(down)
		endedc := make(chan struct{})
		up.join(ctx, c, down, func() { close(endedc) })
		<-endedc
		return
	}
	c.End(err)
}

// open finds the way to dst and opens it. first is what the application may have said; nil: nothing.
func (p *Proxy) open(ctx context.Context, c *flow.Conn, dst netip.AddrPort, first *early) (way, error) {
	self, err := p.cfg.Self(ctx)
	if err != nil {
		return way{}, err
	}
	rec := c.Record()
	rec.Src, rec.SrcID = self, self.Identity
	if err := p.learn(ctx, self, dst.Addr()); err != nil {
		return way{}, flow.Cause(ctx, err)
	}
	up, err := p.connect(ctx, c, Request{Src: self, Dst: dst, Rand: rand.Uint64(), early: first})
	c.Describe() // whichever endpoint it was in the end
	if err == nil {
		if up.rest, err = first.rest(c, up.early); err != nil {
			up.abandon(err)
		}
	} else {
		first.forget()
	}
	if err != nil {
		return way{}, flow.Cause(ctx, err)
	}
	return up, nil
}
