package memnet

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
)

// Listener accepts what Dial connects.
type Listener struct {
	addr  netip.AddrPort
	connc chan *Conn
	donec chan struct{}
	once  sync.Once
	port  atomic.Uint32
}

// Listen returns a listener with the given address, which is only a name.
func Listen(addr netip.AddrPort) *Listener {
	return &Listener{addr: addr, connc: make(chan *Conn), donec: make(chan struct{})}
}

// Dial connects from an address of src with a fresh port. It returns when the listener has accepted.
func (l *Listener) Dial(ctx context.Context, src netip.Addr) (*Conn, error) {
	port := uint16(32768 + l.port.Add(1)%28000)
	client, server := PipeAddr(netip.AddrPortFrom(src, port), l.addr)
	select {
	case l.connc <- server:
		return client, nil
	case <-l.donec:
		return nil, &net.OpError{Op: "dial", Net: "mem", Addr: l.Addr(), Err: net.ErrClosed}
	case <-ctx.Done():
		return nil, &net.OpError{Op: "dial", Net: "mem", Addr: l.Addr(), Err: context.Cause(ctx)}
	}
}

func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.connc:
		return c, nil
	case <-l.donec:
		return nil, &net.OpError{Op: "accept", Net: "mem", Addr: l.Addr(), Err: net.ErrClosed}
	}
}

func (l *Listener) Close() error {
	l.once.Do(func() { close(l.donec) })
	return nil
}

func (l *Listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.addr) }
