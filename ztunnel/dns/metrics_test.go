package dns

import (
	"maps"
	"slices"
	"testing"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

// TestSeriesEndWithTheirLastPod: what a node exports does not grow with the pods
// that it ever had.
func TestSeriesEndWithTheirLastPod(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	m, s := NewMetrics(reg), shop()
	server := func(service string) (*Server, *mesh.Workload) {
		w := endpoint("shop", service, "10.8.0.2", "")
		return NewServer(Config{Resolver: NewResolver(ResolverConfig{}), Namespace: "shop", Metrics: m,
			Mesh: func() *mesh.Snapshot { return s }, Known: func() *mesh.Workload { return w }}), w
	}
	ask := func(srv *Server) {
		var msg message
		var a answer
		srv.datagram(rawQuestion(t, "web.", mdns.TypeA), &msg, &a, nil)
	}
	want := func(why string, want map[string]float64) {
		t.Helper()
		got := map[string]float64{}
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, series := range f.GetMetric() {
				if f.GetName() == "istio_dns_requests_total" {
					i := slices.IndexFunc(series.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName() == "source_canonical_service" })
					got[series.GetLabel()[i].GetValue()] = series.GetCounter().GetValue()
				}
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", why, got, want)
		}
	}
	a, _ := server("one")
	b, _ := server("one")
	c, _ := server("two")
	for _, srv := range []*Server{a, b, c, c} {
		ask(srv)
	}
	want("three pods", map[string]float64{"one": 2, "two": 2})
	a.Close()
	a.Close()
	want("one of two is gone", map[string]float64{"one": 2, "two": 2})
	b.Close()
	want("the last is gone", map[string]float64{"two": 2})
	d, w := server("three")
	ask(d)
	w.CanonicalName = "renamed"
	ask(d)
	want("a pod of another service", map[string]float64{"two": 2, "renamed": 1})
	d.Close()
	c.Close()
	want("all are gone", map[string]float64{})
}
