package inbound

import (
	"net/netip"
	"testing"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

func TestLikelyService(t *testing.T) {
	host := func(name string) mesh.Hostname { return mesh.Hostname{Namespace: "shop", Name: name} }
	vip := []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.1")}}
	edit := mesh.Empty().Edit()
	for _, s := range []*mesh.Service{{Name: "headless", Namespace: "shop", Host: host("a-headless")}, {Name: "b", Namespace: "shop", Host: host("b"), VIPs: vip}, {Name: "c", Namespace: "shop", Host: host("c"), VIPs: vip}} {
		edit.PutService(s)
	}
	m := edit.Commit()
	to := func(target uint16) []mesh.Port { return []mesh.Port{{Service: 80, Target: target}} }
	tests := []struct {
		name     string
		services map[mesh.Hostname][]mesh.Port
		want     string
	}{
		{"none", nil, ""},
		{"the only one", map[mesh.Hostname][]mesh.Port{host("c"): to(8080)}, "c"},
		{"headless", map[mesh.Hostname][]mesh.Port{host("a-headless"): to(8080)}, "headless"},
		{"an address before none", map[mesh.Hostname][]mesh.Port{host("a-headless"): to(8080), host("c"): to(8080)}, "c"},
		{"then by name", map[mesh.Hostname][]mesh.Port{host("c"): to(8080), host("b"): to(8080)}, "b"},
		{"another port", map[mesh.Hostname][]mesh.Port{host("b"): to(9090), host("c"): to(8080)}, "c"},
		{"service not known yet", map[mesh.Hostname][]mesh.Port{host("d"): to(8080)}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := ""
			if s := likelyService(m, &mesh.Workload{Traits: &mesh.Traits{Services: tt.services}}, 8080); s != nil {
				got = s.Name
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
