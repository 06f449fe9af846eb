package direct

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/lease"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// conn is one connection, registered at both of its sides as if the proxy had
// joined it.
type conn struct {
	key   lease.Key
	heard bool // since the agent is connected
	asked bool // to end it, of the agent: until it has ended, that is repeated
	// doubtful says that its lease was ended with what lives under it, which may
	// come before the sweep that finds the reason.
	doubtful bool
	stats    relay.Stats
	out, in  *flow.Conn
	outCtx   context.Context
	inCtx    context.Context
	subject  flow.Subject
	leave    []func()
}

// errUnknown is a connection under a lease that this proxy did not ask for.
var errUnknown = errors.New("connection under a lease that ended")

func (k *Keeper) opened(o lease.Opened) {
	if c := k.conns[o.Conn]; c != nil {
		c.heard = true
		k.cutAgain(o.Conn, c)
		return
	}
	c, err := k.register(o)
	if err != nil {
		k.cfg.Logger.Debug("a direct connection is ended", "destination", o.Key.Addr, "err", err)
		if err := k.cfg.Agent.Cut(o.Conn); err != nil && !errors.Is(err, lease.ErrNoAgent) {
			k.cfg.Logger.Warn("a direct connection that must end lives on until its lease does", "err", err)
		}
		return
	}
	k.conns[o.Conn] = c
	// Each of the two may be cut: by policy, by a pod's end, by the process's drain.
	for _, ctx := range []context.Context{c.outCtx, c.inCtx} {
		context.AfterFunc(ctx, func() { k.put(note{cut: o.Conn}) })
	}
}

// register enters a connection into the table, decided as any other is.
func (k *Keeper) register(o lease.Opened) (*conn, error) {
	e := k.leases[o.Key]
	if e == nil {
		return nil, errUnknown
	}
	e.used = time.Now()
	src, ok := k.cfg.Pods.ByStay(e.stay)
	if !ok || src.Self == nil {
		return nil, errUnknown
	}
	m := k.cfg.View().Mesh
	w := m.WorkloadByAddr(src.Self.Network, o.Dst.Addr())
	if w == nil {
		return nil, errUnknown
	}
	dst, ok := k.cfg.Pods.ByWorkload(w)
	if !ok || dst.NetNS != o.Target {
		return nil, errUnknown
	}
	c := &conn{key: o.Key, heard: true,
		subject: flow.Subject{UID: w.UID, Conn: policy.Conn{Peer: src.Self.Identity, Src: o.Src, Dst: o.Dst}}}
	rec := flow.Record{Direction: flow.Outbound, Pod: src.UID, SrcAddr: o.Src, DstAddr: o.Dst, Src: src.Self, Dst: w, Transport: flow.Direct}
	if svc := m.ServiceByVIP(src.Self.Network, o.Key.Addr.Addr(), src.Self.Namespace); svc != nil {
		rec.Service, rec.ServiceNS, rec.ServiceName = svc.Host.Name, svc.Namespace, svc.Name
	}
	c.out, c.outCtx = k.cfg.Flow.Begin(context.Background(), rec)
	rec.Direction, rec.Pod, rec.SrcID, rec.DstID = flow.Inbound, dst.UID, src.Self.Identity, w.Identity
	c.in, c.inCtx = k.cfg.Flow.Begin(context.Background(), rec)
	c.out.Stats, c.in.Stats = &c.stats, &c.stats
	c.in.Join(c.out.TraceParent())
	c.stats.Times.Began = time.Now()
	c.out.Describe()
	c.in.Describe()
	err := c.in.Authorize(c.subject)
	for _, p := range []Pod{src, dst} {
		if err != nil {
			break
		}
		cut := c.in.Cut
		if p.UID == src.UID {
			cut = c.out.Cut
		}
		leave, ok := p.Enter(cut)
		if !ok {
			err = flow.ErrPodGone
			break
		}
		c.leave = append(c.leave, leave)
	}
	if err != nil {
		c.end(err)
		return nil, err
	}
	k.metrics.open.Inc()
	return c, nil
}

func (k *Keeper) closed(cl lease.Closed) {
	c := k.conns[cl.Conn]
	if c == nil {
		return
	}
	delete(k.conns, cl.Conn)
	k.metrics.open.Dec()
	c.stats.Sent.Store(cl.Sent)
	c.stats.Received.Store(cl.Received)
	info := sockopt.TCPInfo{RTT: cl.RTT, Retransmits: cl.Retransmits}
	c.stats.Times.A, c.stats.Times.B = info, info // one socket to the network, for either side
	var err error
	if cl.Failed {
		err = flow.Failed(flow.ReasonDstRefused, fmt.Errorf("connect directly to %s: %w", c.subject.Conn.Dst, syscall.ECONNREFUSED))
		k.failing(c.key)
	}
	c.end(err)
}

// failing lets a pair go through the proxy for a while, which tries elsewhere.
func (k *Keeper) failing(key lease.Key) {
	if e := k.leases[key]; e != nil {
		e.until = time.Now().Add(backoff)
		k.update(key, e)
	}
}

// end ends both records, with the reason for which one was cut, if it was.
func (c *conn) end(err error) {
	for _, ctx := range []context.Context{c.inCtx, c.outCtx} {
		if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
			err = cause
		}
	}
	if err == nil && c.doubtful {
		err = c.in.Authorize(c.subject)
	}
	c.in.End(err)
	c.out.End(outbound.DeniedThere(err))
	for _, f := range c.leave {
		f()
	}
}
