package app

import (
	"encoding/json"
	"testing"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/store"
)

// The command line tool of the field reads these keys and values; test/interop
// compares them with a running reference.
func TestDumpSpeaksTheFieldsLanguage(t *testing.T) {
	w, err := mesh.DecodeWorkload(&workload.Workload{
		Uid: "c//Pod/shop/web", Name: "web", Namespace: "shop", Addresses: [][]byte{{10, 0, 0, 1}}, TunnelProtocol: workload.TunnelProtocol_HBONE,
		Locality: &workload.Locality{Region: "eu", Zone: "1"}, Services: map[string]*workload.PortList{"shop/web.shop.svc.cluster.local": {Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080}}}},
		ApplicationTunnel: &workload.ApplicationTunnel{Protocol: workload.ApplicationTunnel_PROXY, Port: 15088}, WorkloadType: workload.WorkloadType_POD,
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := mesh.DecodeService(&workload.Service{
		Name: "web", Namespace: "shop", Hostname: "web.shop.svc.cluster.local", IpFamilies: workload.IPFamilies_DUAL, Canonical: true,
		Addresses:     []*workload.NetworkAddress{{Address: []byte{10, 96, 0, 1}}},
		LoadBalancing: &workload.LoadBalancing{Mode: workload.LoadBalancing_FAILOVER, RoutingPreference: []workload.LoadBalancing_Scope{workload.LoadBalancing_NETWORK, workload.LoadBalancing_ZONE}},
	})
	if err != nil {
		t.Fatal(err)
	}
	exact := func(s string) *security.StringMatch {
		return &security.StringMatch{MatchType: &security.StringMatch_Exact{Exact: s}}
	}
	p, err := policy.Compile(&security.Authorization{Name: "p", Namespace: "shop", Scope: security.Scope_WORKLOAD_SELECTOR, Action: security.Action_DENY,
		Rules: []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{{
			Principals: []*security.StringMatch{exact("td/ns/a/sa/b")}, NotPrincipals: []*security.StringMatch{{MatchType: &security.StringMatch_Presence{Presence: &emptypb.Empty{}}}},
			SourceIps: []*security.Address{{Address: []byte{10, 0, 0, 0}, Length: 8}}, DestinationPorts: []uint32{80},
			ServiceAccounts: []*security.ServiceAccountMatch{{Namespace: "a", ServiceAccount: "b"}}}}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	view := store.New(store.Config{}).View()
	tests := []struct {
		name string
		v    any
		want string
	}{
		{"workload", workloadDump(w), `{"workloadIps":["10.0.0.1"],"protocol":"HBONE","networkMode":"Standard","uid":"c//Pod/shop/web","name":"web","namespace":"shop",` +
			`"trustDomain":"cluster.local","serviceAccount":"default","workloadType":"pod","applicationTunnel":{"protocol":"PROXY","port":15088},"status":"Healthy",` +
			`"clusterId":"Kubernetes","locality":{"region":"eu","zone":"1","subzone":""},"services":["shop/web.shop.svc.cluster.local"],"capacity":1}`},
		{"service", serviceDump(view, s), `{"name":"web","namespace":"shop","hostname":"web.shop.svc.cluster.local","vips":["/10.96.0.1"],"ports":{},"endpoints":{},` +
			`"subjectAltNames":[],"loadBalancer":{"routingPreferences":["Network","Zone"],"mode":"Failover","healthPolicy":"OnlyHealthy"},"ipFamilies":"Dual","canonical":true,"visibility":"Public"}`},
		{"policy", policyDump(p), `{"name":"p","namespace":"shop","scope":"WorkloadSelector","action":"Deny","rules":[[[{"serviceAccounts":[{"namespace":"a","serviceAccount":"b"}],` +
			`"principals":[{"Exact":"td/ns/a/sa/b"}],"notPrincipals":[{"Presence":[]}],"sourceIps":["10.0.0.0/8"],"destinationPorts":[80]}]]],"dryRun":false}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, err := json.Marshal(tt.v)
			if err != nil {
				t.Fatal(err)
			}
			if string(b) != tt.want {
				t.Errorf("got  %s\nwant %s", b, tt.want)
			}
		})
	}
}
