//go:build !race

package store

import (
	"runtime"
	"testing"

	"github.com/ambit-mesh/ambit/xds/client"
)

// What comes again as it was is not decoded: a resend allocates no more for a thousand resources than for ten.
func TestResendAllocs(t *testing.T) {
	s := newTestStore(t)
	addresses, policies := wholeMesh(t, 1000)
	for _, d := range []client.Delta{policies, addresses} {
		if r := s.Apply(d); len(r) > 0 {
			t.Fatal(r[0])
		}
	}
	if n := testing.AllocsPerRun(10, func() { s.Apply(addresses) }); n > 20 {
		t.Errorf("%v allocations for %d known resources, want at most 20", n, len(addresses.Added))
	}
}

// What a workload takes that is known, its share of the services and of all indices included.
func TestKnownWorkloadAllocs(t *testing.T) {
	const n, want = 20_000, 320 // bytes; 980 when each had its traits to itself and indices kept keys
	addresses, policies := wholeMesh(t, n)
	s, before := New(Config{Node: "n1"}), inUse()
	defer s.Close()
	for _, d := range []client.Delta{policies, addresses} {
		if r := s.Apply(d); len(r) > 0 {
			t.Fatal(r[0])
		}
	}
	if got := (inUse() - before) / n; got > want {
		t.Errorf("a workload takes %d bytes, want at most %d", got, want)
	}
	runtime.KeepAlive(addresses)
}
