package report

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// Change is a figure in two reports.
type Change struct {
	Scenario string  `json:"scenario"`
	Mode     string  `json:"mode"`
	Against  string  `json:"against,omitempty"` // the mode that it is divided by, in the same run
	Metric   string  `json:"metric"`
	Unit     string  `json:"unit"`
	A        Spread  `json:"a"`
	B        Spread  `json:"b"`
	Ratio    float64 `json:"ratio"`             // B divided by A
	Verdict  string  `json:"verdict,omitempty"` // better or worse, beyond noise
}

// Comparison is what differs between two reports. Figures of different days differ
// for many reasons; those of our modes divided by another mode's in the same run
// say more. So a figure of ours counts as worse or better only if it has changed
// itself and divided by its yardstick, each beyond noise.
type Comparison struct {
	Warnings []string `json:"warnings,omitempty"`
	Changes  []Change `json:"changes"`
	Worse    []Change `json:"worse"`
	Better   []Change `json:"better"`

	a, b *Report
}

// Compare looks at all that both have.
func Compare(a, b *Report) (*Comparison, error) {
	c := &Comparison{a: a, b: b, Changes: []Change{}, Worse: []Change{}, Better: []Change{}}
	for i, r := range []*Report{a, b} {
		for _, w := range r.Warnings() {
			c.Warnings = append(c.Warnings, []string{"A: ", "B: "}[i]+w)
		}
	}
	if a.Machine.CPU != b.Machine.CPU || a.Machine.CPUs != b.Machine.CPUs || a.Machine.Kernel != b.Machine.Kernel {
		c.Warnings = append(c.Warnings, fmt.Sprintf("the machines differ: %s, %d CPUs, %s; %s, %d CPUs, %s", a.Machine.CPU, a.Machine.CPUs, a.Machine.Kernel, b.Machine.CPU, b.Machine.CPUs, b.Machine.Kernel))
	}
	if a.Settings.AccessLog != b.Settings.AccessLog {
		c.Warnings = append(c.Warnings, "one wrote access logs, the other did not")
	}
	old := map[string]Group{}
	for _, g := range a.Groups() {
		old[g.Scenario.Name] = g
	}
	for _, g := range b.Groups() {
		if was, ok := old[g.Scenario.Name]; ok {
			c.group(was, g)
		}
	}
	if len(c.Changes) == 0 {
		return nil, fmt.Errorf("compare reports: they have no scenario with a common mode")
	}
	return c, nil
}

// yardsticks are what our modes are measured by, the nearest kind first.
var yardsticks = []string{"tls", "relay", "none"}

// verdicts are the metrics that count; others are for looking closer. Memory after
// a load is not among them: it depends on what ran before in the same lab.
var verdicts = []string{MetricRate, MetricP50, MetricP99, MetricCPU, MetricPerConn, MetricBase, MetricSettled, MetricEffect, MetricKept, MetricTail}

// leastChange is what counts: a tenth, because two labs differ by some of it.
const leastChange = 0.1

func (c *Comparison) group(a, b Group) {
	for _, y := range b.Rows {
		x, ok := a.row(y.Mode)
		if !ok {
			continue
		}
		other, divided := "", [2]Row{}
		if slices.Contains(subjects, y.Mode) {
			for _, name := range yardsticks {
				p, okP := a.row(name)
				q, okQ := b.row(name)
				if okP && okQ {
					other, divided = name, [2]Row{p, q}
					break
				}
			}
		}
		for _, m := range b.Metrics() {
			if m.Better == 0 || m.Name == MetricErrors {
				continue
			}
			own, ok := changed(m, x.Values(m), y.Values(m))
			if !ok {
				continue
			}
			own.Scenario, own.Mode = b.Scenario.Name, y.Mode
			c.Changes = append(c.Changes, own)
			verdict := own.Verdict
			if other != "" {
				ratio, ok := changed(m, Ratios(x, divided[0], m), Ratios(y, divided[1], m))
				if ok {
					ratio.Scenario, ratio.Mode, ratio.Against = b.Scenario.Name, y.Mode, other
					c.Changes = append(c.Changes, ratio)
					if ratio.Verdict != verdict {
						verdict = ""
					}
				}
			}
			if !slices.Contains(subjects, y.Mode) || !slices.Contains(verdicts, m.Name) {
				continue
			}
			switch verdict {
			case worse:
				c.Worse = append(c.Worse, own)
			case better:
				c.Better = append(c.Better, own)
			}
		}
	}
}

const worse, better = "worse", "better"

// changed is false where one of them has no figure.
func changed(m Metric, a, b []float64) (Change, bool) {
	x, y := SpreadOf(a), SpreadOf(b)
	if x.N == 0 || y.N == 0 || x.Median == 0 {
		return Change{}, false
	}
	ch := Change{Metric: m.Name, Unit: m.Unit, A: x, B: y, Ratio: y.Median / x.Median}
	apart := Apart(y, x)
	if m.steady() && x.N == 1 && y.N == 1 {
		apart = map[bool]int{true: 1, false: -1}[y.Median > x.Median]
	}
	if math.Abs(ch.Ratio-1) >= leastChange {
		ch.Verdict = map[int]string{-1: worse, +1: better}[apart*m.Better]
	}
	return ch, true
}

func (g Group) row(mode string) (Row, bool) {
	i := slices.IndexFunc(g.Rows, func(r Row) bool { return r.Mode == mode && len(r.Runs) > 0 })
	if i < 0 {
		return Row{}, false
	}
	return g.Rows[i], true
}

// String is a change in a line.
func (ch Change) String() string {
	return fmt.Sprintf("%s · %s · %s: %s, was %s (%+.0f %%)", ch.Scenario, ch.Mode, ch.Unit, figure(ch.B.Median), figure(ch.A.Median), 100*(ch.Ratio-1))
}

// Text writes the summary, then the figures that count; with all, every figure.
func (c *Comparison) Text(w io.Writer, all bool) error {
	p := &printer{w: w}
	for i, r := range []*Report{c.a, c.b} {
		p.f("%s  %s  %s\n   %s\n", []string{"A", "B"}[i], r.Started.Format("2006-01-02 15:04"), r.Version, r.Settings)
	}
	for _, s := range c.Warnings {
		p.f("warning: %s\n", s)
	}
	p.f("\nof our modes, beyond noise and by a tenth or more, both as such and divided by a yardstick of the same run: %d worse, %d better\n", len(c.Worse), len(c.Better))
	if len(c.Worse)+len(c.Better) > 0 && (c.a.busy() || c.b.busy()) {
		p.f("  the machine was busy: measure again before you believe it\n")
	}
	for _, ch := range c.Worse {
		p.f("  WORSE   %s\n", ch)
	}
	for _, ch := range c.Better {
		p.f("  better  %s\n", ch)
	}
	titles := map[string]Scenario{}
	for _, g := range c.b.Groups() {
		titles[g.Scenario.Name] = g.Scenario
	}
	for name, rest := "", c.Changes; len(rest) > 0; {
		name = rest[0].Scenario
		n := slices.IndexFunc(rest, func(ch Change) bool { return ch.Scenario != name })
		if n < 0 {
			n = len(rest)
		}
		t := table{{"mode", "figure", "A", "B", "B/A", ""}}
		for _, ch := range rest[:n] {
			if all || slices.Contains(verdicts, ch.Metric) {
				mode := ch.Mode
				if ch.Against != "" {
					mode += " / " + ch.Against
				}
				t = append(t, []string{mode, ch.Unit, ch.A.String(), ch.B.String(), fmt.Sprintf("%.2f", ch.Ratio), strings.TrimSpace(ch.Verdict)})
			}
		}
		p.f("\n%s · %s  [%s]\n", titles[name].Title, titles[name].Placement, name)
		t.print(p)
		rest = rest[n:]
	}
	return p.err
}
