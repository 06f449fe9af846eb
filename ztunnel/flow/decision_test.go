package flow

import (
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/store"
)

// TestDryRunIsToldAndChangesNothing: at debug, or at info when asked for.
func TestDryRunIsToldAndChangesNothing(t *testing.T) {
	dry := deny()
	dry.DryRun = true
	var cur atomic.Pointer[store.View]
	cur.Store(view(1, dst, dry))
	for _, c := range []struct {
		level string
		info  bool
		lines int
	}{{"debug", false, 1}, {"info", false, 0}, {"info", true, 1}} {
		var book logbook
		reg := prometheus.NewRegistry()
		table := New(Config{View: cur.Load, PolicyLogger: book.logger(c.level), PolicyInfo: c.info, Registerer: reg})
		conn, _ := table.Begin(t.Context(), Record{Direction: Inbound, Dst: dst, SrcID: peer})
		if err := conn.Authorize(subject()); err != nil {
			t.Errorf("dry run denied: %v", err)
		}
		got := book.take()
		if len(got) != c.lines || c.lines > 0 && (!strings.Contains(got[0], "\tallowed\t") || !strings.Contains(got[0], `dry_run="dry-run policy default/deny-a rule 1 would deny"`)) {
			t.Errorf("level %s, info %v: %q", c.level, c.info, got)
		}
		want := `reporter:"destination",result:"dry-run policy default/deny-a rule 1 would deny"`
		if got := gather(t, reg)["ambit_ztunnel_policy_dry_run_total"]; len(got) != 1 || got[0] != want {
			t.Errorf("counted: %v", got)
		}
		conn.End(nil)
	}
}

// TestDeniedDecisionsAreTold with the policy that decided.
func TestDeniedDecisionsAreTold(t *testing.T) {
	var cur atomic.Pointer[store.View]
	cur.Store(view(1, dst, deny()))
	var book logbook
	table := New(Config{View: cur.Load, PolicyLogger: book.logger("info"), PolicyInfo: true})
	c, _ := table.Begin(t.Context(), Record{Direction: Inbound, Dst: dst})
	err := c.Authorize(subject())
	c.End(err)
	if got := book.take(); len(got) != 1 || !strings.Contains(got[0], "\tdenied\t") || !strings.Contains(got[0], `why="policy default/deny-a rule 1"`) {
		t.Errorf("%q", got)
	}
}
