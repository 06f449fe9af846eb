package flow

import (
	"log/slog"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// timeAttrs says where the connection's life went, in whole milliseconds, and what
// its sockets met; what is less than one is left out. The package doc explains the fields.
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
	a = socketAttrs(a, "app.rtt_us", "app.retransmits", app)
	if network == (sockopt.TCPInfo{}) {
		return a
	}
	a = socketAttrs(a, "net.rtt_us", "net.retransmits", network)
	ms("net.busy", network.Busy)
	if c.rec.Transport == HBONE {
		ms("net.rwnd_limited", network.RwndLimited)
	}
	ms("net.sndbuf_limited", network.SndbufLimited)
	return a
}

// socketAttrs are facts of TCP, without those that are zero: a socket that has
// sent nothing has no round trip.
func socketAttrs(a []slog.Attr, rtt, retransmits string, i sockopt.TCPInfo) []slog.Attr {
	if n := i.RTT.Microseconds(); n > 0 {
		a = append(a, slog.Int64(rtt, n))
	}
	if n := i.Retransmits; n > 0 {
		a = append(a, slog.Uint64(retransmits, uint64(n)))
	}
	return a
}
