package inbound

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// dialApp connects to the application, and where it expects a PROXY header,
// sends that first. With LocalTunnel such an application listens on loopback
// only; the source then is loopback as well, since the header tells the real
// one.
func (p *Proxy) dialApp(ctx context.Context, src netip.AddrPort, peer identity.ID, d Destination) (relay.Conn, error) {
	from, to := src.Addr(), d.Addr
	if d.Header.IsValid() && p.cfg.LocalTunnel {
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if to.Addr().Is6() {
			loopback = netip.IPv6Loopback()
		}
		from, to = loopback, netip.AddrPortFrom(loopback, to.Port())
	}
	c, err := p.cfg.Dial(ctx, from, to)
	if err != nil {
		return nil, err
	}
	app := c.(relay.Conn)
	if !d.Header.IsValid() {
		return app, nil
	}
	// It fits any socket's send buffer; the deadline is for an application
	// that has closed its window.
	_ = app.SetWriteDeadline(time.Now().Add(ConnectTimeout)) // a socket that is gone fails the write
	if _, err := app.Write(appendProxyHeader(make([]byte, 0, 128), src, d.Header, peer)); err != nil {
		relay.Reset(app)
		return nil, fmt.Errorf("write PROXY header: %w", err)
	}
	_ = app.SetWriteDeadline(time.Time{})
	return app, nil
}
