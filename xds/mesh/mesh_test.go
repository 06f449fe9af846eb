package mesh

import (
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func pod(ns, name, node string, addrs ...string) *Workload {
	w := &Workload{UID: "Kubernetes//Pod/" + ns + "/" + name, Name: name, Node: node, Traits: &Traits{Namespace: ns, Tunnel: workload.TunnelProtocol_HBONE, Healthy: true, Capacity: 1}}
	for _, a := range addrs {
		w.Addrs = append(w.Addrs, ip(a))
	}
	return w
}

func serves(w *Workload, host string, ports ...Port) *Workload {
	h, err := ParseHostname(host)
	if err != nil {
		panic("BUG: " + err.Error())
	}
	w.Services = map[Hostname][]Port{h: ports}
	return w
}

func svc(host string, vips ...string) *Service {
	h, err := ParseHostname(host)
	if err != nil {
		panic("BUG: " + err.Error())
	}
	s := &Service{Name: h.Name, Namespace: h.Namespace, Host: h}
	for _, v := range vips {
		if strings.Contains(v, "/") {
			s.CIDRs = append(s.CIDRs, NetPrefix{"", netip.MustParsePrefix(v)})
		} else {
			s.VIPs = append(s.VIPs, NetAddr{"", ip(v)})
		}
	}
	return s
}

func snapshot(things ...any) *Snapshot {
	txn := Empty().Edit()
	for _, x := range things {
		switch x := x.(type) {
		case *Workload:
			txn.PutWorkload(x)
		case *Service:
			txn.PutService(x)
		}
	}
	return txn.Commit()
}

func TestDecodeWorkload(t *testing.T) {
	got, err := DecodeWorkload(&workload.Workload{
		Uid: "Kubernetes//Pod/shop/web", Name: "web", Namespace: "shop",
		Addresses:             [][]byte{{10, 0, 0, 1}, ip("::ffff:10.0.0.2").AsSlice(), ip("fd00::1").AsSlice()},
		TunnelProtocol:        workload.TunnelProtocol_HBONE,
		AuthorizationPolicies: []string{"b/b", "a/a", "b/b"},
		Services: map[string]*workload.PortList{"shop/web.shop.svc": {Ports: []*workload.Port{
			{ServicePort: 80, TargetPort: 8080, AppProtocol: workload.AppProtocol_HTTP2}}}},
		Waypoint: &workload.GatewayAddress{HboneMtlsPort: 15008, Destination: &workload.GatewayAddress_Hostname{
			Hostname: &workload.NamespacedHostname{Namespace: "shop", Hostname: "wp"}}},
		Capacity: wrapperspb.UInt32(0),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := &Workload{UID: "Kubernetes//Pod/shop/web", Name: "web", Addrs: []netip.Addr{ip("10.0.0.1"), ip("10.0.0.2"), ip("fd00::1")}, Traits: &Traits{Namespace: "shop", ServiceAccount: "default", TrustDomain: "cluster.local", ClusterID: "Kubernetes", Identity: identity.MustParse("spiffe://cluster.local/ns/shop/sa/default"), Tunnel: workload.TunnelProtocol_HBONE, Policies: []string{"a/a", "b/b"}, Healthy: true, Services: map[Hostname][]Port{{"shop", "web.shop.svc"}: {{80, 8080, workload.AppProtocol_HTTP2}}}, Waypoint: &GatewayAddress{Host: Hostname{"shop", "wp"}, HBONEPort: 15008}}}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b identity.ID) bool { return a == b })); d != "" {
		t.Error(d)
	}
	if w, err := DecodeWorkload(&workload.Workload{Uid: "u"}); err != nil || w.Capacity != 1 {
		t.Errorf("capacity unset: %v, %v", w, err)
	}
}

func TestDecodeErrorsNameResourceAndField(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   *workload.Workload
		want string
	}{
		{"no uid", &workload.Workload{}, "uid: is empty"},
		{"address length", &workload.Workload{Uid: "u", Addresses: [][]byte{{1, 2, 3}}}, `workload "u": addresses: address of 3 bytes is not 4 or 16 bytes`},
		{"legacy tunnel", &workload.Workload{Uid: "u", TunnelProtocol: workload.TunnelProtocol_LEGACY_ISTIO_MTLS}, "tunnel_protocol: LEGACY_ISTIO_MTLS is not spoken"},
		{"unknown tunnel", &workload.Workload{Uid: "u", TunnelProtocol: 9}, "tunnel_protocol: value 9 is unknown"},
		{"unknown status", &workload.Workload{Uid: "u", Status: 9}, "status: value 9 is unknown"},
		{"unknown mode", &workload.Workload{Uid: "u", NetworkMode: 9}, "network_mode: value 9 is unknown"},
		{"service key", &workload.Workload{Uid: "u", Services: map[string]*workload.PortList{"x": nil}}, `services: parse hostname "x"`},
		{"port", &workload.Workload{Uid: "u", Services: map[string]*workload.PortList{"a/b": {Ports: []*workload.Port{{ServicePort: 70000}}}}}, "port 70000"},
		{"gateway", &workload.Workload{Uid: "u", Waypoint: &workload.GatewayAddress{}}, "waypoint: has no destination"},
		{"identity", &workload.Workload{Uid: "u", Namespace: "a b"}, "service_account: parse identity"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := DecodeWorkload(tt.in); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
	for _, tt := range []struct {
		name string
		in   *workload.Service
		want string
	}{
		{"no name", &workload.Service{Namespace: "a"}, "hostname"},
		{"scope", &workload.Service{Namespace: "a", Hostname: "b", LoadBalancing: &workload.LoadBalancing{RoutingPreference: []workload.LoadBalancing_Scope{0}}}, `service "a/b": load_balancing.routing_preference: scope is not specified`},
		{"mode", &workload.Service{Namespace: "a", Hostname: "b", LoadBalancing: &workload.LoadBalancing{Mode: 9}}, "load_balancing.mode: value 9"},
		{"prefix", &workload.Service{Namespace: "a", Hostname: "b", Addresses: []*workload.NetworkAddress{{Address: []byte{1, 2, 3, 4}, Length: proto.Uint32(33)}}}, "prefix length 33 does not fit 1.2.3.4"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := DecodeService(tt.in); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
	s, err := DecodeService(&workload.Service{Namespace: "a", Hostname: "b", Visibility: 9, SubjectAltNames: []string{"x.example.com", "spiffe://td/ns/n/sa/s", "spiffe://td"}, Addresses: []*workload.NetworkAddress{
		{Address: []byte{1, 2, 3, 4}}, {Address: []byte{1, 2, 3, 4}, Length: proto.Uint32(32)}, {Address: []byte{1, 2, 3, 4}, Length: proto.Uint32(24)},
		{Address: ip("::ffff:5.6.7.8").AsSlice(), Length: proto.Uint32(120)}}})
	if err != nil || s.Visibility != workload.Service_PUBLIC || len(s.VIPs) != 2 || fmt.Sprint(s.CIDRs) != "[{ 1.2.3.0/24} { 5.6.7.0/24}]" ||
		fmt.Sprint(s.SANs) != "[spiffe://td/ns/n/sa/s]" {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestWorkloadByAddrPrefersPodsThenHBONE(t *testing.T) {
	entry := &Workload{UID: "c/networking.istio.io/WorkloadEntry/a/e", Addrs: []netip.Addr{ip("10.0.0.1")}, Traits: &Traits{}}
	tunnel := &Workload{UID: "d/entry", Addrs: entry.Addrs, Traits: &Traits{Tunnel: workload.TunnelProtocol_HBONE}}
	p := pod("a", "p", "n1", "10.0.0.1")
	host := pod("a", "h", "n1", "10.0.0.1")
	host.UID, host.NetworkMode = "A//Pod/a/h", workload.NetworkMode_HOST_NETWORK
	s := snapshot(p, entry, tunnel, host)
	for _, want := range []*Workload{p, tunnel, entry, nil} {
		if got := s.WorkloadByAddr("", ip("::ffff:10.0.0.1")); got != want {
			t.Fatalf("got %v, want %v", got, want)
		}
		if want != nil {
			txn := s.Edit()
			txn.RemoveWorkload(want.UID)
			s = txn.Commit()
		}
	}
	if s.WorkloadByAddr("other", ip("10.0.0.1")) != nil {
		t.Error("networks are mixed up")
	}
	if s.LocalWorkload("n1", "a", "h") != host || s.LocalWorkload("n2", "a", "h") != nil {
		t.Error("local workload not found by node, namespace and name")
	}
}

func TestServiceByVIP(t *testing.T) {
	first, own, canonical := svc("b/x", "1.1.1.1"), svc("a/x", "1.1.1.1"), svc("c/x", "1.1.1.1")
	canonical.Canonical = true
	hidden := svc("d/x", "1.1.1.1")
	hidden.Canonical, hidden.Visibility = true, workload.Service_NAMESPACE
	wide, narrow := svc("e/wide", "2.0.0.0/8", "fd00::/8"), svc("e/narrow", "2.2.0.0/16")
	s := snapshot(hidden, first, own, canonical, wide, narrow)
	for _, tt := range []struct {
		addr, ns string
		want     *Service
	}{
		{"1.1.1.1", "a", own}, {"1.1.1.1", "z", canonical}, {"1.1.1.1", "d", hidden}, {"::ffff:1.1.1.1", "b", first},
		{"2.2.3.4", "z", narrow}, {"2.3.3.4", "z", wide}, {"fd12::1", "z", wide}, {"3.3.3.3", "z", nil},
	} {
		if got := s.ServiceByVIP("", ip(tt.addr), tt.ns); got != tt.want {
			t.Errorf("%s for %s: %v, want %v", tt.addr, tt.ns, got, tt.want)
		}
	}
	if s.ServiceByHostname("x", "a") != own || s.ServiceByHostname("x", "z") != canonical || s.ServiceByHostname("y", "z") != nil {
		t.Error("service by host name")
	}
	txn := s.Edit()
	txn.RemoveService(canonical.Host)
	txn.RemoveService(narrow.Host)
	again := svc("b/x", "1.1.1.1") // keeps its place
	txn.PutService(again)
	s = txn.Commit()
	if got := s.ServiceByVIP("", ip("1.1.1.1"), "z"); got != again {
		t.Errorf("after the canonical one went: %v, want the first seen", got)
	}
	if got := s.ServiceByVIP("", ip("2.2.3.4"), "z"); got != wide {
		t.Errorf("after the longest prefix went: %v", got)
	}
}

// Whoever asks the control plane for names must not take a range, or what only
// others see, for an answer about an address.
func TestHas(t *testing.T) {
	private := svc("a/private", "1.1.1.1")
	private.Visibility = workload.Service_NAMESPACE
	s := snapshot(pod("a", "p", "n", "10.0.0.1"), private, svc("a/wide", "10.0.0.0/8", "fd00::/8"))
	for name, want := range map[string]bool{
		"/10.0.0.1": true, "/::ffff:10.0.0.1": true, "/1.1.1.1": true, "a/wide": true, s.WorkloadByAddr("", ip("10.0.0.1")).UID: true,
		"/10.0.0.2": false, "/fd00::1": false, "n/1.1.1.1": false, "b/wide": false, "x": false, "": false,
	} {
		if got := s.Has(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
	if (*Snapshot)(nil).Has("/10.0.0.1") {
		t.Error("nothing has something")
	}
}

func TestEndpointsBeforeTheirService(t *testing.T) {
	w := serves(pod("a", "p", "n", "10.0.0.1"), "a/x", Port{Service: 80, Target: 8080})
	s := snapshot(w)
	if s.Endpoints(Hostname{"a", "x"}).Len() != 1 {
		t.Fatal("endpoint of an unknown service was dropped")
	}
	w2 := w.Copy()
	w2.Services = nil
	txn := s.Edit()
	txn.PutWorkload(w2)
	if got := txn.Commit().Endpoints(Hostname{"a", "x"}).Len(); got != 0 {
		t.Errorf("%d endpoints after the workload left", got)
	}
	if s.Endpoints(Hostname{"a", "x"}).Len() != 1 {
		t.Error("an older snapshot changed")
	}
}

// TestHistoryAgainstRebuild: after any history, lookups say what a snapshot
// built at once from the same resources says.
func TestHistoryAgainstRebuild(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	s := Empty()
	model, was := map[string]*Workload{}, map[bool]int{}
	for step := range 300 {
		txn := s.Edit()
		for range 1 + r.IntN(10) {
			name := fmt.Sprint("p", r.IntN(160))
			w := pod("a", name, fmt.Sprint("n", r.IntN(3)), fmt.Sprint("10.0.0.", r.IntN(40)))
			if r.IntN(5) == 0 {
				w.NetworkMode = workload.NetworkMode_HOST_NETWORK
			}
			if r.IntN(4) == 0 {
				w.Addrs = append(w.Addrs, ip(fmt.Sprint("10.0.0.", r.IntN(40))), ip("fd00::1"))
			}
			if r.IntN(9) == 0 {
				w.Network = "other"
			}
			w.Healthy, w.Capacity = r.IntN(3) > 0, uint32(r.IntN(4))
			w.Services = map[Hostname][]Port{}
			for range r.IntN(3) {
				w.Services[Hostname{"a", fmt.Sprint("s", r.IntN(4))}] = []Port{{Service: 80}}
			}
			if r.IntN(9) > 0 { // becomes large and small in turn
				w.Services[Hostname{"a", "s0"}] = []Port{{Service: 80}}
			}
			if r.IntN(4) < 1+2*(step/50%2) {
				txn.RemoveWorkload(w.UID)
				delete(model, w.UID)
			} else {
				txn.PutWorkload(w)
				model[w.UID] = w
			}
		}
		s = txn.Commit()
		was[s.Endpoints(Hostname{"a", "s0"}).index.Len() > 0]++
		fresh := Empty().Edit()
		for _, w := range model {
			fresh.PutWorkload(w)
		}
		sameLookups(t, s, fresh.Commit())
	}
	if was[true] < 20 || was[false] < 20 {
		t.Errorf("a list of endpoints was large and small %v times", was)
	}
}

func sameLookups(t *testing.T, s, want *Snapshot) {
	t.Helper()
	uids := func(seq iter.Seq[*Workload]) string {
		var out []string
		for w := range seq {
			out = append(out, w.UID)
		}
		slices.Sort(out)
		return fmt.Sprint(out)
	}
	eq := func(what string, a, b any) {
		t.Helper()
		if a != b {
			t.Fatalf("%s: %v, want %v", what, a, b)
		}
	}
	eq("all", uids(s.AllWorkloads()), uids(want.AllWorkloads()))
	eq("addresses", s.addrs.Len(), want.addrs.Len())
	eq("shared", s.WorkloadByAddr("", ip("fd00::1")), want.WorkloadByAddr("", ip("fd00::1")))
	for i := range 60 {
		a, name := ip(fmt.Sprint("10.0.0.", i)), fmt.Sprint("p", i)
		for _, network := range []string{"", "other"} {
			eq("address", s.WorkloadByAddr(network, a), want.WorkloadByAddr(network, a))
		}
		for j := range 3 {
			node := fmt.Sprint("n", j)
			eq("local", s.LocalWorkload(node, "a", name), want.LocalWorkload(node, "a", name))
			eq("node", uids(s.WorkloadsOn(node)), uids(want.WorkloadsOn(node)))
		}
	}
	for i := range 4 {
		h := Hostname{"a", fmt.Sprint("s", i)}
		got, ref := s.Endpoints(h), want.Endpoints(h)
		list := func(e *EndpointSet) iter.Seq[*Workload] {
			return func(yield func(*Workload) bool) {
				for i := range e.Len() {
					if !e.Contains(e.At(i).Workload.UID) || !yield(e.At(i).Workload) {
						return
					}
				}
			}
		}
		eq("endpoints", uids(list(got)), uids(list(ref)))
		eq("healthy", got.Healthy(), ref.Healthy())
		eq("capacity", [2]int{int(got.maxCap), got.maxCapHave}, [2]int{int(ref.maxCap), ref.maxCapHave})
	}
}

func TestPick(t *testing.T) {
	dst := netip.MustParseAddrPort("1.1.1.1:80")
	at := func(name, node, zone string, addrs ...string) *Workload {
		w := serves(pod("a", name, node, addrs...), "a/x", Port{Service: 80, Target: 8080})
		w.Locality = Locality{"r", zone, ""}
		return w
	}
	edit := func(w *Workload, f func(*Workload)) *Workload { f(w); return w }
	from := at("client", "n1", "z1", "10.0.0.100")
	service := func(f func(*Service)) *Service { s := svc("a/x", "1.1.1.1"); f(s); return s }
	std := func(*Service) {}
	for _, tt := range []struct {
		name string
		svc  *Service
		eps  []*Workload
		dst  netip.AddrPort
		want string // "name addr:port ..." of all choices, sorted, or the reason
	}{
		{"none", service(std), nil, dst, ReasonNoEndpoints},
		{"two", service(std), []*Workload{at("p1", "n1", "z1", "10.0.0.1"), at("p2", "n2", "z2", "10.0.0.2")}, dst, "10.0.0.1:8080 10.0.0.2:8080"},
		{"unhealthy is skipped", service(std), []*Workload{at("p1", "n1", "z1", "10.0.0.1"),
			edit(at("p2", "n2", "z2", "10.0.0.2"), func(w *Workload) { w.Healthy = false })}, dst, "10.0.0.1:8080"},
		{"all unhealthy", service(std), []*Workload{edit(at("p2", "n2", "z2", "10.0.0.2"), func(w *Workload) { w.Healthy = false })}, dst, ReasonNoHealthy},
		{"unhealthy allowed", service(func(s *Service) { s.AllowUnhealthy = true }), []*Workload{
			edit(at("p2", "n2", "z2", "10.0.0.2"), func(w *Workload) { w.Healthy = false })}, dst, "10.0.0.2:8080"},
		{"no capacity", service(std), []*Workload{edit(at("p2", "n2", "z2", "10.0.0.2"), func(w *Workload) { w.Capacity = 0 })}, dst, ReasonNoCapacity},
		{"strict", service(func(s *Service) {
			s.Mode, s.Preference = workload.LoadBalancing_STRICT, []Scope{workload.LoadBalancing_NODE}
		}), []*Workload{at("p1", "n1", "z1", "10.0.0.1"), at("p2", "n2", "z2", "10.0.0.2")}, dst, "10.0.0.1:8080"},
		{"strict without match", service(func(s *Service) {
			s.Mode, s.Preference = workload.LoadBalancing_STRICT, []Scope{workload.LoadBalancing_NODE}
		}), []*Workload{at("p2", "n2", "z2", "10.0.0.2")}, dst, ReasonNoPreference},
		{"failover to the best", service(func(s *Service) {
			s.Mode, s.Preference = workload.LoadBalancing_FAILOVER, []Scope{workload.LoadBalancing_REGION, workload.LoadBalancing_ZONE}
		}), []*Workload{edit(at("p1", "n3", "z1", "10.0.0.1"), func(w *Workload) { w.Healthy = false }), at("p2", "n2", "z2", "10.0.0.2"),
			edit(at("p3", "n2", "z1", "10.0.0.3"), func(w *Workload) { w.Locality.Region = "far" })}, dst, "10.0.0.2:8080"},
		{"network is preferred, not required", service(func(s *Service) {
			s.Mode, s.Preference = workload.LoadBalancing_FAILOVER, []Scope{workload.LoadBalancing_NETWORK, workload.LoadBalancing_ZONE}
		}), []*Workload{edit(at("p1", "n3", "z1", "10.0.0.1"), func(w *Workload) { w.Network = "b" }),
			edit(at("p2", "n2", "z2", "10.0.0.2"), func(w *Workload) { w.Network = "b" })}, dst, "10.0.0.1:8080"},
		{"own network before zone", service(func(s *Service) {
			s.Mode, s.Preference = workload.LoadBalancing_FAILOVER, []Scope{workload.LoadBalancing_NETWORK, workload.LoadBalancing_ZONE}
		}), []*Workload{edit(at("p1", "n3", "z1", "10.0.0.1"), func(w *Workload) { w.Network = "b" }), at("p2", "n2", "z2", "10.0.0.2")}, dst, "10.0.0.2:8080"},
		{"service target port", service(func(s *Service) { s.Ports = []Port{{Service: 81, Target: 9090}} }),
			[]*Workload{at("p1", "n1", "z1", "10.0.0.1")}, netip.MustParseAddrPort("1.1.1.1:81"), "10.0.0.1:9090"},
		{"port not served", service(std), []*Workload{at("p1", "n1", "z1", "10.0.0.1")}, netip.MustParseAddrPort("1.1.1.1:81"), ReasonNoPort},
		{"port without target", service(std), []*Workload{serves(pod("a", "p", "n", "10.0.0.1"), "a/x", Port{Service: 80})}, dst, "10.0.0.1:80"},
		{"same family", service(std), []*Workload{at("p1", "n1", "z1", "10.0.0.1", "fd00::1")}, netip.MustParseAddrPort("[fd01::1]:80"), "[fd00::1]:8080"},
		{"other family", service(std), []*Workload{at("p1", "n1", "z1", "10.0.0.1")}, netip.MustParseAddrPort("[fd01::1]:80"), "10.0.0.1:8080"},
		{"service families", service(func(s *Service) { s.Families = workload.IPFamilies_IPV6_ONLY }),
			[]*Workload{at("p1", "n1", "z1", "10.0.0.1", "fd00::1")}, dst, "[fd00::1]:8080"},
		{"family not served", service(func(s *Service) { s.Families = workload.IPFamilies_IPV6_ONLY }),
			[]*Workload{at("p1", "n1", "z1", "10.0.0.1")}, dst, ReasonNoAddress},
		{"no address", service(std), []*Workload{at("p1", "n1", "z1")}, dst, ReasonNoAddress},
		{"host name", service(std), []*Workload{edit(at("p1", "n1", "z1"), func(w *Workload) { w.Hostname = "h" })}, dst, "invalid AddrPort"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			things := []any{tt.svc}
			for _, w := range tt.eps {
				things = append(things, w)
			}
			s := snapshot(things...)
			seen := map[string]bool{}
			for rnd := range uint64(50) {
				c, why := s.Pick(tt.svc, from, tt.dst, rnd)
				if why == "" {
					why = netip.AddrPortFrom(c.Addr, c.Port).String()
				}
				seen[why] = true
			}
			if got := strings.Join(slices.Sorted(maps.Keys(seen)), " "); got != tt.want {
				t.Errorf("picked %q, want %q", got, tt.want)
			}
		})
	}
}

func TestPickOther(t *testing.T) {
	std := svc("a/x", "1.1.1.1")
	failover := svc("a/x", "1.1.1.1")
	failover.Mode, failover.Preference = workload.LoadBalancing_FAILOVER, []Scope{workload.LoadBalancing_ZONE}
	strict := svc("a/x", "1.1.1.1")
	strict.Mode, strict.Preference = workload.LoadBalancing_STRICT, []Scope{workload.LoadBalancing_ZONE}
	from := pod("a", "from", "n", "10.0.0.99")
	from.Locality.Zone = "z1"
	for _, tt := range []struct {
		name string
		svc  *Service
		skip string
		want string
	}{
		{"others of all", std, "p1", "10.0.0.2 10.0.0.3"},
		{"others of the best rank", failover, "p1", "10.0.0.2"},
		{"next rank when the best is skipped", failover, "p1 p2", "10.0.0.3"},
		{"strict stays strict", strict, "p1", "10.0.0.2"},
		{"strict has no next rank", strict, "p1 p2", ReasonNoOther},
		{"none left", std, "p1 p2 p3", ReasonNoOther},
	} {
		t.Run(tt.name, func(t *testing.T) {
			things := []any{tt.svc}
			for i, zone := range []string{"z1", "z1", "z2"} {
				w := serves(pod("a", fmt.Sprint("p", i+1), "n", fmt.Sprint("10.0.0.", i+1)), "a/x", Port{Service: 80})
				w.Locality.Zone = zone
				things = append(things, w)
			}
			s := snapshot(things...)
			seen := map[string]bool{}
			for rnd := range uint64(100) {
				c, why := s.PickOther(tt.svc, from, netip.MustParseAddrPort("1.1.1.1:80"), rnd, func(w *Workload) bool { return strings.Contains(tt.skip, w.Name) })
				if why == "" {
					why = c.Addr.String()
				}
				seen[why] = true
			}
			if got := strings.Join(slices.Sorted(maps.Keys(seen)), " "); got != tt.want {
				t.Errorf("picked %q, want %q", got, tt.want)
			}
		})
	}
}

func TestPickFollowsCapacity(t *testing.T) {
	x := svc("a/x", "1.1.1.1")
	things := []any{x}
	for i, capacity := range []uint32{1, 3, 0, 4} {
		w := serves(pod("a", fmt.Sprint("p", i), "n", fmt.Sprint("10.0.0.", i)), "a/x", Port{Service: 80})
		w.Capacity = capacity
		things = append(things, w)
	}
	s := snapshot(things...)
	for _, mode := range []workload.LoadBalancing_Mode{workload.LoadBalancing_UNSPECIFIED_MODE, workload.LoadBalancing_FAILOVER} {
		x.Mode = mode
		var count [4]int
		const n = 80000
		for rnd := range uint64(n) {
			c, why := s.Pick(x, nil, netip.MustParseAddrPort("1.1.1.1:80"), rnd*0x9e3779b97f4a7c15)
			if why != "" {
				t.Fatal(why)
			}
			count[c.Addr.As4()[3]]++
		}
		for i, share := range []int{1, 3, 0, 4} {
			if want := n / 8 * share; count[i] < want-want/20 || count[i] > want+want/20 {
				t.Errorf("mode %v: endpoint %d drawn %d times, want about %d", mode, i, count[i], want)
			}
		}
	}
}

// largeMesh is n workloads on 1000 nodes in 1000 services, and one service with
// 10k endpoints.
func largeMesh(n int) *Snapshot {
	txn := Empty().Edit()
	for i := range 1000 {
		txn.PutService(svc(fmt.Sprintf("ns/s%d", i), fmt.Sprintf("172.20.%d.%d", i>>8, i&255)))
	}
	big := svc("ns/big", "172.21.0.1")
	txn.PutService(big)
	for i := range n {
		txn.PutWorkload(numbered(i))
	}
	return txn.Commit()
}

func numbered(i int) *Workload {
	w := pod("ns", fmt.Sprintf("p%d", i), fmt.Sprintf("n%d", i%1000), fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255))
	w.Services = map[Hostname][]Port{{"ns", fmt.Sprintf("s%d", i%1000)}: {{Service: 80, Target: 8080}}}
	if i < 10000 {
		w.Services[Hostname{"ns", "big"}] = []Port{{Service: 80, Target: 8080}}
	}
	return w
}

func TestLookupsDoNotAllocate(t *testing.T) {
	s := largeMesh(20000)
	big := s.Service(Hostname{"ns", "big"})
	from := s.Workload("Kubernetes//Pod/ns/p5")
	a, vip, dst := ip("10.0.3.4"), ip("172.20.1.1"), netip.MustParseAddrPort("172.21.0.1:80")
	if got := testing.AllocsPerRun(100, func() {
		w := s.WorkloadByAddr("", a)
		if w == nil || s.Workload(w.UID) != w || s.ServiceByVIP("", vip, "x") == nil || s.ServiceByHostname("s1", "x") == nil ||
			s.LocalWorkload(w.Node, w.Namespace, w.Name) != w || s.Endpoints(big.Host).Len() != 10000 {
			t.Fatal("not found")
		}
		if _, why := s.Pick(big, from, dst, 7); why != "" {
			t.Fatal(why)
		}
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
}

func TestChangeOfOneWorkloadIsSmall(t *testing.T) {
	s := largeMesh(20000)
	w := numbered(777) // also one of 10k endpoints
	w.Healthy = false
	r := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			txn := s.Edit()
			txn.PutWorkload(w)
			txn.Commit()
		}
	})
	if got := r.AllocedBytesPerOp(); got > 32<<10 {
		t.Errorf("%d bytes for one change", got)
	}
}

func BenchmarkLookup100k(b *testing.B) {
	s := largeMesh(100000)
	addrs := make([]netip.Addr, 1024)
	for i := range addrs {
		addrs[i] = numbered(i * 97).Addrs[0]
	}
	vip := ip("172.20.1.1")
	big := s.Service(Hostname{"ns", "big"})
	for _, bb := range []struct {
		name string
		f    func(i int) bool
	}{
		{"workload by address", func(i int) bool { return s.WorkloadByAddr("", addrs[i&1023]) != nil }},
		{"service by VIP", func(i int) bool { return s.ServiceByVIP("", vip, "ns") != nil }},
		{"pick of 10k endpoints", func(i int) bool {
			_, why := s.Pick(big, nil, netip.AddrPortFrom(vip, 80), uint64(i))
			return why == ""
		}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if !bb.f(i) {
					b.Fatal("not found")
				}
			}
		})
	}
}

func BenchmarkChangeOneOf100k(b *testing.B) {
	s := largeMesh(100000)
	for _, bb := range []struct {
		name string
		i    int
	}{{"small service", 54321}, {"service of 10k endpoints", 777}} {
		b.Run(bb.name, func(b *testing.B) {
			w := numbered(bb.i)
			w.Healthy = false
			b.ReportAllocs()
			for b.Loop() {
				txn := s.Edit()
				txn.PutWorkload(w)
				txn.Commit()
			}
		})
	}
}

func BenchmarkBuild100k(b *testing.B) {
	for b.Loop() {
		largeMesh(100000)
	}
}

func FuzzDecode(f *testing.F) {
	for _, a := range []*workload.Address{
		{Type: &workload.Address_Workload{Workload: &workload.Workload{Uid: "u", Namespace: "a", Addresses: [][]byte{{1, 2, 3, 4}},
			Services: map[string]*workload.PortList{"a/b": {Ports: []*workload.Port{{ServicePort: 80}}}}}}},
		{Type: &workload.Address_Service{Service: &workload.Service{Namespace: "a", Hostname: "b",
			Addresses: []*workload.NetworkAddress{{Address: []byte{1, 2, 3, 4}, Length: proto.Uint32(8)}}}}},
	} {
		b, err := proto.Marshal(a)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var a workload.Address
		if proto.Unmarshal(b, &a) != nil {
			return
		}
		txn := Empty().Edit()
		if in := a.GetWorkload(); in != nil {
			w, err := DecodeWorkload(in)
			if err != nil {
				return
			}
			txn.PutWorkload(w)
			s := txn.Commit()
			if s.Workload(w.UID) != w {
				t.Fatal("workload is not found by its uid")
			}
			for h := range w.Services {
				s.Pick(&Service{Host: h}, w, netip.MustParseAddrPort("1.1.1.1:80"), 1)
			}
			txn = s.Edit()
			txn.RemoveWorkload(w.UID)
			if s := txn.Commit(); s.addrs.Len()+s.nodes.Len()+s.endpoints.Len() != 0 {
				t.Fatal("a removed workload left something behind")
			}
		}
		if in := a.GetService(); in != nil {
			svc, err := DecodeService(in)
			if err != nil {
				return
			}
			txn.PutService(svc)
			s := txn.Commit()
			for _, v := range svc.VIPs {
				if s.ServiceByVIP(v.Network, v.Addr, svc.Namespace) != svc {
					t.Fatal("service is not found by its VIP")
				}
			}
			for _, c := range svc.CIDRs {
				if s.ServiceByVIP(c.Network, c.Prefix.Addr(), svc.Namespace) != svc {
					t.Fatal("service is not found by its range")
				}
			}
			txn = s.Edit()
			txn.RemoveService(svc.Host)
			if s := txn.Commit(); s.vips.Len()+s.cidrs.Len()+s.hosts.Len() != 0 || *s.lengths != (prefixLengths{}) {
				t.Fatal("a removed service left something behind")
			}
		}
	})
}
