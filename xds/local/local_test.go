package local

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/store"
)

const example = `
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: app
  trustDomain: cluster.local
  network: ""
  node: local
  workloadIps: ["127.0.0.1", "fd00::1"]
  protocol: HBONE
  networkMode: Standard
  status: Unhealthy
  authorizationPolicies: [default/only-b]
  applicationTunnel: {protocol: PROXY, port: 15088}
  networkGateway: {destination: "n2/10.9.9.9", hboneMtlsPort: 15008}
  locality: {region: r, zone: z, subzone: s}
  workloadType: Job
  workloadName: w
  canonicalName: c
  canonicalRevision: v1
  clusterId: c1
  nativeTunnel: true
  capacity: 3
  services:
    default/svc.default.svc.cluster.local: {80: 8080, 81: 0}
- {uid: b, name: b, namespace: default, serviceAccount: b, trustDomain: td, hostname: b.example, protocol: tcp, services: {}}
policies:
- name: only-b
  namespace: default
  scope: WorkloadSelector
  action: Allow
  rules:
  - - - principals: [{Exact: td/ns/default/sa/b}]
        destinationPorts: [80]
    - - sourceIps: [10.0.0.0/8, 127.0.0.2]
- {name: strict, namespace: x, scope: Namespace, action: Deny, dryRun: true, rules: [[[{notPrincipals: [{Presence: []}], serviceAccounts: [{namespace: n, serviceAccount: s}]}]]]}
services:
- name: svc
  namespace: default
  hostname: svc.default.svc.cluster.local
  vips: [/127.10.0.1, n/10.0.0.1]
  cidrVips: [/10.1.0.0/16]
  ports: {80: 8080}
  subjectAltNames: ["spiffe://td/ns/x/sa/y"]
  waypoint: {destination: default/way.default.svc.cluster.local, hboneMtlsPort: 15008}
  weightedWaypoints: [{destination: /10.0.0.9, hboneMtlsPort: 15008, weight: 2}]
  loadBalancer: {routingPreferences: [Network, Region, Zone], mode: Failover, healthPolicy: AllowAll}
  ipFamilies: Dual
  canonical: true
  visibility: Namespace
  endpoints: {}
`

func load(t *testing.T, text string) *store.View {
	t.Helper()
	deltas, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	s := store.New(store.Config{})
	defer s.Close()
	for _, d := range deltas {
		if rejects := s.Apply(d); len(rejects) > 0 {
			t.Fatalf("refused: %v", rejects)
		}
	}
	return s.View()
}

func TestTheWholeFormat(t *testing.T) {
	v := load(t, example)
	if !v.Synced || v.Mesh.Workloads() != 2 || v.Mesh.Services() != 1 || v.Policies.Len() != 2 {
		t.Fatalf("%d workloads, %d services, %d policies", v.Mesh.Workloads(), v.Mesh.Services(), v.Policies.Len())
	}
	w := v.Mesh.LocalWorkload("local", "default", "local")
	if got := fmt.Sprintln(w.Identity, w.Addrs, w.Tunnel, w.Healthy, w.Policies, w.AppTunnel.Port, w.NetworkGateway.Network, w.NetworkGateway.Addr,
		w.Locality, w.WorkloadType, w.Capacity, w.NativeTunnel, w.ClusterID); got !=
		"spiffe://cluster.local/ns/default/sa/app [127.0.0.1 fd00::1] HBONE false [default/only-b] 15088 n2 10.9.9.9 {r z s} JOB 3 true c1\n" {
		t.Error(got)
	}
	s := v.Mesh.ServiceByVIP("", netip.MustParseAddr("127.10.0.1"), "default")
	if s == nil || v.Mesh.ServiceByVIP("", netip.MustParseAddr("10.1.2.3"), "default") != s || v.Mesh.ServiceByVIP("", netip.MustParseAddr("10.1.2.3"), "other") != nil {
		t.Fatal("the service is not found by its VIPs, or by others than its namespace")
	}
	if got := fmt.Sprintln(len(s.Ports), s.Ports[0].Target, s.Waypoint.Host, s.WeightedWaypoints[0].Gateway.Addr, s.WeightedWaypoints[0].Weight, s.Mode, s.Preference, s.AllowUnhealthy, s.Families, s.Canonical); got !=
		"1 8080 default/way.default.svc.cluster.local 10.0.0.9 2 FAILOVER [NETWORK REGION ZONE] true DUAL true\n" {
		t.Error(got)
	}
	if n := v.Mesh.Endpoints(mesh.Hostname{Namespace: "default", Name: "svc.default.svc.cluster.local"}).Len(); n != 1 {
		t.Errorf("%d endpoints", n)
	}
	b := identity.MustParse("spiffe://td/ns/default/sa/b")
	for _, tt := range []struct {
		src   string
		port  uint16
		allow bool
	}{{"10.1.1.1", 80, true}, {"127.0.0.2", 80, true}, {"11.1.1.1", 80, false}, {"10.1.1.1", 81, false}} {
		got := v.Policies.Authorize("default", w.Policies, policy.Conn{Peer: b, Src: netip.AddrPortFrom(netip.MustParseAddr(tt.src), 1),
			Dst: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), tt.port)})
		if got.Allowed != tt.allow {
			t.Errorf("%s → %d: %+v", tt.src, tt.port, got)
		}
	}
}

func TestEmptyFile(t *testing.T) {
	if v := load(t, "# nothing\n"); !v.Synced || v.Mesh.Workloads() != 0 {
		t.Error("an empty file is an empty mesh")
	}
}

func TestMistakesAreNamed(t *testing.T) {
	const w = "workloads: [{uid: u, namespace: n, serviceAccount: s, trustDomain: td, services: {}, "
	for _, tt := range []struct{ text, want string }{
		{"workload: []", "field workload not found"},
		{"workloads: [{uid: u, namespace: n, serviceAccount: s, services: {}}]", `workload "u": trustDomain is missing`},
		{"workloads: [{uid: u, namespace: n, trustDomain: td, services: {}}]", "serviceAccount is missing"},
		{"workloads: [{uid: u, namespace: n, serviceAccount: s, trustDomain: td}]", "services: {}"},
		{w + "workloadIps: [x]}]", "x"},
		{w + "protocol: UDP}]", `protocol "UDP": want one of hbone, tcp`},
		{w + "waypoint: {destination: x}}]", "waypoint: destination"},
		{w + "applicationTunnel: {port: 1}}]", "applicationTunnel.protocol"},
		{w + "capasity: 1}]", "field capasity not found"},
		{strings.TrimSuffix(w, ", ") + "}, {uid: u, namespace: n, serviceAccount: s, trustDomain: td, services: {x: {}}}]", `"x" is not namespace/hostname`},
		{strings.TrimSuffix(w, ", ") + "}, {uid: u, namespace: n, serviceAccount: s, trustDomain: td, services: {}}]", "is there twice"},
		{"services: [{namespace: n, hostname: h, vips: [10.0.0.1]}]", "/10.0.0.1"},
		{"services: [{namespace: n, hostname: h, cidrVips: [/10.0.0.1]}]", "network/address/length"},
		{"services: [{namespace: n, hostname: h, ports: {70000: 1}}]", "70000"},
		{"services: [{namespace: n, hostname: h, endpoints: {a: {}}}]", "`services` of its workloads"},
		{"services: [{hostname: h}]", "must be set"},
		{"policies: [{name: p, namespace: n, action: Allow}]", "scope"},
		{"policies: [{name: p, namespace: n, scope: Global, action: Audit}]", "action"},
		{"policies: [{name: p, namespace: n, scope: Global, action: Deny, rules: [[[{sourceIps: [10.0.0.0/33]}]]]}]", "sourceIps"},
		{"policies: [{name: p, namespace: n, scope: Global, action: Deny, rules: [[[{principals: [{Exact: a, Prefix: b}]}]]]}]", "exactly one"},
		{"policies: [{name: p, namespace: n, scope: Global, action: Deny, rules: [[[{principals: [{}]}]]]}]", "exactly one"},
		{"policies: [{name: p, namespace: n, scope: Global, action: Deny, rules: [[[{notPrincipal: []}]]]}]", "field notPrincipal not found"},
		{"a: 1\n---\nb: 1", "a"},
		{"services: []\n---\nservices: []", "more than one document"},
	} {
		deltas, err := Parse([]byte(tt.text))
		if err == nil || !strings.Contains(err.Error(), tt.want) || deltas != nil {
			t.Errorf("%s:\n%v, want %q", tt.text, err, tt.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(example))
	f.Add([]byte("policies: [{rules: [[[{principals: [{Presence: []}]}]]]}]"))
	f.Add([]byte("workloads: &a [*a]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		deltas, err := Parse(b)
		if err != nil && deltas != nil {
			t.Fatal("a refused file has content")
		}
		s := store.New(store.Config{})
		defer s.Close()
		for _, d := range deltas {
			s.Apply(d) // may refuse, must not break
		}
	})
}
