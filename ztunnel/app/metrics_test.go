package app

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/test/golden"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// Dashboards and alerts depend on these names.
func TestExportedMetrics(t *testing.T) {
	golden.Run(t, "testdata/metrics.txtar", func(t *testing.T, ar *golden.Archive) {
		c := Defaults()
		c.NodeName, c.XDSAddress = "n1", "127.0.0.1:1"
		c.Workers = 2
		reg := prometheus.NewRegistry() // without the language's and the process's own
		a := assemble(c, slog.New(slog.DiscardHandler), reg, nil)
		defer a.node.store.Close()
		a.xdsTLS = serverRoots("XDS_ROOT_CA", c.XDSRootCA, c.XDSAddress, "")
		if _, err := a.xdsClient(reg); err != nil {
			t.Fatal(err)
		}
		ar.Want("metrics", golden.Metrics(reg))

		// The traffic metrics describe themselves only with a value.
		b := &mesh.Workload{UID: "b", Name: "b", Traits: &mesh.Traits{Namespace: "default", Identity: identity.MustParse("spiffe://cluster.local/ns/default/sa/b")}}
		conn, _ := a.node.flow.Begin(t.Context(), flow.Record{Direction: flow.Inbound, Dst: b, Transport: flow.HBONE})
		conn.Describe()
		conn.End(&flow.DenyError{Verdict: policy.Verdict{Policy: "default/p"}, Reason: "test"})
		a.node.flow.Refuse(flow.Record{Direction: flow.Inbound}, flow.Flagged(flow.FlagTLS, errors.New("test")))
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, f := range families {
			if strings.HasPrefix(f.GetName(), "istio_tcp_") || strings.Contains("ambit_ztunnel_decision_seconds ambit_ztunnel_denied_total ambit_ztunnel_early_failures_total ambit_ztunnel_failures_total ambit_ztunnel_metric_overflow_total", f.GetName()) {
				var labels []string
				for _, l := range f.Metric[0].Label {
					labels = append(labels, l.GetName())
				}
				lines = append(lines, f.GetName()+"{"+strings.Join(labels, ",")+"}")
			}
		}
		slices.Sort(lines)
		ar.Want("traffic", strings.Join(lines, "\n"))
	})
}
