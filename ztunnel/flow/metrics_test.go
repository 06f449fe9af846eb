package flow

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
)

// TestSeriesGoWithWhatTheyName: in use they stay, whatever the mesh says.
func TestSeriesGoWithWhatTheyName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := New(Config{MaxSeries: 8})
		here := view(1, dst).Mesh
		stranger := &mesh.Workload{UID: "gone", Name: "gone", WorkloadName: "gone", Traits: &mesh.Traits{}}
		recs := map[string]Record{
			"live":     {Direction: Inbound, Dst: dst},
			"gone":     {Direction: Inbound, Dst: dst, Src: stranger},
			"nameless": {Direction: Outbound},
		}
		held := map[string]*Conn{}
		for k, r := range recs {
			held[k], _ = table.Begin(t.Context(), r)
			held[k].Describe()
		}
		left := func() string {
			out := ""
			for _, k := range []string{"gone", "live", "nameless"} {
				l := recs[k]
				if _, ok := table.metrics.byKey[labelsOf(&l, FlagNone)]; ok {
					out += k + " "
				}
			}
			return out
		}
		time.Sleep(24 * time.Hour)
		table.metrics.retire(here, time.Now())
		if got := left(); got != "gone live nameless " {
			t.Errorf("in use: %s", got)
		}
		for _, c := range held {
			c.End(nil)
		}
		table.metrics.retire(here, time.Now())
		if got := left(); got != "gone live nameless " {
			t.Errorf("just used, a scrape has yet to see them: %s", got)
		}
		time.Sleep(6 * time.Minute)
		table.metrics.retire(here, time.Now())
		if got := left(); got != "live " {
			t.Errorf("idle: %s", got)
		}
		// Where there is room, what names live workloads stays.
		time.Sleep(2 * time.Hour)
		table.metrics.retire(here, time.Now())
		if got := left(); got != "live " {
			t.Errorf("idle for long: %s", got)
		}
		for i := range 7 {
			refused(t, table, Record{Direction: Inbound, Dst: dst, ServiceName: fmt.Sprint(i)}, nil)
		}
		table.metrics.retire(here, time.Now())
		if got, n := left(), len(table.metrics.byKey); got != "" || n != 7 {
			t.Errorf("crowded: %s, %d series", got, n)
		}
	})
}

// TestEarlyFailuresHaveReasons: what failed before anybody was known.
func TestEarlyFailuresHaveReasons(t *testing.T) {
	reg := prometheus.NewRegistry()
	table := New(Config{Registerer: reg})
	table.Refuse(Record{Direction: Inbound}, Failed(ReasonCertExpired, errors.New("x")))
	c, _ := table.Begin(t.Context(), Record{Direction: Outbound})
	c.End(Failed(ReasonUnknownWorkload, errors.New("x")))
	refused(t, table, Record{Direction: Outbound}, Failed(ReasonHBONETimeout, errors.New("x")))
	refused(t, table, Record{Direction: Outbound}, nil)
	if got := gather(t, reg)["ambit_ztunnel_failures_total"]; len(got) != 3 {
		t.Errorf("all failures: %v", got)
	}
	got := gather(t, reg)["ambit_ztunnel_early_failures_total"]
	want := map[string]bool{`direction:"inbound",reason:"certificate_expired"`: true, `direction:"outbound",reason:"unknown_workload"`: true}
	if len(got) != 2 || !want[got[0]] || !want[got[1]] {
		t.Errorf("%v", got)
	}
}

// BenchmarkConnection is what a connection costs here, with its line.
func BenchmarkConnection(b *testing.B) {
	var book logbook
	v := view(1, dst)
	for _, bb := range []struct {
		name string
		err  error
	}{{"complete", nil}, {"refused", Failed(ReasonAppRefused, errors.New("no"))}} {
		b.Run(bb.name, func(b *testing.B) {
			table := New(Config{View: func() *store.View { return v }, Logger: book.logger("info")})
			rec := Record{Direction: Inbound, Pod: "b", Src: src, Dst: dst, SrcID: peer, DstID: dst.Identity, Transport: HBONE, HBONEAddr: "10.0.0.2:80"}
			b.ReportAllocs()
			for b.Loop() {
				c, _ := table.Begin(b.Context(), rec)
				c.Join(goodParent)
				c.Describe()
				if err := c.Authorize(subject()); err != nil {
					b.Fatal(err)
				}
				c.End(bb.err)
				book.b.Reset()
			}
		})
	}
}
