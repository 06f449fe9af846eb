package mesh

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
)

func named(w *Workload, names ...string) *Workload {
	w.DNSNames = names
	return w
}

// TestNamesAgainstRebuild changes workloads at random and compares the index
// with what their names say.
func TestNamesAgainstRebuild(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	s := Empty()
	model := map[string]*Workload{}
	name := func() string { return fmt.Sprintf("web-%d.web.shop.svc.cluster.local", r.IntN(6)) }
	for step := range 2000 {
		txn := s.Edit()
		for range 1 + r.IntN(3) {
			w := pod("shop", fmt.Sprintf("web-%d", r.IntN(8)), "n1", "10.0.0.1")
			if r.IntN(2) == 0 {
				w.Tunnel = workload.TunnelProtocol_NONE
			}
			for range r.IntN(3) {
				if n := name(); !w.HasDNSName(n) {
					w.DNSNames = append(w.DNSNames, n)
				}
			}
			if r.IntN(4) == 0 {
				txn.RemoveWorkload(w.UID)
				delete(model, w.UID)
			} else {
				txn.PutWorkload(w)
				model[w.UID] = w
			}
		}
		before := s
		s = txn.Commit()
		if step%100 == 0 && before != Empty() && before.Workloads() != len(slices.Collect(before.AllWorkloads())) {
			t.Fatal("an earlier snapshot changed")
		}
		want := map[string][]*Workload{}
		for _, w := range model {
			for _, n := range w.DNSNames {
				want[n] = append(want[n], w)
			}
		}
		for n, list := range want {
			slices.SortFunc(list, func(a, b *Workload) int {
				if a.betterAt(b) {
					return -1
				}
				return 1
			})
			if got := s.WorkloadsByDNSName(n); !slices.Equal(got, list) {
				t.Fatalf("step %d: %s has %d workloads, want %d", step, n, len(got), len(list))
			}
		}
		if got := s.names.Len(); got != len(want) {
			t.Fatalf("step %d: %d names indexed, want %v", step, got, slices.Sorted(maps.Keys(want)))
		}
	}
}

func TestServicesByHostname(t *testing.T) {
	s := snapshot(svc("a/web.example.com", "10.0.0.1"), svc("b/web.example.com", "10.0.0.2"), svc("a/*.example.com", "10.0.0.3"))
	var got []string
	for _, v := range s.ServicesByHostname("web.example.com") {
		got = append(got, v.Namespace)
	}
	if !slices.Equal(got, []string{"a", "b"}) || len(s.ServicesByHostname("*.example.com")) != 1 || s.ServicesByHostname("example.com") != nil {
		t.Errorf("services of web.example.com are in %v, want a, b", got)
	}
}

func TestPortNames(t *testing.T) {
	x, err := proto.Marshal(&ambit.ServiceExtension{PortNames: []*ambit.ServiceExtension_PortName{{Name: "http", Port: 80}}})
	if err != nil {
		t.Fatal(err)
	}
	in := &workload.Service{Namespace: "shop", Hostname: "web.shop.svc.cluster.local", Extensions: []*workload.Extension{
		{Name: api.ServiceExtension, Config: &anypb.Any{TypeUrl: api.ServiceExtensionType, Value: x}},
	}}
	s, err := DecodeService(in)
	if err != nil || !slices.Equal(s.PortNames, []PortName{{"http", 80}}) {
		t.Fatalf("decoded %v, %v", s, err)
	}
	in.Extensions[0].Config.Value = []byte{0xff}
	if _, err := DecodeService(in); err == nil {
		t.Error("a broken extension was taken")
	}
}

func namedMesh(n int) *Snapshot {
	txn := Empty().Edit()
	for i := range n {
		txn.PutWorkload(named(pod("shop", fmt.Sprintf("web-%d", i), "n1"), fmt.Sprintf("web-%d.web.shop.svc.cluster.local", i)))
	}
	return txn.Commit()
}

func TestNameLookupsAllocNothing(t *testing.T) {
	s := namedMesh(1000)
	if n := testing.AllocsPerRun(100, func() {
		if s.WorkloadsByDNSName("web-7.web.shop.svc.cluster.local") == nil || s.ServicesByHostname("web.shop") != nil {
			t.Error("lookup is wrong")
		}
	}); n != 0 {
		t.Errorf("lookups make %v allocations", n)
	}
}

func BenchmarkChangeOneNameOf100k(b *testing.B) {
	s := namedMesh(100_000)
	w := [2]*Workload{}
	for i := range w {
		w[i] = named(pod("shop", "web-7", "n1"), "web-7.web.shop.svc.cluster.local", fmt.Sprintf("other-%d", i))
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		txn := s.Edit()
		txn.PutWorkload(w[i%2])
		s = txn.Commit()
	}
}
