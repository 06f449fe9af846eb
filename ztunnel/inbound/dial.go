package inbound

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

const (
	// Source ports of dials in a client's name. The range lies below the
	// kernel's ephemeral ports (ip_local_port_range), so that a pair of the
	// client's own is unlikely to be hit.
	firstPort, lastPort = 10_000, 32_767
	// silence on the pod's own loopback means that the SYN met a connection
	// with the same pair; another port is tried then.
	silence = 200 * time.Millisecond
	// bindTries bounds attempts when ports are taken, which costs next to nothing: of
	// a client with 20 thousand connections seven ports in eight are, and no dial may
	// fail for it.
	bindTries = 128
	// silentTries bounds those that end by silence.
	silentTries = 3
	// ConnectTimeout is the reference's.
	ConnectTimeout = 10 * time.Second
)

// AppDialer opens connections to the pod's application in the name of its
// clients: the application sees the client's address, as without a mesh. The
// replies come back because the pod's rules route by mark (0x539 in, 0x111
// back).
type AppDialer struct {
	// Connect dials in the pod's namespace.
	Connect func(ctx context.Context, d *net.Dialer, network, addr string) (net.Conn, error)
	Mark    int
	// Liveness of the connections.
	Liveness sockopt.Liveness
	// KeepSource is false where transparent sockets are not to be had.
	KeepSource bool
	// Busy reports whether the pod has so many connections that the kernel
	// must not grow another one's buffers. Nil: never.
	Busy func() bool
}

// Dial connects to dst, from src when that is another host's address of the
// same family.
func (a *AppDialer) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, ConnectTimeout)
	defer cancel()
	if !a.KeepSource || !src.IsValid() || src == dst.Addr() || src.Is4() != dst.Addr().Is4() || src.IsLoopback() {
		return a.dial(ctx, netip.AddrPort{}, dst, 0)
	}
	var last error
	silent := 0
	for range bindTries {
		limit := silence
		if silent == silentTries { // the application itself is slow, then
			limit = 0
		}
		port := uint16(firstPort + rand.IntN(lastPort-firstPort+1))
		c, err := a.dial(ctx, netip.AddrPortFrom(src, port), dst, limit)
		if err == nil {
			return c, nil
		}
		last = err
		if ctx.Err() != nil || !taken(err) {
			break
		}
		if !inUse(err) {
			silent++
		}
	}
	return nil, last
}

func (a *AppDialer) dial(ctx context.Context, src, dst netip.AddrPort, limit time.Duration) (net.Conn, error) {
	d := &net.Dialer{Timeout: limit, KeepAlive: -1}
	opts := sockopt.Options{Mark: a.Mark}
	if a.Busy != nil && a.Busy() {
		opts.Buffers = sockopt.AppBuffer
	}
	if src.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(src)
		// ReuseAddr: a port is free again for other destinations, and beside
		// connections that are ending.
		opts.Transparent, opts.Freebind, opts.ReuseAddr = true, true, true
	}
	d.Control = sockopt.ControlFor(opts)
	c, err := a.Connect(ctx, d, "tcp", dst.String())
	if err != nil {
		return nil, err
	}
	if t, ok := c.(*net.TCPConn); ok {
		if err := a.Liveness.Set(t); err != nil {
			_ = t.Close() // err says more
			return nil, fmt.Errorf("set keepalive: %w", err)
		}
	}
	return c, nil
}

// taken reports a pair of addresses that is in use, or seems so.
func taken(err error) bool {
	if inUse(err) {
		return true
	}
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout() || errors.Is(err, os.ErrDeadlineExceeded)
}

func inUse(err error) bool {
	return errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EADDRNOTAVAIL)
}
