package inpod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// PacketHandler serves a UDP socket until ctx ends, and closes it.
type PacketHandler func(ctx context.Context, c *net.UDPConn)

// resolverAddrs is where the pod's rules send DNS.
var resolverAddrs = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15053"), netip.MustParseAddrPort("[::1]:15053")}

// startDNS listens for DNS on loopback. Questions end with the listeners and not
// with the drain: each is over in seconds, and who asks again finds the next
// proxy, or the server itself.
func (m *Manager) startDNS(ctx context.Context, info handoff.Pod, p *pod) error {
	if p.handlers.DNSPacket == nil || p.handlers.DNSStream == nil {
		return nil
	}
	dctx, cancel := context.WithCancelCause(p.ctx)
	p.endDNS = cancel
	addrs := m.cfg.DNSAddrs
	if len(addrs) == 0 {
		addrs = resolverAddrs
	}
	listening := false
	for _, a := range addrs {
		if a.Addr().Is6() && !m.cfg.IPv6 {
			continue
		}
		err := m.listenDNS(ctx, dctx, info, p, a)
		if a.Addr().Is6() && (errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)) {
			continue // a pod without IPv6
		}
		if err != nil {
			return fmt.Errorf("listen in pod %s/%s for DNS on %s: %w", info.Namespace, info.Name, a, err)
		}
		listening = true
	}
	if !listening {
		return fmt.Errorf("listen in pod %s/%s for DNS: no address of %v is usable", info.Namespace, info.Name, addrs)
	}
	return nil
}

func (m *Manager) listenDNS(ctx, dctx context.Context, info handoff.Pod, p *pod, a netip.AddrPort) error {
	// A container's loopback may still be down while it is enrolled.
	udp := sockopt.Options{Freebind: true, ReusePort: !m.cfg.NoPortReuse}
	tcp := udp
	tcp.Mark = m.cfg.Mark // as of the other listeners: accepted sockets inherit it
	pc, err := info.NS.ListenPacket(ctx, &net.ListenConfig{Control: sockopt.ControlFor(udp)}, "udp", a.String())
	if err != nil {
		return err
	}
	ln, err := info.NS.Listen(ctx, &net.ListenConfig{KeepAlive: -1, Control: sockopt.ControlFor(tcp)}, "tcp", a.String())
	if err != nil {
		_ = pc.Close() // err says more
		return err
	}
	uc := pc.(*net.UDPConn)
	p.accepting.Go(func() { p.handlers.DNSPacket(dctx, uc) })
	p.accept(ln, p.handlers.Account, func(_ context.Context, c *net.TCPConn) { p.handlers.DNSStream(dctx, c) })
	return nil
}
