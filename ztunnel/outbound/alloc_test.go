//go:build !race

package outbound

import (
	"net/netip"
	"testing"

	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// TestRouteAlloc: the budget is the peers' slice, the authority, and what the
// choice of an endpoint keeps.
func TestRouteAlloc(t *testing.T) {
	snap, src := twoEndpoints()
	r := Request{Src: src, Dst: netip.MustParseAddrPort("10.96.0.1:80"), Rand: 3}
	if n := testing.AllocsPerRun(1000, func() {
		if p, err := Route(snap, r); err != nil || p.Transport != flow.HBONE {
			t.Fatal(p, err)
		}
	}); n > 5 {
		t.Errorf("%v allocations", n)
	}
	h := NewHealth(nil)
	if n := testing.AllocsPerRun(1000, func() {
		if h.avoid("pod") != nil {
			t.Fatal("nothing failed")
		}
	}); n > 0 {
		t.Errorf("asking for failures: %v allocations", n)
	}
}

func BenchmarkRoute(b *testing.B) {
	snap, src := twoEndpoints()
	r := Request{Src: src, Dst: netip.MustParseAddrPort("10.96.0.1:80"), Rand: 3}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Route(snap, r); err != nil {
			b.Fatal(err)
		}
	}
}
