// Package outbound takes connections that applications open (port 15001).
//
//	accept ─→ original destination ─→ own workload ─→ Route ─→ dial ─→ relay
//	              SO_ORIGINAL_DST       (≤ 5 s for xDS)  │        │
//	                                    pure function ───┘        └ HBONE, plain TCP or passthrough
//
// Files in the order a connection meets them: outbound.go, route.go,
// waypoint.go, connect.go (one retry), early.go, local.go and lease.go
// (pods of the same node), health.go, header.go, baggage.go.
//
// A Proxy serves one pod; Serve is called once per connection and may return
// before that has ended. A connection that cannot be served is reset, so that the
// application sees a failure and not an empty answer, and the log says who
// refused and why.
package outbound

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/origin"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
	"github.com/ambit-mesh/ambit/ztunnel/stack"
)

// Tunnels opens streams; *hbone.Dialer is one.
type Tunnels interface {
	Connect(ctx context.Context, k hbone.Key, r hbone.ConnectRequest) (*hbone.Stream, *hbone.ConnectResponse, error)
}

// Config of one pod's Proxy.
type Config struct {
	Pod string // uid
	// Tunnel is the pod's name in tunnel keys: its present stay on the node.
	Tunnel string
	// Self is the pod's workload; it waits a bounded time for one not known yet.
	Self        func(ctx context.Context) (*mesh.Workload, error)
	View        func() *store.View
	Flow        *flow.Table
	Tunnels     Tunnels
	Dial        func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) // in the pod's namespace
	OriginalDst func(net.Conn) (netip.AddrPort, error)
	// Origin is asked who opened a connection, which it need not know. Nil: nobody
	// is told.
	Origin func(net.Conn, *origin.Origin)
	// Resolver finds the addresses of workloads that have only a host name;
	// nil: such workloads cannot be reached.
	Resolver Resolver
	// Neighbours is the way to pods of the same node; nil: tunnels to all.
	Neighbours Neighbours
	// Leased reports whether connections to an address go to a workload without
	// the proxy, as far as they are for it; nil: none do.
	Leased func(dst netip.AddrPort, w *mesh.Workload) bool
	// Demand asks for what is not known; nil: everything is.
	Demand Demand
	// Health is shared by the pods of the node; nil: one of this pod's own.
	Health *Health
}

// Resolver finds addresses of host names.
type Resolver interface {
	// Resolve returns an address of host for a client, of the family asked for
	// if there is one.
	Resolve(ctx context.Context, client *mesh.Workload, host string, v6 bool) (netip.Addr, error)
}

// Proxy of one pod.
type Proxy struct{ cfg Config }

// New returns a Proxy.
func New(cfg Config) *Proxy {
	if cfg.Health == nil {
		cfg.Health = NewHealth(nil)
	}
	return &Proxy{cfg: cfg}
}

// Serve takes one connection of the application, which a close resets: its
// listener has seen to that. It may return when that is joined; ended is called
// once, when it has ended.
func (p *Proxy) Serve(ctx context.Context, down relay.Conn, ended func()) {
	stack.Reserve()
	rec := flow.Record{Direction: flow.Outbound, Pod: p.cfg.Pod, SrcAddr: remote(down)}
	c, ctx := p.cfg.Flow.Begin(ctx, rec)
	up, err := p.serve(ctx, c, down)
	if err != nil {
		finish(c, down, err, ended)
		return
	}
	ledger.Opened(ctx)
	up.join(ctx, c, down, ended)
}

// ResetOnDeath makes the kernel end an accepted connection with RST if this
// process dies: FIN would look like an empty answer. relay.Start restores the
// orderly close when both directions have ended.
func ResetOnDeath(c net.Conn) {
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		_ = l.SetLinger(0) // a socket that is gone already has had its end
	}
}

// serve opens the way to where the application wanted to go.
func (p *Proxy) serve(ctx context.Context, c *flow.Conn, down relay.Conn) (way, error) {
	rec := c.Record()
	dst, err := p.cfg.OriginalDst(down)
	if err != nil {
		return way{}, err
	}
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	rec.DstAddr = dst
	if OwnPort(dst.Port()) && dst == AddrPort(down.LocalAddr()) { // which costs a system call to know
		return way{}, flow.Failed(flow.ReasonSelfCall, ErrSelfCall) // nothing redirected it: it was made to this port
	}
	if p.cfg.Origin != nil {
		p.cfg.Origin(down, &rec.Origin)
	}
	var first *early
	if s, ok := sockopt.SocketOf(down); ok {
		first = &early{down: s}
	}
	return p.open(ctx, c, dst, first)
}

// describe completes the record. The reference logs as dst.addr what is
// dialled, and as dst.hbone_addr what the tunnel leads to.
func describe(rec *flow.Record, plan Plan, dst netip.AddrPort) {
	rec.Transport, rec.Dst = plan.Transport, plan.Dst
	if plan.Addr.IsValid() {
		rec.DstAddr = plan.Addr
	}
	rec.HBONEAddr, rec.DstID = "", identity.ID{}
	if plan.Transport == flow.HBONE {
		rec.HBONEAddr = plan.Authority
		if len(plan.Peers) > 0 {
			rec.DstID = plan.Peers[0]
		}
	}
	if svc := plan.Service; svc != nil {
		rec.Service, rec.ServiceNS, rec.ServiceName = svc.Host.Name, svc.Namespace, svc.Name
	}
	if !rec.DstAddr.IsValid() {
		rec.DstAddr = dst
	}
}

// dial opens the way that the plan describes. Its errors are as they come.
func (p *Proxy) dial(ctx context.Context, c *flow.Conn, plan Plan, r Request) (way, error) {
	if plan.Transport != flow.HBONE {
		up, err := p.dialPlain(ctx, plan, r)
		if err != nil {
			return way{}, fmt.Errorf("dial %s: %w", plan.Addr, err)
		}
		return way{Conn: up.(relay.Conn)}, nil
	}
	req := hbone.ConnectRequest{Authority: plan.Authority, Header: headers(c, plan, r.Src), Elsewhere: r.Elsewhere}
	if r.early != nil && !plan.Waypoint && plan.Inner == nil { // others need not know what to do with it
		req.Early = r.early.bytes
	}
	s, resp, err := p.cfg.Tunnels.Connect(ctx, p.key(c, plan, r), req)
	if err != nil {
		return way{}, err
	}
	if !resp.Peer.IsZero() {
		c.SetPeer(resp.Peer)
	}
	if plan.Inner != nil { // which endpoint it is only that one knows
		if w := FromBaggage(resp.Header.Values("baggage"), resp.Peer); w != nil {
			c.Record().Dst = w
		}
	}
	return way{Conn: s, early: resp.Early}, nil
}

// errNoAnswer is why a dial is given up early: hbone's silent peers, without a tunnel.
var errNoAnswer = fmt.Errorf("no answer for %v: %w", hbone.Silence, os.ErrDeadlineExceeded)

// dialPlain gives up a destination that says nothing at all when hbone would, if there is another endpoint then.
func (p *Proxy) dialPlain(ctx context.Context, plan Plan, r Request) (net.Conn, error) {
	if r.Elsewhere == nil || plan.Transport == flow.Passthrough {
		return p.cfg.Dial(ctx, plan.Addr)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	look := time.AfterFunc(hbone.Silence, func() {
		if r.Elsewhere() {
			cancel(errNoAnswer)
		}
	})
	defer look.Stop()
	up, err := p.cfg.Dial(ctx, plan.Addr)
	if err != nil && context.Cause(ctx) == errNoAnswer {
		err = errNoAnswer
	}
	return up, err
}

func (p *Proxy) key(c *flow.Conn, plan Plan, r Request) hbone.Key {
	k := hbone.Key{Pod: p.cfg.Tunnel, Local: r.Src.Identity, Peers: cert.JoinPeers(plan.Peers), Addr: plan.Addr}
	if plan.Inner != nil {
		k.Gateway = hbone.Gateway{Peers: k.Peers, Authority: plan.Authority, Slot: uint8(r.Rand >> 32 % hbone.GatewaySlots)}
		k.Peers = cert.JoinPeers(plan.Inner)
	}
	if src := c.Record().SrcAddr.Addr(); src.Is4() == plan.Addr.Addr().Is4() {
		k.SrcAddr = src
	}
	return k
}

// remote is who is at the other end of c.
func remote(c net.Conn) netip.AddrPort {
	if s, ok := sockopt.SocketOf(c); ok {
		return sockopt.RemoteAddrPort(s)
	}
	return AddrPort(c.RemoteAddr())
}

// AddrPort is the address of a socket, IPv4-mapped ones as IPv4; the zero value
// where it has none.
func AddrPort(a net.Addr) netip.AddrPort {
	if a == nil {
		return netip.AddrPort{}
	}
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	ap, _ := netip.ParseAddrPort(a.String())
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
