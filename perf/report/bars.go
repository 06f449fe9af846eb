package report

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ambit-mesh/ambit/perf/load"
)

// Bar is what a figure has to be. Exactly one of Least and Most is set.
type Bar struct {
	About    string
	Scenario string
	Subject  string // the mode it is about
	Against  string // the mode that its figure is divided by, round by round; "": none
	Than     string // another scenario whose figure it is divided by; "": none
	Metric   string
	Least    float64
	Most     float64
}

// Bars are all of them.
func Bars() []Bar { return slices.Clone(bars) }

const ztunnel = "ztunnel" // the reference node proxy, given as --peer ztunnel=PATH

var bars = []Bar{
	{About: "bulk, 1 connection", Scenario: "cross-node/bulk-up-1x64k", Subject: "ambit", Against: "tls", Metric: MetricRate, Least: 1.3},
	{About: "bulk, 1 connection", Scenario: "cross-node/bulk-up-1x64k", Subject: "ambit", Against: ztunnel, Metric: MetricRate, Least: 1.1},
	{About: "bulk, 16 connections", Scenario: "cross-node/bulk-up-16x64k", Subject: "ambit", Against: ztunnel, Metric: MetricRate, Least: 1.3},
	{About: "bulk, 16 connections", Scenario: "cross-node/bulk-up-16x64k", Subject: "ambit", Than: "cross-node/bulk-up-1x64k", Metric: MetricRate, Least: 1},
	{About: "bulk, 1 KiB writes", Scenario: "cross-node/bulk-up-1x1k", Subject: "ambit", Against: ztunnel, Metric: MetricRate, Least: 1.3},
	{About: "requests, 1 connection", Scenario: "cross-node/ask-1", Subject: "ambit", Against: "tls", Metric: MetricP50, Most: 1.15},
	{About: "requests, 1 connection", Scenario: "cross-node/ask-1", Subject: "ambit", Against: ztunnel, Metric: MetricP50, Most: 0.75},
	{About: "requests, 1 connection", Scenario: "cross-node/ask-1", Subject: "ambit", Against: ztunnel, Metric: MetricCPU, Most: 0.7},
	{About: "requests, 16 connections", Scenario: "cross-node/ask-16", Subject: "ambit", Against: ztunnel, Metric: MetricRate, Least: 1.2},
	{About: "requests, 64 connections", Scenario: "cross-node/ask-64", Subject: "ambit", Against: ztunnel, Metric: MetricRate, Least: 1.2},
	{About: "2000 requests/s", Scenario: "cross-node/rate-2000", Subject: "ambit", Against: ztunnel, Metric: MetricP99, Most: 1},
	{About: "connects, warm tunnels", Scenario: "cross-node/connect-16", Subject: "ambit", Against: ztunnel, Metric: MetricRate, Least: 1.25},
	{About: "connects, warm tunnels", Scenario: "cross-node/connect-16", Subject: "ambit", Against: ztunnel, Metric: MetricCPU, Most: 0.8},

	{About: "one node, bulk", Scenario: "same-node/bulk-up-1x64k", Subject: "ambit", Against: "relay", Metric: MetricRate, Least: 0.9},
	{About: "one node, requests", Scenario: "same-node/ask-1", Subject: "ambit", Against: "relay", Metric: MetricP50, Most: 1.1},
	{About: "one node, lease, requests", Scenario: "same-node/ask-1-pinned", Subject: "ambit-accelerated", Against: "none", Metric: MetricP50, Most: 1.05},
	{About: "one node, lease, bulk", Scenario: "same-node/bulk-up-1x64k-pinned", Subject: "ambit-accelerated", Against: "none", Metric: MetricRate, Least: 0.95},

	{About: "small requests beside bulk", Scenario: "cross-node/mice-bulk", Subject: "ambit", Metric: MetricTail, Most: 2},
	{About: "small requests beside 100 MB/s", Scenario: "cross-node/mice-paced", Subject: "ambit", Metric: MetricTail, Most: 2},

	{About: "idle connection", Scenario: "cross-node/idle-10000", Subject: "ambit", Metric: MetricPerConn, Most: 7},
	{About: "idle proxy", Scenario: "cross-node/idle-10000", Subject: "ambit", Metric: MetricBase, Most: 25},
	{About: "memory after 10000 connections", Scenario: "cross-node/settle-10000", Subject: "ambit", Metric: MetricSettled, Most: 1.1},

	{About: "against a policy in force", Scenario: "cross-node/effect", Subject: "ambit", Metric: MetricAgainst, Most: 0.5},
	{About: "connects while 70000 workloads come", Scenario: "cross-node/arrival-70000", Subject: "ambit", Metric: MetricRise, Most: 1000},

	{About: "beside a storm of connects", Scenario: "cross-node/noisy-connects", Subject: "ambit", Metric: MetricKept, Least: 0.8},
	{About: "beside a storm of connects", Scenario: "cross-node/noisy-connects", Subject: "ambit", Metric: MetricTail, Most: 2},
	{About: "beside streams that nobody reads", Scenario: "cross-node/noisy-streams", Subject: "ambit", Metric: MetricKept, Least: 0.8},
	{About: "beside streams that nobody reads", Scenario: "cross-node/noisy-streams", Subject: "ambit", Metric: MetricTail, Most: 2},
	{About: "beside slow handshakes", Scenario: "cross-node/noisy-handshakes", Subject: "ambit", Metric: MetricKept, Least: 0.8},
	{About: "beside slow handshakes", Scenario: "cross-node/noisy-handshakes", Subject: "ambit", Metric: MetricTail, Most: 2},
}

// String is a bar in a few words.
func (b Bar) String() string {
	limit := "≥ " + figure(b.Least)
	switch {
	case b.Metric == MetricAgainst:
		limit = "none"
	case b.Most > 0:
		limit = "≤ " + figure(b.Most)
	}
	switch {
	case b.Against != "":
		return limit + " × " + b.Against
	case b.Than != "":
		_, name, _ := strings.Cut(b.Than, "/")
		return limit + " × " + name
	}
	return limit
}

// Outcome is what became of a bar.
type Outcome string

// Outcomes.
const (
	Met         Outcome = "met"
	NotMet      Outcome = "NOT MET"
	WithinNoise Outcome = "within noise"
	NotMeasured Outcome = "not measured"
)

// Judged is a bar and what was measured.
type Judged struct {
	Bar
	Unit    string
	Values  Spread
	Outcome Outcome
	Why     string // it was not measured, or what else is to be known
}

// Judge holds the report against bars.
func (r *Report) Judge(bars []Bar) []Judged {
	var out []Judged
	for _, b := range bars {
		j := Judged{Bar: b, Outcome: NotMeasured}
		j.judge(r)
		out = append(out, j)
	}
	return out
}

func (j *Judged) judge(r *Report) {
	subject, why := r.row(j.Scenario, j.Subject)
	if why != "" {
		j.Why = why
		return
	}
	m, ok := metric(subject.Scenario.Load.Kind, j.Metric)
	if !ok {
		j.Why = "it has no " + j.Metric
		return
	}
	j.Unit = m.Unit
	values := subject.Values(m)
	if j.Against != "" || j.Than != "" {
		name, mode := j.Scenario, j.Subject
		if j.Than != "" {
			name = j.Than
		} else {
			mode = j.Against
		}
		other, why := r.row(name, mode)
		if why != "" {
			j.Why = why
			return
		}
		values = Ratios(subject, other, m)
	}
	if j.Values = SpreadOf(values); j.Values.N == 0 {
		j.Why = "no figure"
		return
	}
	if r.Settings.Profiled {
		j.Why = "processes were profiled meanwhile"
		return
	}
	j.Outcome = j.Values.against(j.Least, j.Most)
	var notes []string
	if j.Values.N == 1 && !m.steady() {
		j.Outcome = WithinNoise // of which one round says nothing
	}
	if n := subject.stolen(); n > 0 {
		notes = append(notes, fmt.Sprintf("CPU was stolen in %d of %d runs", n, len(subject.Runs)))
	}
	if n := subject.errors(); n > 0 {
		if j.Outcome == Met {
			j.Outcome = NotMet // work that was lost is no speed
		}
		notes = append(notes, fmt.Sprintf("%d errors", n))
	}
	j.Why = strings.Join(notes, ", ")
}

// against says on which side of a bar a spread is. What lies on both is noise.
func (s Spread) against(least, most float64) Outcome {
	switch {
	case most > 0 && s.To <= most, most == 0 && s.From >= least:
		return Met
	case most > 0 && s.From > most, most == 0 && s.To < least:
		return NotMet
	}
	return WithinNoise
}

// row is a mode's in a scenario, or why there is none.
func (r *Report) row(scenario, mode string) (Row, string) {
	found := false
	for _, row := range r.Rows {
		if row.Scenario.Name != scenario {
			continue
		}
		found = true
		if row.Mode != mode {
			continue
		}
		if row.LeftOut != "" {
			return row, mode + " was left out: " + row.LeftOut
		}
		for _, run := range row.Runs {
			if run.Failed == "" {
				return row, ""
			}
		}
		if len(row.Runs) > 0 {
			return row, mode + " failed: " + row.Runs[0].Failed
		}
	}
	switch {
	case !found:
		return Row{}, notRun
	case mode == ztunnel:
		return Row{}, "wants --peer ztunnel=PATH"
	}
	return Row{}, "wants the mode " + mode
}

const notRun = "the scenario was not run"

// metric is one of a kind of load's, by its name.
func metric(kind, name string) (Metric, bool) {
	for _, m := range Metrics(kind) {
		if m.Name == name {
			return m, true
		}
	}
	return Metric{}, false
}

// steady are figures that a second round would repeat.
func (m Metric) steady() bool {
	return slices.Contains([]string{MetricPerConn, MetricBase, MetricSettled, MetricPerPod, MetricKnown, MetricAgainst}, m.Name)
}

func (r Row) stolen() (n int) {
	for _, run := range r.Runs {
		if run.Stolen {
			n++
		}
	}
	return n
}

func (r Row) errors() (n uint64) {
	for _, run := range r.Runs {
		n += run.Result.Errors
	}
	return n
}

// Tally counts outcomes.
func Tally(judged []Judged) string {
	count := map[Outcome]int{}
	for _, j := range judged {
		count[j.Outcome]++
	}
	return fmt.Sprintf("%d bars: %d met, %d not met, %d within noise, %d not measured", len(judged), count[Met], count[NotMet], count[WithinNoise], count[NotMeasured])
}

// barLines are a table; bars whose scenarios were not run are left to the caller.
func barLines(judged []Judged) (t table, elsewhere []string) {
	for _, j := range judged {
		if j.Why == notRun {
			if !slices.Contains(elsewhere, j.Scenario) {
				elsewhere = append(elsewhere, j.Scenario)
			}
			continue
		}
		t = append(t, []string{string(j.Outcome), j.What(), j.Limit(), j.Measured(), strings.TrimPrefix(strings.TrimSuffix(j.Rounds()+"; "+j.Remark(), "; "), "; ")})
	}
	return t, elsewhere
}

var barHead = []string{"outcome", "what", "bar", "measured", "rounds"}

// What is measured, of whom.
func (j Judged) What() string {
	if j.Subject != "ambit" {
		return j.About + ", " + j.Subject
	}
	return j.About
}

// Limit is the bar with its unit.
func (j Judged) Limit() string {
	if j.Unit != "" {
		return j.Unit + " " + j.Bar.String()
	}
	return j.Metric + " " + j.Bar.String()
}

// Measured is the figure, or why there is none.
func (j Judged) Measured() string {
	if j.Values.N == 0 {
		return j.Why
	}
	return j.Values.Interval()
}

// Rounds says how many there were, and how sure the interval is.
func (j Judged) Rounds() string {
	switch {
	case j.Values.N == 0:
		return ""
	case j.Values.N == 1:
		return "1"
	}
	return fmt.Sprintf("%d, %.0f %%", j.Values.N, 100*j.Values.Sure)
}

// Remark is what else is to be known of a figure.
func (j Judged) Remark() string {
	if j.Values.N == 0 {
		return ""
	}
	return j.Why
}

// idleBase is the memory of each proxy before the connections of an idle load.
func idleBase(_ load.Spec, r load.Result) (float64, bool) {
	sum, ok := proxies(r, func(u load.Usage) float64 { return float64(u.RSS) - float64(u.Grown) })
	n, _ := proxies(r, func(load.Usage) float64 { return 1 })
	return sum / max(n, 1) / (1 << 20), ok
}

// rise is how much longer the slowest in a thousand took than in the baseline.
func rise(_ load.Spec, r load.Result) (float64, bool) {
	if r.Baseline == nil {
		return 0, false
	}
	with, ok := r.Latency.Quantile(0.999)
	without, had := r.Baseline.Latency.Quantile(0.999)
	return (float64(with) - float64(without)) / 1e3, ok && had
}
