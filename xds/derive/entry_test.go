package derive

import (
	"fmt"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/xds/crd"
	"github.com/ambit-mesh/ambit/xds/dir"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

// Names that Kubernetes gives to a namespace cannot be taken from it, whether or
// not there is something of that name.
func TestNamesOfOtherNamespaces(t *testing.T) {
	for _, tt := range []struct {
		ns, host string
		taken    bool
	}{
		{"evil", "db.shop.svc.cluster.local", true},
		{"evil", "web-0.web.shop.svc.cluster.local", true},
		{"evil", "*.shop.svc.cluster.local", true},
		{"evil", "*.svc.cluster.local", true},
		{"evil", "*.cluster.local", true},
		{"evil", "*.local", true},
		{"evil", "*-a.svc.cluster.local", true},
		{"shop", "db.shop.svc.cluster.local", false},
		{"shop", "*.shop.svc.cluster.local", false},
		{"shop", "db.myshop.svc.cluster.local", true},
		{"istio-system", "db.shop.svc.cluster.local", false},
		{"evil", "example.com", false},
		{"evil", "*.com", false},
		{"evil", "svc.cluster.local", false},
		{"evil", "db.shop.svc.cluster.local.example.com", false},
		{"evil", "db.shop.mysvc.cluster.local", false},
	} {
		e := New(Config{})
		r := e.Apply(upsert(testEntry(tt.ns, "e", 0, nil, 1, tt.host)))
		svc := snapshot(t, e).Service(mesh.Hostname{Namespace: tt.ns, Name: tt.host})
		if !svc.VisibleTo(tt.ns) || svc.VisibleTo("third") == tt.taken {
			t.Errorf("%s by namespace %s: visible to others %v", tt.host, tt.ns, svc.VisibleTo("third"))
		}
		if said := strings.Contains(r.Status[0].Message, "are their namespace's"); said != tt.taken {
			t.Errorf("%s by namespace %s: status %q", tt.host, tt.ns, r.Status[0].Message)
		}
	}
	// Nor by being the oldest of several.
	e := New(Config{})
	const host = "db.shop.svc.cluster.local"
	e.Apply(upsert(testEntry("evil", "e", 0, nil, 1, host)))
	e.Apply(upsert(testEntry("shop", "e", 1, nil, 2, host)))
	if svc := snapshot(t, e).ServiceByHostname(host, "third"); svc == nil || svc.Namespace != "shop" || !svc.Canonical {
		t.Errorf("clients elsewhere reach %+v", svc)
	}
	sameAsFromScratch(t, e)
}

// A Service is the holder of its name in its own namespace only.
func TestNameOfAServiceElsewhere(t *testing.T) {
	const host = "db.shop.svc.cluster.local"
	e := New(Config{})
	e.Apply(upsert(testService("shop", "db", "a", 1)))
	e.Apply(upsert(testEntry("shop", "e", 0, nil, 1, host)))
	e.Apply(upsert(testEntry("own", "e", 0, nil, 2, host)))
	m := snapshot(t, e)
	for ns, want := range map[string]string{"shop": "db", "own": "e", "third": "db"} {
		if svc := m.ServiceByHostname(host, ns); svc == nil || svc.Name != want {
			t.Errorf("clients in %s reach %+v, want %s", ns, svc, want)
		}
	}
}

// BenchmarkLargeEntry is an entry of as many endpoints as there may be, which
// loses its first one.
func BenchmarkLargeEntry(b *testing.B) {
	object := func(from int) *dir.Object {
		o := testEntry("n", "large", 0, nil, 0, "large.example.com")
		se := o.Value.(*crd.ServiceEntry)
		se.Spec.Endpoints = nil
		for i := from; i < 10_000; i++ {
			se.Spec.Endpoints = append(se.Spec.Endpoints, &crd.WorkloadEntrySpec{Address: fmt.Sprintf("10.1.%d.%d", i>>8, i&255)})
		}
		return o
	}
	e, whole, less := New(Config{}), upsert(object(0)), upsert(object(1))
	for b.Loop() {
		e.Apply(whole)
		e.Apply(less)
	}
}
