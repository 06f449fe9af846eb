package outbound

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

func id(sa string) identity.ID {
	return identity.MustParse("spiffe://cluster.local/ns/default/sa/" + sa)
}

func wl(name, addr string, change ...func(*mesh.Workload)) *mesh.Workload {
	w := &mesh.Workload{UID: "c//Pod/default/" + name, Name: name, Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Traits: &mesh.Traits{Namespace: "default", ServiceAccount: name, Identity: id(name), Tunnel: workload.TunnelProtocol_HBONE, Healthy: true, Capacity: 1}}
	for _, f := range change {
		f(w)
	}
	return w
}

func serves(svc string, ports ...mesh.Port) func(*mesh.Workload) {
	return func(w *mesh.Workload) {
		w.Services = map[mesh.Hostname][]mesh.Port{{Namespace: "default", Name: svc}: ports}
	}
}

func svc(name, vip string, change ...func(*mesh.Service)) *mesh.Service {
	s := &mesh.Service{Name: name, Namespace: "default", Host: mesh.Hostname{Namespace: "default", Name: name},
		VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr(vip)}}, Ports: []mesh.Port{{Service: 80, Target: 8080}}}
	for _, f := range change {
		f(s)
	}
	return s
}

func names(ids []identity.ID) string {
	var out []string
	for _, p := range ids {
		out = append(out, p.ServiceAccount())
	}
	return strings.Join(out, " ")
}

func TestRoute(t *testing.T) {
	gw := func(s string) *mesh.GatewayAddress {
		return &mesh.GatewayAddress{Host: mesh.Hostname{Namespace: "default", Name: s}, HBONEPort: 15008}
	}
	there := func(gw *mesh.GatewayAddress) func(*mesh.Workload) {
		return func(w *mesh.Workload) { w.Network, w.NetworkGateway = "other", gw }
	}
	onNode := func(node string) func(*mesh.Workload) {
		return func(w *mesh.Workload) { w.Node, w.SameNode = node, ambit.WorkloadExtension_SAME_NODE_LOCAL }
	}
	src := wl("src", "10.0.0.1", func(w *mesh.Workload) { w.Node = "node-1" })
	m := mesh.Empty().Edit()
	for _, w := range []*mesh.Workload{
		src,
		wl("b", "10.0.0.2", serves("svc-b", mesh.Port{Service: 80, Target: 8080})),
		wl("plain", "10.0.0.3", func(w *mesh.Workload) { w.Tunnel = workload.TunnelProtocol_NONE }),
		wl("behind", "10.0.0.4", func(w *mesh.Workload) { w.Waypoint = gw("wp") }, serves("svc-behind", mesh.Port{Service: 80, Target: 8080})),
		wl("wp", "10.0.0.5", serves("wp", mesh.Port{Service: 15008, Target: 15008})),
		wl("far", "10.0.0.6", func(w *mesh.Workload) { w.Network = "other" }, serves("svc-far", mesh.Port{Service: 80, Target: 8080})),
		wl("sick", "10.0.0.7", func(w *mesh.Workload) { w.Healthy = false }, serves("svc-sick", mesh.Port{Service: 80, Target: 8080})),
		wl("six", "fd00::8"),
		wl("lost", "10.0.0.9", func(w *mesh.Workload) { w.Waypoint = gw("nowhere") }),
		wl("gw", "10.9.0.1", func(w *mesh.Workload) { w.Network = "other" }, serves("gw-svc", mesh.Port{Service: 15010, Target: 15010})),
		wl("there", "10.7.0.1", there(&mesh.GatewayAddress{Network: "other", Addr: netip.MustParseAddr("10.9.0.1"), HBONEPort: 15009}), serves("svc-there", mesh.Port{Service: 80, Target: 8080})),
		wl("there-by-name", "10.7.0.2", there(&mesh.GatewayAddress{Host: mesh.Hostname{Namespace: "default", Name: "gw-svc"}, HBONEPort: 15010}),
			func(w *mesh.Workload) { w.Addrs = nil }, serves("svc-there-by-name", mesh.Port{Service: 81, Target: 8080})),
		wl("there-unproven", "10.7.0.3", there(&mesh.GatewayAddress{Network: "other", Addr: netip.MustParseAddr("10.9.0.1")}), serves("svc-unproven", mesh.Port{Service: 80, Target: 8080})),
		wl("there-lost", "10.7.0.4", there(&mesh.GatewayAddress{Network: "other", Addr: netip.MustParseAddr("10.9.0.9")}), serves("svc-gw-lost", mesh.Port{Service: 80, Target: 8080})),
		wl("wp-there", "10.7.0.5", there(&mesh.GatewayAddress{Network: "other", Addr: netip.MustParseAddr("10.9.0.1"), HBONEPort: 15009}), serves("wp-there", mesh.Port{Service: 15008, Target: 15008})),
		wl("behind-wp-there", "10.0.0.20", func(w *mesh.Workload) { w.Waypoint = gw("wp-there") }),
		wl("db", "10.0.0.30", func(w *mesh.Workload) {
			w.Addrs, w.Hostname, w.Tunnel = nil, "db.example.com", workload.TunnelProtocol_NONE
		}, serves("svc-db", mesh.Port{Service: 80, Target: 8080})),
		wl("vm", "10.0.0.31", func(w *mesh.Workload) { w.Addrs, w.Hostname = nil, "vm.example.com" }, serves("svc-vm", mesh.Port{Service: 80, Target: 8080})),
		wl("near", "10.0.0.21", onNode("node-1")),
		wl("near-hbone", "10.0.0.22", onNode("node-1"), func(w *mesh.Workload) { w.SameNode = ambit.WorkloadExtension_SAME_NODE_HBONE }),
		wl("near-behind", "10.0.0.23", onNode("node-1"), func(w *mesh.Workload) { w.Waypoint = gw("wp") }),
		wl("elsewhere", "10.0.0.24", onNode("node-2")),
	} {
		m.PutWorkload(w)
	}
	sans := func(names ...string) func(*mesh.Service) {
		return func(s *mesh.Service) {
			for _, n := range names {
				s.SANs = append(s.SANs, id(n))
			}
		}
	}
	for _, s := range []*mesh.Service{
		svc("svc-b", "10.96.0.1", func(s *mesh.Service) { s.SANs = []identity.ID{id("extra")} }),
		svc("svc-empty", "10.96.0.2"),
		svc("svc-wp", "10.96.0.3", func(s *mesh.Service) { s.Waypoint = gw("wp") }),
		svc("wp", "10.96.0.4", func(s *mesh.Service) { s.Ports = []mesh.Port{{Service: 15008, Target: 15008}} }),
		svc("svc-behind", "10.96.0.5"),
		svc("svc-far", "10.96.0.6"),
		svc("svc-sick", "10.96.0.7"),
		svc("svc-orig", "10.96.0.8", func(s *mesh.Service) { s.Mode = workload.LoadBalancing_PASSTHROUGH }),
		svc("svc-lost", "10.96.0.9", func(s *mesh.Service) { s.Waypoint = gw("nowhere") }),
		svc("svc-weighted", "10.96.0.10", func(s *mesh.Service) {
			s.WeightedWaypoints = []mesh.WeightedWaypoint{{Gateway: *gw("nowhere"), Weight: 0}, {Gateway: *gw("wp"), Weight: 5}}
		}),
		svc("gw-svc", "10.96.1.1", sans("gw-extra")),
		svc("svc-there", "10.96.0.11", sans("there")),
		svc("svc-there-by-name", "10.96.0.12", sans("there")),
		svc("svc-unproven", "10.96.0.13"),
		svc("svc-gw-lost", "10.96.0.14", sans("there")),
		svc("svc-wp-there", "10.96.0.15", sans("not-this-one"), func(s *mesh.Service) { s.Waypoint = gw("wp-there") }),
		svc("wp-there", "10.96.1.2", sans("wp-there")),
		svc("svc-db", "10.96.0.16"),
		svc("svc-vm", "10.96.0.17"),
	} {
		m.PutService(s)
	}
	snap := m.Commit()
	for _, c := range []struct {
		name, dst      string
		from           *mesh.Workload
		transport      flow.Transport
		addr, auth     string
		peers, refused string
		inner          string
		hostname, at   string
		atAuth         string
		sameNode       bool
	}{
		{name: "unknown address", dst: "1.2.3.4:443", transport: flow.Passthrough, addr: "1.2.3.4:443"},
		{name: "unknown IPv6 address", dst: "[2001:db8::1]:443", transport: flow.Passthrough, addr: "[2001:db8::1]:443"},
		{name: "workload", dst: "10.0.0.2:9000", transport: flow.HBONE, addr: "10.0.0.2:15008", auth: "10.0.0.2:9000", peers: "b"},
		{name: "mapped IPv4", dst: "[::ffff:10.0.0.2]:9000", transport: flow.HBONE, addr: "10.0.0.2:15008", auth: "10.0.0.2:9000", peers: "b"},
		{name: "IPv6 workload", dst: "[fd00::8]:80", transport: flow.HBONE, addr: "[fd00::8]:15008", auth: "[fd00::8]:80", peers: "six"},
		{name: "workload without tunnel", dst: "10.0.0.3:80", transport: flow.Plaintext, addr: "10.0.0.3:80"},
		{name: "service", dst: "10.96.0.1:80", transport: flow.HBONE, addr: "10.0.0.2:15008", auth: "10.0.0.2:8080", peers: "b extra"},
		{name: "service, other port", dst: "10.96.0.1:81", refused: "serves the port"},
		{name: "service without endpoints", dst: "10.96.0.2:80", refused: "no endpoints"},
		{name: "service without healthy endpoints", dst: "10.96.0.7:80", refused: "no healthy endpoints"},
		{name: "service that keeps the destination", dst: "10.96.0.8:80", transport: flow.Passthrough, addr: "10.96.0.8:80"},
		{name: "service with waypoint", dst: "10.96.0.3:80", transport: flow.HBONE, addr: "10.0.0.5:15008", auth: "10.96.0.3:80", peers: "wp"},
		{name: "service with weighted waypoints", dst: "10.96.0.10:80", transport: flow.HBONE, addr: "10.0.0.5:15008", auth: "10.96.0.10:80", peers: "wp"},
		{name: "service with unknown waypoint", dst: "10.96.0.9:80", refused: "waypoint default/nowhere"},
		{name: "workload with waypoint", dst: "10.0.0.4:80", transport: flow.HBONE, addr: "10.0.0.5:15008", auth: "10.0.0.4:80", peers: "wp"},
		{name: "workload with unknown waypoint", dst: "10.0.0.9:80", refused: "waypoint default/nowhere"},
		{name: "service ignores the workload's waypoint", dst: "10.96.0.5:80", transport: flow.HBONE, addr: "10.0.0.4:15008", auth: "10.0.0.4:8080", peers: "behind"},
		{name: "the waypoint itself", dst: "10.0.0.4:80", from: snap.Workload("c//Pod/default/wp"), transport: flow.HBONE, addr: "10.0.0.4:15008", auth: "10.0.0.4:80", peers: "behind"},
		{name: "other network without gateway", dst: "10.96.0.6:80", refused: "no network gateway"},
		{name: "other network", dst: "10.96.0.11:80", transport: flow.HBONE, addr: "10.9.0.1:15009", auth: "svc-there:80", peers: "gw gw-extra", inner: "there"},
		{name: "other network, gateway by host name", dst: "10.96.0.12:81", transport: flow.HBONE, addr: "10.9.0.1:15010", auth: "svc-there-by-name:81", peers: "gw gw-extra", inner: "there"},
		{name: "other network, nobody to expect", dst: "10.96.0.13:80", refused: "no subject alternative names"},
		{name: "other network, unknown gateway", dst: "10.96.0.14:80", refused: "network gateway 10.9.0.9: not known"},
		{name: "waypoint in another network", dst: "10.96.0.15:80", transport: flow.HBONE, addr: "10.9.0.1:15009", auth: "svc-wp-there:80", peers: "gw gw-extra", inner: "wp-there"},
		{name: "workload with a waypoint in another network", dst: "10.0.0.20:80", refused: "only services"},
		{name: "host name", dst: "10.96.0.16:80", transport: flow.Plaintext, addr: "invalid AddrPort", hostname: "db.example.com", at: "192.0.2.1:8080"},
		{name: "host name of a mesh workload", dst: "10.96.0.17:80", transport: flow.HBONE, addr: "invalid AddrPort", hostname: "vm.example.com", peers: "vm", at: "192.0.2.1:15008", atAuth: "192.0.2.1:8080"},
		{name: "same node", dst: "10.0.0.21:80", transport: flow.HBONE, addr: "10.0.0.21:15008", auth: "10.0.0.21:80", peers: "near", sameNode: true},
		{name: "same node, tunnels wanted", dst: "10.0.0.22:80", transport: flow.HBONE, addr: "10.0.0.22:15008", auth: "10.0.0.22:80", peers: "near-hbone"},
		{name: "other node", dst: "10.0.0.24:80", transport: flow.HBONE, addr: "10.0.0.24:15008", auth: "10.0.0.24:80", peers: "elsewhere"},
		{name: "same node behind a waypoint", dst: "10.0.0.23:80", transport: flow.HBONE, addr: "10.0.0.5:15008", auth: "10.0.0.23:80", peers: "wp"},
		{name: "own port on loopback", dst: "127.0.0.1:15001", refused: "own port"},
		{name: "own port on own address", dst: "10.0.0.1:15008", refused: "own port"},
		{name: "same port elsewhere", dst: "1.2.3.4:15008", transport: flow.Passthrough, addr: "1.2.3.4:15008"},
	} {
		t.Run(c.name, func(t *testing.T) {
			from := src
			if c.from != nil {
				from = c.from
			}
			p, err := Route(snap, Request{Src: from, Dst: netip.MustParseAddrPort(c.dst), Rand: 7})
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Fatalf("%+v, %v; want refused with %q", p, err, c.refused)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			peers, inner := names(p.Peers), names(p.Inner)
			if inner != c.inner || p.SameNode != c.sameNode || p.Hostname != c.hostname {
				t.Errorf("inner peers %q, same node %v, host name %q", inner, p.SameNode, p.Hostname)
			}
			if c.at != "" {
				if got := p.At(netip.MustParseAddr("192.0.2.1")); got.Addr.String() != c.at || got.Authority != c.atAuth {
					t.Errorf("resolved: %s, authority %q", got.Addr, got.Authority)
				}
			}
			if p.Transport != c.transport || p.Addr.String() != c.addr || p.Authority != c.auth || peers != c.peers {
				t.Errorf("got %s %s authority %q peers %q", p.Transport, p.Addr, p.Authority, peers)
			}
		})
	}
}

func TestBaggage(t *testing.T) {
	w := &mesh.Workload{WorkloadName: "web", Traits: &mesh.Traits{ClusterID: "Kubernetes", Namespace: "default", WorkloadType: workload.WorkloadType_DEPLOYMENT, CanonicalName: "web", CanonicalRevision: "v1", Locality: mesh.Locality{Region: "r", Zone: "z"}}}
	want := "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=web,service.name=web,service.version=v1,cloud.region=r,cloud.availability_zone=z"
	if got := Baggage(w); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	if got := Baggage(&mesh.Workload{Traits: &mesh.Traits{CanonicalName: "a,b=\n", WorkloadType: workload.WorkloadType_POD}}); got != "service.name=a%2Cb=%0A" {
		t.Errorf("escaped: %q", got)
	}
}
