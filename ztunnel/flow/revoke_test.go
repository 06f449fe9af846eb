package flow

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/store"
)

var (
	peer = identity.MustParse("spiffe://cluster.local/ns/default/sa/a")
	dst  = &mesh.Workload{UID: "b", Name: "b", WorkloadName: "b", Traits: &mesh.Traits{Namespace: "default", Identity: identity.MustParse("spiffe://cluster.local/ns/default/sa/b")}}
)

func view(generation uint64, workload *mesh.Workload, policies ...*security.Authorization) *store.View {
	m, p := mesh.Empty().Edit(), policy.Empty().Edit()
	if workload != nil {
		m.PutWorkload(workload)
	}
	for _, a := range policies {
		p.Put(a)
	}
	return &store.View{Mesh: m.Commit(), Policies: p.Commit(), Generation: generation}
}

func deny() *security.Authorization {
	return &security.Authorization{Name: "deny-a", Namespace: "default", Scope: security.Scope_NAMESPACE, Action: security.Action_DENY,
		Rules: []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{{
			Principals: []*security.StringMatch{{MatchType: &security.StringMatch_Exact{Exact: peer.Principal()}}}}}}}}}}
}

func subject() Subject {
	ap := netip.MustParseAddrPort
	return Subject{UID: "b", Conn: policy.Conn{Peer: peer, Src: ap("10.0.0.1:999"), Dst: ap("10.0.0.2:80")}}
}

// TestNoGapBetweenSweepAndNewConnection changes the policy at every step of a
// new connection, and lets the sweep run at every later one: whatever the
// order, the connection is refused or cut.
func TestNoGapBetweenSweepAndNewConnection(t *testing.T) {
	steps := []string{"begun", "viewed", "decided", "authorized"}
	for i, publish := range steps {
		for _, sweep := range steps[i:] {
			t.Run("publish at "+publish+", sweep at "+sweep, func(t *testing.T) {
				var cur atomic.Pointer[store.View]
				old, now := view(1, dst), view(2, dst, deny())
				cur.Store(old)
				table := New(Config{View: cur.Load})
				var published, swept sync.Once
				at := func(step string) {
					if step == publish {
						published.Do(func() { cur.Store(now) })
					}
					if step == sweep && cur.Load() == now {
						swept.Do(func() { table.sweep(between(old, now), now) })
					}
				}
				table.hook = func(step string) {
					if step != "sweeping" {
						at(step)
					}
				}
				c, ctx := table.Begin(t.Context(), Record{Direction: Inbound, Dst: dst})
				at("begun")
				err := c.Authorize(subject())
				at("authorized")
				if _, denied := errors.AsType[*DenyError](err); !denied {
					if _, cut := errors.AsType[*DenyError](context.Cause(ctx)); !cut {
						t.Fatalf("went on: %v, %v", err, context.Cause(ctx))
					}
				}
				c.End(err)
			})
		}
	}
}

// changeOf is what a store would say of the step.
func changeOf(old, now *store.View) store.Change {
	var ch store.Change
	for _, v := range []*store.View{old, now} {
		for w := range v.Mesh.AllWorkloads() {
			if o, n := old.Mesh.Workload(w.UID), now.Mesh.Workload(w.UID); o != n {
				ch.Workloads = append(ch.Workloads, store.WorkloadChange{UID: w.UID, Old: o, New: n})
			}
		}
		for p := range v.Policies.All() {
			if o, n := old.Policies.Get(p.Key), now.Policies.Get(p.Key); o != n {
				ch.Policies = append(ch.Policies, store.PolicyChange{Key: p.Key, Old: o, New: n})
			}
		}
	}
	return ch
}

func between(old, now *store.View) (s step) {
	s.add(old.Generation, now.Generation, changeOf(old, now))
	return s
}

// TestSweepLooksOnlyAtWhatIsConcerned: a policy of another namespace re-decides
// nothing, in this sweep and in the ones after it.
func TestSweepLooksOnlyAtWhatIsConcerned(t *testing.T) {
	elsewhere := deny()
	elsewhere.Namespace = "elsewhere"
	var cur atomic.Pointer[store.View]
	v1 := view(1, dst)
	cur.Store(v1)
	table := New(Config{View: cur.Load})
	c, ctx := table.Begin(t.Context(), Record{Direction: Inbound, Dst: dst})
	if err := c.Authorize(subject()); err != nil {
		t.Fatal(err)
	}
	was := c.verdict
	c.verdict.DryRun = "untouched" // a new decision would overwrite it
	old := v1
	for g := uint64(2); g <= 5; g++ {
		next := view(g, dst)
		if g%2 == 0 {
			next = view(g, dst, elsewhere)
		}
		cur.Store(next)
		table.sweep(between(old, next), next)
		if c.verdict.DryRun != "untouched" || c.generation != g {
			t.Fatalf("generation %d: decided anew (%+v, was %+v), now of generation %d", g, c.verdict, was, c.generation)
		}
		old = next
	}
	// What does concern it still cuts, also when several steps came at once.
	mid, last := view(6, dst, elsewhere), view(7, dst, elsewhere, deny())
	st := between(old, mid)
	st.add(6, 7, changeOf(mid, last))
	cur.Store(last)
	table.sweep(st, last)
	if _, cut := errors.AsType[*DenyError](context.Cause(ctx)); !cut {
		t.Errorf("went on: %v", context.Cause(ctx))
	}
	c.End(context.Cause(ctx))
}

func TestStepForgetsDetailsNotChanges(t *testing.T) {
	var st step
	st.add(1, 2, store.Change{Workloads: []store.WorkloadChange{{UID: "a"}}})
	if st.all || !st.concerns(view(2, dst), "a") || st.concerns(view(2, dst), "b") {
		t.Errorf("%+v", st)
	}
	if !st.concerns(view(2, nil), "b") {
		t.Error("a workload that is gone concerns nobody")
	}
	gap := st
	gap.add(3, 4, store.Change{})
	if !gap.concerns(view(4, dst), "b") {
		t.Error("a commit that was not told is no concern")
	}
	st.add(2, 3, store.Change{Policies: make([]store.PolicyChange, maxPending+1)})
	if !st.concerns(view(3, dst), "b") || st.policies != nil {
		t.Error("more than is remembered must concern all")
	}
}

func TestSweepCutsOnlyWhatIsConcerned(t *testing.T) {
	moved := dst.Copy()
	moved.Policies = []string{"default/selected"}
	for _, c := range []struct {
		name string
		next *store.View
		why  string
	}{
		{"nothing relevant", view(2, dst), ""},
		{"a policy denies", view(2, dst, deny()), "policy default/deny-a rule 1"},
		{"the workload names a policy that is not known", view(2, moved), "policy default/selected not yet known"},
		{"the workload is gone", view(2, nil), "no longer in the mesh"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var cur atomic.Pointer[store.View]
			old := view(1, dst)
			cur.Store(old)
			table := New(Config{View: cur.Load})
			conn, ctx := table.Begin(t.Context(), Record{Direction: Inbound, Dst: dst})
			if err := conn.Authorize(subject()); err != nil {
				t.Fatal(err)
			}
			cur.Store(c.next)
			table.sweep(between(old, c.next), c.next)
			d, cut := errors.AsType[*DenyError](context.Cause(ctx))
			if cut != (c.why != "") || cut && (!d.Live || !strings.Contains(d.Why(), c.why)) {
				t.Errorf("cause %v, want %q", context.Cause(ctx), c.why)
			}
			conn.End(context.Cause(ctx))
			if table.Len("") != 0 {
				t.Error("connection stayed in the table")
			}
		})
	}
}

func TestRunSweepsAfterAChange(t *testing.T) {
	var cur atomic.Pointer[store.View]
	cur.Store(view(1, dst))
	table := New(Config{View: cur.Load})
	ctx, stop := context.WithCancel(t.Context())
	donec := make(chan error, 1)
	go func() { donec <- table.Run(ctx) }()
	c, cctx := table.Begin(t.Context(), Record{Direction: Inbound, Dst: dst})
	if err := c.Authorize(subject()); err != nil {
		t.Fatal(err)
	}
	now := view(2, dst, deny())
	old := cur.Swap(now)
	table.Changed(old, now, changeOf(old, now))
	<-cctx.Done()
	c.End(context.Cause(cctx))
	stop()
	if err := <-donec; err != nil {
		t.Error(err)
	}
}

func TestAccessLogAndMetrics(t *testing.T) {
	var cur atomic.Pointer[store.View]
	cur.Store(view(1, dst, deny()))
	var out bytes.Buffer
	log, _ := boot.NewLogger(&out, "text", "info")
	reg := prometheus.NewRegistry()
	table := New(Config{View: cur.Load, Logger: boot.Scoped(log, "access"), Registerer: reg, SeriesDelay: time.Nanosecond, MaxSeries: 4})
	ap := netip.MustParseAddrPort
	rec := Record{Direction: Inbound, Pod: "p", SrcAddr: ap("10.0.0.1:999"), DstAddr: ap("10.0.0.2:15008"), HBONEAddr: "10.0.0.2:80",
		Dst: dst, SrcID: peer, DstID: dst.Identity, Transport: HBONE}
	c, _ := table.Begin(t.Context(), rec)
	c.Describe()
	c.Stats.Sent.Add(5)
	err := c.Authorize(subject())
	c.End(err)
	line := out.String()
	for _, want := range []string{"\terror\taccess\tconnection complete\tsrc.addr=10.0.0.1:999 src.identity=", "dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80",
		`direction="inbound" bytes_sent=0 bytes_recv=5 duration="`, `why="policy default/deny-a rule 1"`, "policy rejection"} {
		if !strings.Contains(line, want) {
			t.Errorf("log lacks %q: %s", want, line)
		}
	}
	families := gather(t, reg)
	if got := families["istio_tcp_connections_opened_total"]; len(got) != 1 || !strings.Contains(got[0], `response_flags:"-"`) {
		t.Errorf("opened: %v", got)
	}
	if got := families["istio_tcp_connections_closed_total"]; len(got) != 1 || !strings.Contains(got[0], `response_flags:"DENY"`) {
		t.Errorf("closed: %v", got)
	}
	if got := families["ambit_ztunnel_denied_total"]; len(got) != 1 || got[0] != `policy:"default/deny-a",reason:"policy"` {
		t.Errorf("denied: %v", got)
	}
	if len(families["istio_tcp_connections_failed_total"]) != 1 {
		t.Error("failed not counted")
	}

	// Series of workloads that are gone go too.
	table.metrics.retire(cur.Load().Mesh, time.Now().Add(time.Hour))
	if len(gather(t, reg)["istio_tcp_connections_closed_total"]) != 1 {
		t.Error("series of a live workload was removed")
	}
	table.metrics.retire(mesh.Empty(), time.Now().Add(time.Hour))
	if got := gather(t, reg)["istio_tcp_connections_closed_total"]; len(got) != 0 {
		t.Errorf("series of a gone workload stayed: %v", got)
	}

	// And their number is bounded.
	for i := range 20 {
		r := rec
		r.ServiceName = strings.Repeat("x", i)
		c, _ := table.Begin(t.Context(), r)
		c.Describe()
		c.End(nil)
	}
	if n := len(gather(t, reg)["istio_tcp_connections_opened_total"]); n > 5 {
		t.Errorf("%d series, bound is 4 and the overflow", n)
	}
	table.Refuse(Record{Direction: Inbound}, Flagged(FlagTLS, errors.New("bad handshake")))
	if got := gather(t, reg)["ambit_ztunnel_early_failures_total"]; len(got) != 1 {
		t.Errorf("early failures: %v", got)
	}
}

func gather(t *testing.T, reg *prometheus.Registry) map[string][]string {
	t.Helper()
	mfs, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	for _, mf := range mfs {
		for _, m := range mf.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetName()+`:"`+l.GetValue()+`"`)
			}
			out[mf.GetName()] = append(out[mf.GetName()], strings.Join(labels, ","))
		}
	}
	return out
}

func TestIdleAndCutPod(t *testing.T) {
	table := New(Config{View: func() *store.View { return view(1, dst) }})
	c, ctx := table.Begin(t.Context(), Record{Pod: "p"})
	if table.Len("p") != 1 || table.Len("q") != 0 {
		t.Error("connections are not counted by pod")
	}
	table.CutPod("p", ErrPodGone)
	if context.Cause(ctx) != ErrPodGone {
		t.Errorf("cause %v", context.Cause(ctx))
	}
	donec := make(chan error, 1)
	go func() { donec <- table.Idle(t.Context()) }()
	c.End(ErrPodGone)
	if err := <-donec; err != nil {
		t.Error(err)
	}
}
