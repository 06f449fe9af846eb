package inpod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// PacketHandler serves a UDP socket until ctx ends, and closes it.
type PacketHandler func(ctx context.Context, c *net.UDPConn)

// resolverAddrs is where the pod's queries come: with rules to these addresses,
// with programs to one address for each server that the pod asks. Connections
// are steered to their listener wherever it is; datagrams are not, so that their
// socket is bound to no address (and hears nobody but the pod).
var resolverAddrs = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15053"), netip.MustParseAddrPort("[::1]:15053")}

// startDNS listens for DNS from the pod. Questions end with the listeners and not
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
		datagrams := a
		if len(m.cfg.DNSAddrs) == 0 {
			datagrams = netip.AddrPortFrom(anyAddr(a.Addr()), a.Port())
		}
		err := m.listenDNS(ctx, dctx, info, p, datagrams, a)
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

func anyAddr(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func (m *Manager) listenDNS(ctx, dctx context.Context, info handoff.Pod, p *pod, datagrams, streams netip.AddrPort) error {
	// A container's loopback may still be down while it is enrolled, and IPv6
	// aliases are addresses by route alone.
	tcp := sockopt.Options{Freebind: true, ReusePort: !m.cfg.NoPortReuse}
	udp := tcp
	tcp.NoDelay = true
	udp.PacketInfo, udp.OwnPodOnly = true, true
	tcp.Mark, tcp.Liveness = m.cfg.Mark, &m.cfg.Liveness // as of the other listeners: accepted sockets inherit them
	network := "udp4"
	if datagrams.Addr().Is6() {
		network = "udp6" // each family has a socket of its own
	}
	pc, err := info.NS.ListenPacket(ctx, &net.ListenConfig{Control: sockopt.ControlFor(udp)}, network, datagrams.String())
	if err != nil {
		return err
	}
	tl, err := info.NS.Listen(ctx, &net.ListenConfig{KeepAlive: -1, Control: sockopt.ControlFor(tcp)}, "tcp", streams.String())
	if err != nil {
		_ = pc.Close() // err says more
		return err
	}
	ln, err := netns.NewListener(tl)
	if err != nil {
		_ = pc.Close() // err says more
		return err
	}
	uc := pc.(*net.UDPConn)
	p.accepting.Go(func() { p.handlers.DNSPacket(dctx, uc) })
	p.accept(ln, p.handlers.Account, func(_ context.Context, c sockopt.Socket, ended func()) { p.handlers.DNSStream(dctx, c, ended) })
	return nil
}
