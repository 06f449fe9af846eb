package report

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
)

func TestAgainst(t *testing.T) {
	for _, tt := range []struct {
		values      []float64
		least, most float64
		want        Outcome
	}{
		{[]float64{1.3, 1.4, 1.5}, 1.3, 0, Met},
		{[]float64{1.2, 1.4, 1.5}, 1.3, 0, WithinNoise},
		{[]float64{1, 1.4, 1.4, 1.4, 1.4}, 1.3, 0, WithinNoise},
		{[]float64{1, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4}, 1.3, 0, Met}, // one round of nine is outside the interval
		{[]float64{1, 1.1, 1.2}, 1.3, 0, NotMet},
		{[]float64{0.7}, 0, 0.75, Met},
		{[]float64{0.7, 0.8}, 0, 0.75, WithinNoise},
		{[]float64{0.8, 0.9}, 0, 0.75, NotMet},
	} {
		if got := SpreadOf(tt.values).against(tt.least, tt.most); got != tt.want {
			t.Errorf("%v, at least %v, at most %v: %s, want %s", tt.values, tt.least, tt.most, got, tt.want)
		}
	}
}

func TestJudge(t *testing.T) {
	r := sample()
	bar := func(b Bar) Bar {
		if b.Scenario == "" {
			b.Scenario = "cross-node/ask-1"
		}
		if b.Subject == "" {
			b.Subject = "ambit"
		}
		return b
	}
	for _, tt := range []struct {
		name string
		bar  Bar
		want Outcome
		why  string
	}{
		{"a ratio", Bar{Against: "none", Metric: MetricRate, Least: 0.4}, Met, ""},
		{"a figure", Bar{Metric: MetricCPU, Most: 0.1}, NotMet, ""},
		{"another scenario", Bar{Scenario: "x/y", Metric: MetricRate, Least: 1}, NotMeasured, notRun},
		{"a peer that was not given", Bar{Against: "ztunnel", Metric: MetricRate, Least: 1}, NotMeasured, "--peer ztunnel=PATH"},
		{"a mode that was not asked for", Bar{Against: "tls", Metric: MetricRate, Least: 1}, NotMeasured, "the mode tls"},
		{"a figure that it has not", Bar{Metric: MetricPerConn, Most: 1}, NotMeasured, "no perconn"},
	} {
		j := r.Judge([]Bar{bar(tt.bar)})[0]
		if j.Outcome != tt.want || tt.why != "" && !strings.Contains(j.Why, tt.why) {
			t.Errorf("%s: %s, %q", tt.name, j.Outcome, j.Why)
		}
	}
	r.Rows[1].Runs[0].Stolen = true
	if j := r.Judge([]Bar{bar(Bar{Metric: MetricRate, Least: 1})})[0]; !strings.Contains(j.Why, "stolen in 1 of 3") {
		t.Errorf("stolen CPU is not told: %+v", j)
	}
	easy := []Bar{bar(Bar{Metric: MetricRate, Least: 1e-9})}
	if j := r.Judge(easy)[0]; j.Outcome != Met {
		t.Errorf("three rounds: %+v", j)
	}
	r.Rows[1].Runs[1].Result.Errors = 3
	if j := r.Judge(easy)[0]; j.Outcome != NotMet || !strings.Contains(j.Why, "3 errors") {
		t.Errorf("work that was lost: %+v", j)
	}
	r.Rows[1].Runs[1].Result.Errors = 0
	all := r.Rows[1].Runs
	r.Rows[1].Runs = all[:1]
	if j := r.Judge(easy)[0]; j.Outcome != WithinNoise || j.Rounds() != "1" {
		t.Errorf("one round: %+v", j)
	}
	r.Rows[1].Runs = all
	r.Settings.Profiled = true
	if j := r.Judge([]Bar{bar(Bar{Metric: MetricRate, Least: 1})})[0]; j.Outcome != NotMeasured {
		t.Errorf("profiled runs are measurements: %+v", j)
	}
	for i := range r.Rows[1].Runs {
		r.Rows[1].Runs[i].Failed = "no route"
	}
	if j := r.Judge([]Bar{bar(Bar{Metric: MetricRate, Least: 1})})[0]; j.Outcome != NotMeasured || !strings.Contains(j.Why, "no route") {
		t.Errorf("failed runs: %+v", j)
	}
}

func TestMerge(t *testing.T) {
	a, b := sample(), sample()
	b.Rows = append(b.Rows, b.Rows[0])
	b.Rows[2].Mode = "later"
	m, err := Merge(a, b)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Rows) != 3 || len(m.Rows[0].Runs) != 6 || len(a.Rows[0].Runs) != 3 {
		t.Errorf("%d rows, %d runs, %d before", len(m.Rows), len(m.Rows[0].Runs), len(a.Rows[0].Runs))
	}
	rate, _ := metric(load.Ask, MetricRate)
	if got := Ratios(m.Rows[2], m.Rows[0], rate); len(got) != 3 || got[0] != 1 {
		t.Errorf("a mode of the second report is paired with rounds of the first: %v", got)
	}
	b.Version = "another"
	if _, err := Merge(a, b); err == nil {
		t.Error("reports of different builds are one")
	}
}

func TestMarkdownTellsNothingOfTheMachineButItsKind(t *testing.T) {
	r := sample()
	r.Command = strings.Fields("ambit-perf run --quick --peer ztunnel=/home/me/zt --json=/home/me/a.json --html /home/me/a.html --bin /home/me cross-node/(ask|bulk) /home/me/x")
	var b bytes.Buffer
	if err := r.Markdown(&b); err != nil {
		t.Fatal(err)
	}
	s := b.String()
	if strings.Contains(s, "/home") || !strings.Contains(s, "ambit-perf run --quick --peer ztunnel=PATH 'cross-node/(ask|bulk)' x\n") {
		t.Errorf("command: %s", s)
	}
	if !strings.Contains(s, "| requests | p50 µs |") || !strings.Contains(s, "a CPU & more") {
		t.Errorf("table: %s", s)
	}
}

func TestSizing(t *testing.T) {
	usage := func(near, far load.Usage) []load.Usage {
		near.Proxy, far.Proxy = true, true
		return []load.Usage{near, far}
	}
	row := func(name, kind string, result load.Result) Row {
		return Row{Scenario: Scenario{Name: name, Load: load.Spec{Kind: kind}}, Mode: "ambit", Runs: []Run{{Round: 1, Result: result}}}
	}
	const mib = 1 << 20
	r := &Report{Rows: []Row{
		row("cross-node/idle-10000", load.Idle, load.Result{Ops: 10240, Usage: usage(load.Usage{RSS: 120 * mib, Grown: 100 * mib}, load.Usage{RSS: 100 * mib, Grown: 90 * mib})}),
		row("cross-node/connect-16", load.Connect, load.Result{Ops: 1000, Elapsed: time.Second, Usage: usage(load.Usage{CPU: 200 * time.Millisecond}, load.Usage{CPU: 300 * time.Millisecond})}),
		row("cross-node/enrol-100", load.Enrol, load.Result{Ops: 100, Usage: append(usage(load.Usage{Grown: 100 << 13}, load.Usage{Grown: 1}), load.Usage{Process: load.Process{Name: "ambit-node@node-1"}, Grown: 100 << 10})}),
		row("cross-node/learn-10000", load.Learn, load.Result{Ops: 10000, Usage: usage(load.Usage{Grown: 1 * mib}, load.Usage{Grown: 2 * mib})}),
	}}
	s := r.SizingOf("ambit", Node{Pods: 10, Connections: 1024, Connects: 1000, Workloads: 10000})
	cost := map[string]Cost{}
	for _, c := range s.Costs {
		cost[c.Name] = c
	}
	if c := cost["the proxy itself"]; c.Memory != 20*mib {
		t.Errorf("itself: %+v", c)
	}
	if c := cost["an open connection"]; c.Memory != 10*1024 {
		t.Errorf("a connection: %+v", c)
	}
	if c := cost["a new connection per second"]; math.Abs(c.CPU-0.0003) > 1e-9 {
		t.Errorf("a new connection: %+v", c)
	}
	if c := cost["an enrolled pod"]; c.Memory != 8<<10 {
		t.Errorf("a pod: %+v", c)
	}
	if c := cost["an enrolled pod, of the agent"]; c.Memory != 1<<10 || !c.Agent {
		t.Errorf("a pod, of the agent: %+v", c)
	}
	if c := cost["10000 known workloads, 1000 services"]; c.Memory != 2*mib {
		t.Errorf("workloads: %+v", c)
	}
	if s.CPU != 0.3 || s.Memory != 48*mib || s.Limit != 96*mib {
		t.Errorf("it follows: %+v", s)
	}
	var b bytes.Buffer
	if err := s.Text(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"cpu 300m, memory 48Mi", "Not in it, because not measured: a GB per second", "wants cross-node/bulk-up-1x64k"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in\n%s", want, b.String())
		}
	}
}

func TestWorseWantsTheFigureAndItsRatio(t *testing.T) {
	slower := func(r *Report, rows ...int) {
		for _, i := range rows {
			for k := range r.Rows[i].Runs {
				r.Rows[i].Runs[k].Result.Ops /= 2
			}
		}
	}
	spread := func() *Report { // the medians of rounds differ by 2 % only
		r := sample()
		for i, row := range r.Rows {
			for k := range row.Runs {
				r.Rows[i].Runs[k].Result.Ops = []uint64{1000, 1010, 1020}[k]
			}
		}
		return r
	}
	a, busy, worseOne := spread(), spread(), spread()
	slower(busy, 0, 1)
	slower(worseOne, 1)
	if c, err := Compare(a, busy); err != nil || len(c.Worse) > 0 && c.Worse[0].Metric == MetricRate {
		t.Errorf("a slow day is our fault: %v, %v", c.Worse, err)
	}
	if c, err := Compare(a, worseOne); err != nil || len(c.Worse) == 0 || c.Worse[0].Metric != MetricRate {
		t.Errorf("half the rate is not worse: %v, %v", c.Worse, err)
	}
}
