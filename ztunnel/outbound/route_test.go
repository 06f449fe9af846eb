package outbound

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

func id(sa string) identity.ID {
	return identity.MustParse("spiffe://cluster.local/ns/default/sa/" + sa)
}

func wl(name, addr string, change ...func(*mesh.Workload)) *mesh.Workload {
	w := &mesh.Workload{UID: "c//Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name, Identity: id(name),
		Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Tunnel: workload.TunnelProtocol_HBONE, Healthy: true, Capacity: 1}
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

func TestRoute(t *testing.T) {
	gw := func(s string) *mesh.GatewayAddress {
		return &mesh.GatewayAddress{Host: mesh.Hostname{Namespace: "default", Name: s}, HBONEPort: 15008}
	}
	src := wl("src", "10.0.0.1")
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
	} {
		m.PutWorkload(w)
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
		{name: "other network", dst: "10.96.0.6:80", refused: "other"},
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
			var peers []string
			for _, p := range p.Peers {
				peers = append(peers, p.ServiceAccount())
			}
			if p.Transport != c.transport || p.Addr.String() != c.addr || p.Authority != c.auth || strings.Join(peers, " ") != c.peers {
				t.Errorf("got %s %s authority %q peers %q", p.Transport, p.Addr, p.Authority, peers)
			}
		})
	}
}

func TestBaggage(t *testing.T) {
	w := &mesh.Workload{ClusterID: "Kubernetes", Namespace: "default", WorkloadType: workload.WorkloadType_DEPLOYMENT, WorkloadName: "web",
		CanonicalName: "web", CanonicalRevision: "v1", Locality: mesh.Locality{Region: "r", Zone: "z"}}
	want := "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=web,service.name=web,service.version=v1,cloud.region=r,cloud.availability_zone=z"
	if got := Baggage(w); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	if got := Baggage(&mesh.Workload{CanonicalName: "a,b=\n", WorkloadType: workload.WorkloadType_POD}); got != "service.name=a%2Cb=%0A" {
		t.Errorf("escaped: %q", got)
	}
}
