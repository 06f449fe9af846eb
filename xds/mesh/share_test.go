package mesh

import (
	"fmt"
	"math"
	"net/netip"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api/workload"
)

// TestSharesAreWhatIsPicked compares with many draws.
func TestSharesAreWhatIsPicked(t *testing.T) {
	dst := netip.MustParseAddrPort("1.1.1.1:80")
	from := pod("a", "from", "n", "10.0.0.99")
	from.Locality.Zone = "z1"
	for _, mode := range []workload.LoadBalancing_Mode{workload.LoadBalancing_UNSPECIFIED_MODE, workload.LoadBalancing_FAILOVER, workload.LoadBalancing_STRICT} {
		x := svc("a/x", "1.1.1.1")
		x.Mode, x.Preference = mode, []Scope{workload.LoadBalancing_ZONE}
		things := []any{x}
		for i, capacity := range []uint32{1, 3, 0, 4} {
			w := serves(pod("a", fmt.Sprint("p", i), "n", fmt.Sprint("10.0.0.", i)), "a/x", Port{Service: 80})
			w.Capacity, w.Locality.Zone = capacity, fmt.Sprint("z", i%2)
			things = append(things, w)
		}
		s := snapshot(things...)
		const n = 40000
		drawn := map[string]float64{}
		for rnd := range uint64(n) {
			c, why := s.Pick(x, from, dst, rnd*0x9e3779b97f4a7c15)
			if why != "" {
				t.Fatal(why)
			}
			drawn[c.Endpoint.Workload.UID] += 1. / n
		}
		sum := 0.
		for c, share := range s.Shares(x, from, dst, nil) {
			sum += share
			if uid := c.Endpoint.Workload.UID; math.Abs(share-drawn[uid]) > 0.02 {
				t.Errorf("%v: the share of %s is %.3f, drawn %.3f", mode, uid, share, drawn[uid])
			}
			delete(drawn, c.Endpoint.Workload.UID)
		}
		if math.Abs(sum-1) > 1e-9 || len(drawn) > 0 {
			t.Errorf("%v: shares add up to %v, without %v", mode, sum, drawn)
		}
	}
}
