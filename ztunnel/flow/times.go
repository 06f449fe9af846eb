package flow

import (
	"log/slog"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// timeAttrs says where the connection's life went, in whole milliseconds; what
// is less than one is left out. The package doc explains the fields.
func (c *Conn) timeAttrs(a []slog.Attr) []slog.Attr {
	if c.Stats == nil || c.Stats.Times.Began.IsZero() {
		return a // it never came to bytes
	}
	t := &c.Stats.Times
	app, network := t.A, t.B
	if c.rec.Direction == Inbound {
		app, network = t.B, t.A
	}
	ms := func(k string, d time.Duration) {
		if n := d.Milliseconds(); n > 0 {
			a = append(a, slog.Int64(k, n))
		}
	}
	ms("wait.setup", t.Began.Sub(c.started))
	ms("wait.app", app.RwndLimited)
	if c.rec.Transport == HBONE {
		ms("wait.peer", t.Stream)
	} else {
		ms("wait.peer", network.RwndLimited)
	}
	ms("wait.tunnel", t.Tunnel)
	ms("wait.proxy", t.Queue)
	if network == (sockopt.TCPInfo{}) {
		return a
	}
	ms("net.rtt", network.RTT)
	if n := network.Retransmits; n > 0 {
		a = append(a, slog.Uint64("net.retransmits", uint64(n)))
	}
	ms("net.busy", network.Busy)
	if c.rec.Transport == HBONE {
		ms("net.rwnd_limited", network.RwndLimited)
	}
	ms("net.sndbuf_limited", network.SndbufLimited)
	return a
}
