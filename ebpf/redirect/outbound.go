package redirect

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// What leaves the pod, in the order packets meet it. UDP is left alone except for
// DNS, and DNS to a server inside the pod (a resolver on 127.0.0.53, the pod's own
// address) stays with that server: only what it asks of others is captured.

func (d *Dataplane) outbound(r PodRules, proxies []cgroupMatch) []rule {
	rules := byProxy(proxies, "proxy", nil, accept())
	if r.DNS {
		rules = append(rules,
			// A link-local server is known by its interface too, which a redirected
			// datagram does not tell.
			rule{"DNS over UDP to a neighbour", join(l4proto(expr.CmpOpEq, unix.IPPROTO_UDP), destination(linkLocalV6), accept())},
			rule{"DNS over UDP", join(oif(expr.CmpOpNeq, "lo"), l4proto(expr.CmpOpEq, unix.IPPROTO_UDP), destPort(portDomain), redirectTo(PortDNS))})
	}
	rules = append(rules,
		rule{"only TCP", join(l4proto(expr.CmpOpNeq, unix.IPPROTO_TCP), accept())},
		older(),
	)
	if len(proxies) == 0 {
		rules = append(rules, rule{"replies to the proxy", join(mark(expr.CmpOpEq, MarkReturn), accept())})
	}
	rules = append(rules,
		rule{"node's probes (IPv4)", join(destination(netip.PrefixFrom(d.cfg.ProbeV4, 32)), accept())},
		rule{"node's probes (IPv6)", join(destination(netip.PrefixFrom(d.cfg.ProbeV6, 128)), accept())},
		rule{"loopback (IPv4)", join(destination(loopbackV4), accept())},
		rule{"loopback (IPv6)", join(destination(loopbackV6), accept())},
		rule{"app to itself", join(oif(expr.CmpOpEq, "lo"), accept())},
	)
	rules = append(rules, excluded(r.ExcludeOutbound)...)
	if r.DNS {
		rules = append(rules, rule{"DNS over TCP", join(destPort(portDomain), redirectTo(PortDNS))})
	}
	return append(rules, rule{"outbound", redirectTo(PortOutbound)})
}

const portDomain = 53

var linkLocalV6 = netip.MustParsePrefix("fe80::/10")

// zoneProxy is a conntrack zone of the proxy's own DNS queries. An app's entry
// outlives its socket by up to two minutes; were the proxy given that socket's
// port for a query to the same server, the entry would redirect the query to the
// proxy itself.
const zoneProxy = 1

func dnsZone(proxies []cgroupMatch) []chain {
	return []chain{
		{
			name: "raw_output", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityRaw,
			rules: byProxy(proxies, "proxy's queries", join(l4proto(expr.CmpOpEq, unix.IPPROTO_UDP), destPort(portDomain)), setZone(zoneProxy)),
		},
		{
			// Nobody else has answers coming: all other queries end on lo.
			name: "raw_prerouting", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRaw,
			rules: []rule{
				{"answers to the proxy", join(iif(expr.CmpOpNeq, "lo"), l4proto(expr.CmpOpEq, unix.IPPROTO_UDP), sourcePort(portDomain), setZone(zoneProxy))},
			},
		},
	}
}

func setZone(zone uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint16(zone)},
		&expr.Ct{Key: expr.CtKeyZONE, Register: 1, SourceRegister: true},
	}
}
