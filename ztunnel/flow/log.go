package flow

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/origin"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// maxAttr bounds what a peer chooses of a line.
const maxAttr = 1024

// outcome is how a connection ended.
type outcome struct {
	err    error
	reason Reason
	flag   Flag
	failed bool
	// resetBy is who ended a connection that had come about with a reset: "src"
	// or "dst". Many clients and servers end that way all their life, and before
	// the mesh nobody counted it; so it is told, and is no failure.
	resetBy string
}

func (c *Conn) outcome(err error) outcome {
	o := outcome{err: err, reason: reasonOf(err), flag: flagOf(err), failed: err != nil}
	if o.reason != ReasonReset {
		return o
	}
	if r, ok := errors.AsType[*relay.Error](err); ok && c.opened {
		o.failed, o.resetBy = false, "dst"
		if r.Side == "a" {
			o.resetBy = "src"
		}
	}
	return o
}

// logs reports whether the local pod wants a line of this connection. The
// control plane resolves the mode per workload.
func (r *Record) logs(failure bool) bool {
	w := r.Dst
	if r.Direction == Outbound {
		w = r.Src
	}
	if w == nil {
		return true // not known yet, so nobody said no
	}
	switch w.AccessLog {
	case ambit.WorkloadExtension_ACCESS_LOG_FAILURES:
		return failure
	case ambit.WorkloadExtension_ACCESS_LOG_OFF:
		return false
	}
	return true
}

// report writes the line of an end, at once or later as part of a sum.
func (c *Conn) report(o outcome) {
	if o.failed {
		c.t.metrics.failure(c.rec.Direction, o.reason)
	}
	if o.err == nil {
		if c.rec.logs(false) {
			sum{c, o, 1, c.moved()}.write()
		}
		return
	}
	for _, s := range c.t.refusals.add(c, o, time.Now()) {
		s.write()
	}
}

// write writes the line.
func (s sum) write() {
	c, o := s.conn, s.how
	level, msg := slog.LevelInfo, "connection complete"
	switch {
	case o.failed && !c.opened:
		level, msg = slog.LevelWarn, "connection failed"
	case o.failed:
		level = slog.LevelError
	}
	ctx := context.Background()
	if !c.t.log.Enabled(ctx, level) {
		return
	}
	held := attrSlices.Get().(*[]slog.Attr)
	attrs := c.attrs((*held)[:0], &s.moved)
	if o.err != nil {
		attrs = append(attrs, slog.String("error", clip(o.err.Error(), maxAttr)))
		if d, ok := errors.AsType[*DenyError](o.err); ok {
			attrs = append(attrs, slog.String("why", d.Why()))
		}
		attrs = append(attrs, slog.String("reason", string(o.reason)))
	}
	if o.resetBy != "" {
		attrs = append(attrs, slog.String("reset_by", o.resetBy))
	}
	if s.count > 1 {
		attrs = append(attrs, slog.Uint64("count", s.count))
	}
	// As one group without a name, which is what is in it: a record would copy them, and a
	// logger walk the stack for a line number. Handlers keep nothing.
	r := slog.NewRecord(time.Now(), level, msg, 0)
	r.AddAttrs(slog.Attr{Value: slog.GroupValue(attrs...)})
	_ = c.t.log.Handler().Handle(ctx, r) // as a logger does: there is nobody to tell
	clear(attrs)
	*held = attrs
	attrSlices.Put(held)
}

// attrSlices hold a line's attributes: more than most have.
var attrSlices = sync.Pool{New: func() any { a := make([]slog.Attr, 0, 40); return &a }}

// attrs appends to a the reference's keys in the reference's order, then ours.
// At the end they say what was moved.
func (c *Conn) attrs(a []slog.Attr, end *moved) []slog.Attr {
	r := &c.rec
	str := func(k, v string) {
		if v != "" {
			a = append(a, slog.String(k, v))
		}
	}
	if r.SrcAddr.IsValid() {
		a = append(a, slog.Any("src.addr", r.SrcAddr))
	}
	if w := r.Src; w != nil {
		str("src.workload", w.Name)
		str("src.namespace", w.Namespace)
	}
	if r.mutualTLS() {
		str("src.identity", r.SrcID.String())
	}
	if w := r.Src; w != nil {
		str("src.cluster", w.ClusterID)
	}
	if r.DstAddr.IsValid() {
		a = append(a, slog.Any("dst.addr", r.DstAddr))
	}
	if ap, err := netip.ParseAddrPort(r.HBONEAddr); err == nil {
		a = append(a, slog.Any("dst.hbone_addr", ap))
	} else {
		str("dst.hbone_addr", clip(r.HBONEAddr, maxAttr))
	}
	str("dst.service", r.Service)
	if w := r.Dst; w != nil {
		str("dst.workload", w.Name)
		str("dst.namespace", w.Namespace)
	}
	if r.mutualTLS() {
		str("dst.identity", c.dstIdentity().String())
	}
	if w := r.Dst; w != nil {
		str("dst.cluster", w.ClusterID)
	}
	a = append(a, slog.String("direction", string(r.Direction)))
	if end != nil && c.opened {
		a = append(a,
			slog.Uint64("bytes_sent", end.sent),
			slog.Uint64("bytes_recv", end.received),
			slog.String("duration", strconv.FormatInt(c.took.Milliseconds(), 10)+"ms"))
	}
	str("transport", string(r.Transport))
	if r.Retries > 0 {
		a = append(a, slog.Int("retries", r.Retries))
	}
	if c.id != 0 {
		a = append(a, slog.Uint64("conn_id", c.id))
	}
	str("trace_id", c.trace.String())
	if o := &r.Origin; o.PID != 0 {
		process, container := c.t.opener(*o)
		str("src.process", process)
		a = append(a, slog.Uint64("src.pid", uint64(o.PID)))
		str("src.container", container)
		a = append(a, slog.Uint64("src.cgroup", o.Cgroup))
	}
	if end != nil {
		c.mu.Lock()
		dry := c.verdict.DryRun
		c.mu.Unlock()
		str("dry_run", dry)
		a = c.timeAttrs(a)
	}
	return a
}

// opener names who opened a connection: the executable, or else what the thread
// calls itself.
func (t *Table) opener(o origin.Origin) (process, container string) {
	if o == (origin.Origin{}) {
		return "", ""
	}
	if t.cfg.Names != nil {
		process, container = t.cfg.Names(o)
	}
	if process == "" {
		process = origin.Comm(o)
	}
	return process, container
}

// Logs reports whether connections that end in order get lines at all.
func (t *Table) Logs() bool { return t.log.Enabled(context.Background(), slog.LevelInfo) }

// dstIdentity is what the other end proved, and what was expected before.
func (c *Conn) dstIdentity() identity.ID {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.peer.IsZero() {
		return c.peer
	}
	return c.rec.DstID
}
