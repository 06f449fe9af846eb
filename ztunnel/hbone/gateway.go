package hbone

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// Gateway is the way into another network: the tunnel of a key with one runs inside a CONNECT stream to the gateway at
// Key.Addr, which hands its bytes on without understanding them to whoever serves Authority, one of Key.Peers. The zero
// value is no gateway.
//
//	Stream ─ inner tunnel (Key.Peers) ═ TLS ═ stream of the outer tunnel (Gateway.Peers) ═ TLS ═ gateway
//
// Both tunnels are pooled. All streams of an inner tunnel end at the one endpoint that the gateway chose for it, so a
// pool without bounds would undo the gateway's balancing. Hence connections are spread over GatewaySlots inner tunnels,
// each balanced on its own, which take new streams for gatewayAge only.
//
// A stalled stream of an inner tunnel costs only itself: the inner tunnel's reader reads the outer stream whatever its
// own streams' readers do, and the peer stops at the stalled stream's window. What they share is the outer stream's
// window, as streams of any tunnel share a TCP connection.
type Gateway struct {
	Peers     string // who may answer at Key.Addr: canonical, sorted, joined
	Authority string // of the outer CONNECT
	Slot      uint8  // below GatewaySlots, drawn at random
}

const (
	// GatewaySlots is how many inner tunnels one source has to a service of another network. With eight, few endpoints
	// of an ordinary service are left out, and a busy client saves nearly all handshakes.
	GatewaySlots = 8
	// gatewayAge is how long an inner tunnel takes new streams: endpoints that come later get their share after it.
	gatewayAge = time.Minute
)

// GatewayError is a failure on the way to the gateway of another network, as opposed to beyond it.
type GatewayError struct {
	Addr netip.AddrPort
	Err  error
}

func (e *GatewayError) Error() string { return fmt.Sprintf("network gateway %s: %v", e.Addr, e.Err) }
func (e *GatewayError) Unwrap() error { return e.Err }

// dialGateway opens the transport of an inner tunnel. Every step of it has its own timeout.
func (d *Dialer) dialGateway(ctx context.Context, k Key) (net.Conn, error) {
	outer := k
	outer.Peers, outer.Gateway = k.Gateway.Peers, Gateway{}
	r := ConnectRequest{Authority: k.Gateway.Authority}
	if d.cfg.GatewayHeader != nil {
		r.Header = d.cfg.GatewayHeader(k)
	}
	s, _, err := d.Connect(ctx, outer, r)
	if err != nil {
		return nil, &GatewayError{k.Addr, err}
	}
	return s, nil
}

// notAfter is the end of new streams in a tunnel whose leaves expire at a given time.
func (k *Key) notAfter(expiry, now time.Time) time.Time {
	if k.Gateway == (Gateway{}) {
		return expiry
	}
	if end := now.Add(gatewayAge); expiry.IsZero() || end.Before(expiry) {
		return end
	}
	return expiry
}
