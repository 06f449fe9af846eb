package app

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/dns"
	"github.com/ambit-mesh/ambit/ztunnel/inpod"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// resolver is what the pods' DNS servers have in common.
type resolver struct {
	names   *dns.Resolver
	metrics *dns.Metrics
}

func (n *node) newResolver() *resolver {
	if !n.cfg.DNSCapture {
		return nil
	}
	return &resolver{
		names: dns.NewResolver(dns.ResolverConfig{
			Domain: n.cfg.ClusterDomain, Preferred: n.cfg.PreferredServiceNamespace, NoIPv6: !n.cfg.IPv6Enabled,
		}),
		metrics: dns.NewMetrics(n.reg),
	}
}

// serveDNS adds the pod's DNS to what serves it. A pod without a namespace of its
// own has no redirected queries.
func (n *node) serveDNS(p handoff.Pod, pn podNet, account *ledger.Account, h *inpod.Handlers) {
	if n.dns == nil || p.NS == nil {
		return
	}
	track := dns.NewConntrack(p.NS)
	originalDst, datagramDst := pn.originalDst, track.UDP
	var search []string
	if n.cfg.Mode == dedicated {
		conf := readResolvConf("/etc/resolv.conf")
		originalDst, datagramDst, search = conf.stream(originalDst), conf.datagram(datagramDst), conf.search
	}
	s := dns.NewServer(dns.Config{
		Search:   search,
		Resolver: n.dns.names, Namespace: p.Namespace, Network: n.cfg.Network,
		Mesh:  func() *mesh.Snapshot { return n.store.View().Mesh },
		Known: func() *mesh.Workload { return n.lookup(p) }, Self: n.self(p),
		Dial: func(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
			d := &net.Dialer{KeepAlive: -1, Control: sockopt.ControlFor(sockopt.Options{Mark: int(n.cfg.PacketMark)})}
			return p.NS.Dial(ctx, d, network, server.String())
		},
		OriginalDst: originalDst, DatagramDst: datagramDst, Account: account,
		Metrics: n.dns.metrics, Logger: boot.Scoped(n.log, "dns").With("src.workload", p.Name, "src.namespace", p.Namespace),
	})
	h.DNSPacket = func(ctx context.Context, c *net.UDPConn) { s.ServePacket(ctx, c) }
	h.DNSStream = inpod.Blocking(func(ctx context.Context, c sockopt.Socket) { s.ServeStream(ctx, c) })
	rest := h.Close
	h.Close = func() {
		s.Close()
		track.Close()
		rest()
	}
}

// dnsAddrs is where the pods' DNS listens; nil means where their redirector leads.
// A dedicated proxy has rules or nothing, so that loopback is enough.
func (c *Config) dnsAddrs() ([]netip.AddrPort, error) {
	addr := c.DNSProxyAddr
	if addr == "" {
		if c.Mode != dedicated {
			return nil, nil
		}
		addr = net.JoinHostPort("localhost", strconv.Itoa(dns.Port))
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	hosts := []string{host}
	if host == "localhost" {
		hosts = []string{"127.0.0.1", "::1"}
	}
	var out []netip.AddrPort
	for _, h := range hosts {
		a, err := netip.ParseAddrPort(net.JoinHostPort(h, port))
		if err != nil {
			return nil, err
		}
		if !a.Addr().IsLoopback() {
			return nil, fmt.Errorf("%s is no loopback address: the resolver is for its pod only", a.Addr())
		}
		out = append(out, a)
	}
	return out, nil
}
