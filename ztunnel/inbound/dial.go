package inbound

import (
	"context"
	"errors"
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
	// Sockets dials in the pod's namespace, with sockets that AppOptions has set up.
	Sockets Sockets
	// KeepSource is false where transparent sockets are not to be had.
	KeepSource bool
	// Buffers is how large either buffer of the next socket may be; nil or
	// zero: as the kernel sees fit.
	Buffers func() int
}

// Sockets connects sockets of a pod's namespace: from src, unless it is not valid,
// to dst, within limit. *netns.Stock is one.
type Sockets interface {
	Dial(ctx context.Context, src, dst netip.AddrPort, limit time.Duration, control func(fd int) error) (net.Conn, error)
}

// AppOptions sets up the sockets that an AppDialer needs: to bind to clients'
// addresses, and to ports that are free again for other destinations, and beside
// connections that are ending. Where transparent sockets are not to be had, mark
// alone. A transparent socket binds to any address (ip(7)). A close is a reset
// until relay.Join makes it an orderly one.
func AppOptions(mark int, keepSource bool, l sockopt.Liveness) func(fd int, v6 bool) error {
	o := sockopt.Options{Mark: mark, Transparent: keepSource, ReuseAddr: keepSource, NoDelay: true, Liveness: &l, ResetOnClose: true}
	return func(fd int, v6 bool) error { return sockopt.Apply(fd, v6, o) }
}

// Dial connects to dst, from src when that is another host's address of the
// same family.
func (a *AppDialer) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (net.Conn, error) {
	if !a.KeepSource || !src.IsValid() || src == dst.Addr() || src.Is4() != dst.Addr().Is4() || src.IsLoopback() {
		return a.dial(ctx, netip.AddrPort{}, dst, ConnectTimeout)
	}
	begun, silent := time.Now(), 0
	for tries := 1; ; tries++ {
		// Never 0, which is no limit.
		limit := max(ConnectTimeout-time.Since(begun), time.Millisecond)
		if silent < silentTries { // otherwise the application itself is slow
			limit = min(limit, silence)
		}
		port := uint16(firstPort + rand.IntN(lastPort-firstPort+1))
		c, err := a.dial(ctx, netip.AddrPortFrom(src, port), dst, limit)
		if err == nil || tries == bindTries || ctx.Err() != nil || !taken(err) || time.Since(begun) >= ConnectTimeout {
			return c, err
		}
		if !inUse(err) {
			silent++
		}
	}
}

func (a *AppDialer) dial(ctx context.Context, src, dst netip.AddrPort, limit time.Duration) (net.Conn, error) {
	var control func(fd int) error
	if a.Buffers != nil {
		if size := a.Buffers(); size > 0 {
			control = func(fd int) error { return sockopt.SetBuffers(fd, size) }
		}
	}
	return a.Sockets.Dial(ctx, src, dst, limit, control)
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
