package flow

import (
	"context"
	"errors"
	"log/slog"
)

// told counts and logs a decision: which policy it was, and what policies in
// dry run would have done. Dry run changes nothing else.
func (c *Conn) told(err error) {
	c.mu.Lock()
	verdict := c.verdict
	c.mu.Unlock()
	if verdict.DryRun != "" {
		c.t.metrics.dryRun(c.rec.Direction, verdict.DryRun)
	}
	level, ctx := slog.LevelDebug, context.Background()
	if c.t.cfg.PolicyInfo {
		level = slog.LevelInfo
	}
	if !c.t.cfg.PolicyLogger.Enabled(ctx, level) {
		return
	}
	msg, why := "allowed", verdict.Why()
	if err != nil {
		msg = "denied"
		if d, ok := errors.AsType[*DenyError](err); ok {
			why = d.Why()
		}
	}
	r := &c.rec
	attrs := []slog.Attr{slog.Any("src.addr", r.SrcAddr), slog.String("src.identity", r.srcIdentity()), slog.Any("dst.addr", r.DstAddr),
		slog.String("dst.hbone_addr", clip(r.HBONEAddr, maxAttr)), slog.String("why", why), slog.Uint64("conn_id", c.id), slog.String("trace_id", c.trace.String())}
	if verdict.DryRun != "" {
		attrs = append(attrs, slog.String("dry_run", verdict.DryRun))
	}
	c.t.cfg.PolicyLogger.LogAttrs(ctx, level, msg, attrs...)
}
