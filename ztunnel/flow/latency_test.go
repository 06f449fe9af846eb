package flow

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/ambit-mesh/ambit/xds/store"
)

// TestDecisionsAreTimed: from Begin to the first decision, whatever that is, by direction.
func TestDecisionsAreTimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		table := New(Config{Registerer: reg, View: func() *store.View { return view(1, dst) }})
		for _, took := range []time.Duration{10 * time.Microsecond, 11 * time.Microsecond, 3 * time.Second, time.Minute} {
			c, _ := table.Begin(t.Context(), Record{Direction: Outbound})
			time.Sleep(took)
			c.Decided()
			time.Sleep(time.Hour) // another endpoint
			c.Decided()
			c.End(nil)
		}
		for _, uid := range []string{dst.UID, "nobody"} { // allowed and denied
			c, _ := table.Begin(t.Context(), Record{Direction: Inbound})
			time.Sleep(2 * time.Millisecond)
			_ = c.Authorize(Subject{UID: uid}) // both are decisions
			c.End(nil)
		}
		c, _ := table.Begin(t.Context(), Record{Direction: Inbound})
		c.End(errors.New("left before")) // none

		out, in := decisions(t, reg, "source"), decisions(t, reg, "destination")
		for bound, want := range map[float64]uint64{10e-6: 1, 25e-6: 2, 2.5: 2, 5: 3, 10: 3} {
			if got := atMost(out, bound); got != want {
				t.Errorf("outbound, at most %v s: %d, want %d", bound, got, want)
			}
		}
		if n, sum := out.GetSampleCount(), out.GetSampleSum(); n != 4 || sum < 63 || sum > 64 {
			t.Errorf("outbound: %d that took %v s together", n, sum)
		}
		if n := in.GetSampleCount(); n != 2 || atMost(in, 0.001) != 0 || atMost(in, 0.0025) != 2 {
			t.Errorf("inbound: %v", in)
		}
	})
}

func decisions(t *testing.T, reg *prometheus.Registry, reporter string) *dto.Histogram {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "ambit_ztunnel_decision_seconds" && m.GetLabel()[0].GetValue() == reporter {
				return m.GetHistogram()
			}
		}
	}
	t.Fatalf("no decisions of reporter %q", reporter)
	return nil
}

func atMost(h *dto.Histogram, bound float64) uint64 {
	for _, b := range h.GetBucket() {
		if b.GetUpperBound() == bound {
			return b.GetCumulativeCount()
		}
	}
	return 0
}
