package scenario

import (
	"slices"
	"testing"

	"github.com/ambit-mesh/ambit/perf/report"
	"github.com/ambit-mesh/ambit/perf/topo"
)

func TestBarsAreAboutWhatIsMeasured(t *testing.T) {
	all := Catalog()
	for _, b := range report.Bars() {
		for _, name := range []string{b.Scenario, b.Than} {
			i := slices.IndexFunc(all, func(s Scenario) bool { return s.Name == name })
			if i < 0 {
				if name != "" {
					t.Errorf("%s: no scenario %s", b.About, name)
				}
				continue
			}
			for _, mode := range []string{b.Subject, b.Against} {
				if mode != "" && !(topo.Config{}).Supports(mode, all[i].Placement) {
					t.Errorf("%s: mode %s is not in %s", b.About, mode, name)
				}
			}
			if !slices.ContainsFunc(report.Metrics(all[i].Load.Kind), func(m report.Metric) bool { return m.Name == b.Metric }) {
				t.Errorf("%s: %s has no %s", b.About, name, b.Metric)
			}
		}
		if (b.Least == 0) == (b.Most == 0) {
			t.Errorf("%s: at least %v, at most %v", b.About, b.Least, b.Most)
		}
	}
}
