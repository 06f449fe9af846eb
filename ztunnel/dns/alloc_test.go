//go:build !race

package dns

import (
	"testing"

	mdns "github.com/miekg/dns"
)

// TestAllocOfAQuery: names of the mesh cost no memory.
func TestAllocOfAQuery(t *testing.T) {
	srv := fixedServer()
	for _, tc := range []struct {
		name  string
		qtype uint16
		want  float64
	}{
		{"web.shop.svc.cluster.local.", mdns.TypeA, 0},
		{"db.shop.svc.cluster.local.", mdns.TypeAAAA, 0},
		{"api.example.com.shop.svc.cluster.local.", mdns.TypeA, 0},
		{"www.foreign.test.", mdns.TypeA, 0},
	} {
		raw := rawQuestion(t, tc.name, tc.qtype)
		var m message
		var a answer
		out := make([]byte, 0, 4096)
		if got := testing.AllocsPerRun(200, func() { srv.datagram(raw, &m, &a, out[:0]) }); got > tc.want {
			t.Errorf("%s: %v allocations, want %v", tc.name, got, tc.want)
		}
	}
}

// TestAllocOfARoundTrip: nor does it cost any to learn where a query was sent to
// and to answer from there.
func TestAllocOfARoundTrip(t *testing.T) {
	b := newRoundTrip(t)
	if got := testing.AllocsPerRun(500, func() { b.ask(t) }); got > 0 {
		t.Errorf("%v allocations, want none", got)
	}
}
