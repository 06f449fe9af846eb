package mesh

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api/workload"
)

// places of endpoints, from the client's own node outwards.
var places = []struct {
	name                                          string
	network, cluster, region, zone, subzone, node string
}{
	{"node", "n", "c", "r", "z", "s", "n1"},
	{"subzone", "n", "c", "r", "z", "s", "n2"},
	{"zone", "n", "c", "r", "z", "s2", "n3"},
	{"region", "n", "c", "r", "z2", "s2", "n4"},
	{"network", "n", "c", "r2", "z2", "s2", "n5"},
	{"cluster", "n", "c2", "r2", "z2", "s2", "n6"},
	{"far", "n2", "c2", "r2", "z2", "s2", "n7"},
}

func placed(i int) *Workload {
	p := places[i]
	w := serves(pod("a", p.name, p.node, fmt.Sprint("10.0.0.", i+1)), "a/x", Port{Service: 80})
	w.Network, w.ClusterID, w.Locality = p.network, p.cluster, Locality{p.region, p.zone, p.subzone}
	if p.network != "n" {
		w.NetworkGateway = &GatewayAddress{Network: p.network, Addr: netip.MustParseAddr("10.9.0.1"), HBONEPort: 15008}
	}
	return w
}

// picked are the places that a client on the first one's node gets, sorted.
func picked(svc *Service, eps []*Workload) string {
	things := []any{svc}
	for _, w := range eps {
		things = append(things, w)
	}
	s, from := snapshot(things...), placed(0)
	from.Name, from.UID = "client", "c//Pod/a/client"
	seen := map[string]bool{}
	for rnd := range uint64(200) {
		c, why := s.Pick(svc, from, netip.MustParseAddrPort("1.1.1.1:80"), rnd*0x9e3779b97f4a7c15)
		if why != "" {
			return why
		}
		seen[c.Endpoint.Workload.Name] = true
	}
	return strings.Join(slices.Sorted(maps.Keys(seen)), " ")
}

func preferring(mode workload.LoadBalancing_Mode, scopes ...Scope) *Service {
	x := svc("a/x", "1.1.1.1")
	x.Mode, x.Preference = mode, scopes
	return x
}

// TestStrictByScope: each scope is one field, compared by itself.
func TestStrictByScope(t *testing.T) {
	var all []*Workload
	for i := range places {
		all = append(all, placed(i))
	}
	for scope, want := range map[Scope]string{
		workload.LoadBalancing_NODE:    "node",
		workload.LoadBalancing_SUBZONE: "node subzone",
		workload.LoadBalancing_ZONE:    "node subzone zone",
		workload.LoadBalancing_REGION:  "node region subzone zone",
		workload.LoadBalancing_CLUSTER: "network node region subzone zone",
		workload.LoadBalancing_NETWORK: "cluster network node region subzone zone",
	} {
		if got := picked(preferring(workload.LoadBalancing_STRICT, scope), all); got != want {
			t.Errorf("%v: %s, want %s", scope, got, want)
		}
	}
}

// TestFailoverGoesOutwards: as the near endpoints go, the next nearest serve:
// what PreferSameNode is translated to.
func TestFailoverGoesOutwards(t *testing.T) {
	x := preferring(workload.LoadBalancing_FAILOVER, workload.LoadBalancing_NETWORK, workload.LoadBalancing_REGION,
		workload.LoadBalancing_ZONE, workload.LoadBalancing_SUBZONE, workload.LoadBalancing_NODE)
	for i, want := range []string{"node", "subzone", "zone", "region", "cluster network", "cluster", "far"} {
		for _, how := range []string{"gone", "unhealthy"} {
			var eps []*Workload
			for j := range places {
				w := placed(j)
				if j < i && how == "gone" {
					continue
				}
				w.Healthy = j >= i
				eps = append(eps, w)
			}
			if got := picked(x, eps); got != want {
				t.Errorf("nearest %d %s: %s, want %s", i, how, got, want)
			}
		}
	}
	x.AllowUnhealthy = true
	near := placed(0)
	near.Healthy = false
	if got := picked(x, []*Workload{near, placed(1)}); got != "node" {
		t.Errorf("where health does not count: %s, want the nearest", got)
	}
}

// TestFailoverFollowsCapacity: within the best rank, endpoints that have none
// are not drawn.
func TestFailoverFollowsCapacity(t *testing.T) {
	x := preferring(workload.LoadBalancing_FAILOVER, workload.LoadBalancing_ZONE)
	idle, busy := placed(0), placed(1)
	idle.Capacity = 0
	if got := picked(x, []*Workload{idle, busy, placed(3)}); got != "subzone" {
		t.Errorf("%s, want the one of the zone that has capacity", got)
	}
}
