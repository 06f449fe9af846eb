package report

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
)

//go:embed page.html
var pageSource string

var page = template.Must(template.New("page").Parse(pageSource))

// view is what the page shows.
type view struct {
	*Report
	When   string
	TookS  string
	Memory string
	Parts  []partView
	Legend []string

	Bars      []Judged
	Tally     string
	Elsewhere []string // scenarios of bars that were not run
	Sizing    [][]string
	Follows   string
}

// partView is a section: an overview, and each scenario.
type partView struct {
	Name, ID string
	Head     []string
	Lines    []overviewLine
	Groups   []groupView
}

type overviewLine struct {
	Name, Title string
	Cells       []string
}

// cell is a figure: the median, and below it the quartiles.
type cell struct{ Figure, Spread string }

type line struct {
	Name  string
	Cells []cell
}

func (s Spread) cell() cell {
	c := cell{Figure: figure(s.Median)}
	switch {
	case s.N == 0:
		c.Figure = "–"
	case s.N > 1:
		c.Spread = figure(s.Low) + "–" + figure(s.High)
	}
	return c
}

type groupView struct {
	Scenario Scenario
	Plots    []template.HTML
	Head     []string
	Rows     []line
	About    [][3]string // of rows: mode, TLS, what setup says
	Against  []string    // columns of Ratios
	Ratios   []line
	Remarks  string
}

// HTML writes one page that needs nothing else: plots are SVG, colours follow the
// reader's scheme, and it prints.
func (r *Report) HTML(w io.Writer) error {
	v := view{Report: r, When: r.Started.Format("2006-01-02 15:04 MST"), TookS: r.Took.Round(time.Second).String(), Memory: fmt.Sprintf("%d GiB", (r.Machine.Memory+1<<29)>>30)}
	colours := colours(r)
	for _, s := range r.parts() {
		v.Parts = append(v.Parts, s.view(colours))
	}
	v.Legend = legend
	if s := r.firstInTurn(); s.N > 5 {
		v.Legend = append(slices.Clone(legend), fmt.Sprintf("First in their turn, runs had %s of the same mode's others (%d rows; 1 is no difference).", s.Interval(), s.N))
	}
	judged := r.Judge(bars)
	v.Tally = Tally(judged)
	_, v.Elsewhere = barLines(judged)
	for _, j := range judged {
		if j.Why != notRun {
			v.Bars = append(v.Bars, j)
		}
	}
	if s := r.SizingOf("ambit", ExampleNode); s.Measured() {
		v.Sizing, v.Follows = s.lines(), s.follows()
	}
	if err := page.Execute(w, v); err != nil {
		return fmt.Errorf("write page: %w", err)
	}
	return nil
}

// ownColours are those of modes that most reports have, the same in each; ztunnel is
// what the reference is called by whoever gives it.
var ownColours = map[string]int{"none": 0, "relay": 1, "tls": 2, "ambit": 3, "ambit-accelerated": 4, ztunnel: 5, "net-http": 6}

// colours gives each mode the number of a colour of the page, the same everywhere.
func colours(r *Report) map[string]int {
	out, used := map[string]int{}, map[int]bool{}
	for _, row := range r.Rows {
		if c, ok := ownColours[row.Mode]; ok {
			out[row.Mode], used[c] = c, true
		}
	}
	next := 7
	for _, row := range r.Rows {
		if _, ok := out[row.Mode]; ok {
			continue
		}
		for range 8 { // with more modes than colours some have the same
			if next %= 8; !used[next] {
				break
			}
			next++
		}
		out[row.Mode], used[next] = next, true
		next++
	}
	return out
}

func (s part) view(colours map[string]int) partView {
	v := partView{Name: s.name, ID: strings.NewReplacer(" ", "-", ":", "").Replace(s.name)}
	for i, line := range overview(s.name, s.groups).withoutEmpty() {
		if i == 0 {
			v.Head = line[2:]
		} else {
			v.Lines = append(v.Lines, overviewLine{line[0], line[1], line[2:]})
		}
	}
	for _, g := range s.groups {
		v.Groups = append(v.Groups, g.view(colours))
	}
	return v
}

func (g Group) view(colours map[string]int) groupView {
	v := groupView{Scenario: g.Scenario, Head: []string{"mode"}}
	metrics := g.Metrics()
	for _, m := range metrics {
		v.Head = append(v.Head, m.Unit)
	}
	for _, row := range g.Rows {
		if len(row.Runs) == 0 {
			continue // it was left out, which remarks say
		}
		l := line{Name: row.Mode}
		for _, m := range metrics {
			l.Cells = append(l.Cells, SpreadOf(row.Values(m)).cell())
		}
		v.Rows = append(v.Rows, l)
		if row.Program != "" || len(row.TLS) > 0 {
			v.About = append(v.About, [3]string{row.Mode, orDash(row.secured()), row.setup()})
		}
	}
	v.ratios(g, metrics)
	v.Plots = g.plots(metrics, colours)
	var b strings.Builder
	p := &printer{w: &b}
	for _, row := range g.Rows {
		p.remarks(row)
	}
	v.Remarks = b.String()
	return v
}

// ratios has a column for each figure that some pair of modes has.
func (v *groupView) ratios(g Group, metrics []Metric) {
	pairs := g.Pairs()
	for _, pair := range pairs {
		v.Ratios = append(v.Ratios, line{Name: pair.Subject.Mode + " / " + pair.Other.Mode})
	}
	for _, m := range metrics {
		if m.Better == 0 || m.Name == MetricErrors {
			continue
		}
		var column []cell
		some := false
		for _, pair := range pairs {
			s := SpreadOf(Ratios(pair.Subject, pair.Other, m))
			some = some || s.N > 0
			c := s.cell()
			if s.N > 1 {
				c.Spread = figure(s.From) + "–" + figure(s.To)
			}
			column = append(column, c)
		}
		if !some {
			continue
		}
		v.Against = append(v.Against, m.Unit)
		for i, c := range column {
			v.Ratios[i].Cells = append(v.Ratios[i].Cells, c)
		}
	}
	if len(v.Against) == 0 {
		v.Ratios = nil
	}
}

// plots are bars of the first figure that differs, of CPU, and percentiles.
func (g Group) plots(metrics []Metric, colours map[string]int) []template.HTML {
	wanted := []string{MetricRate, MetricCPU, MetricMachine}
	switch spec := g.Scenario.Load; {
	case spec.Kind == load.Enrol || spec.Kind == load.Learn:
		wanted = []string{MetricPerPod, "agentpod", "agentcpu", MetricKnown, "learncpu"}
	case spec.Beside != "":
		wanted = []string{MetricKept, MetricTail, MetricStall, MetricEffect}
	case spec.Kind == load.Idle || spec.Kind == load.Settle:
		wanted = []string{MetricPerConn, MetricSettled}
	case spec.Kind == load.Rate || spec.PerSec > 0:
		wanted = wanted[1:] // the rate is given
	}
	var out []template.HTML
	for _, m := range metrics {
		if slices.Contains(wanted, m.Name) {
			out = append(out, g.bars(m, colours))
		}
	}
	if tails := g.tails(colours); tails != "" {
		out = append(out, tails)
	}
	return out
}

// Sizes of plots, in SVG's units.
const (
	plotWidth, labelWidth, barHeight, topMargin = 460, 130, 22, 26
)

// bars draws a metric's medians, with a line from the lower to the upper quartile.
// Modes that have none, as a client without proxies has no CPU of theirs, are left out.
func (g Group) bars(m Metric, colours map[string]int) template.HTML {
	var modes []string
	var spreads []Spread
	top := 0.0
	for _, row := range g.Rows {
		if s := SpreadOf(row.Values(m)); s.N > 0 {
			modes, spreads = append(modes, row.Mode), append(spreads, s)
			top = max(top, s.High)
		}
	}
	if top <= 0 {
		top = 1
	}
	var b strings.Builder
	height := topMargin + barHeight*len(modes) + 4
	direction := map[int]string{-1: ", less is better", +1: ", more is better"}[m.Better]
	begin(&b, height, m.Unit+direction)
	x := func(v float64) float64 { return labelWidth + max(v, 0)/top*(plotWidth-labelWidth-60) }
	for i, s := range spreads {
		y := topMargin + i*barHeight
		text(&b, labelWidth-6, y+15, "end", modes[i])
		fmt.Fprintf(&b, `<rect class="c%d" x="%d" y="%d" width="%.1f" height="%d"/>`, colours[modes[i]], labelWidth, y+3, x(s.Median)-labelWidth, barHeight-7)
		if s.N > 1 {
			fmt.Fprintf(&b, `<path class="q" d="M%.1f %dH%.1fM%.1f %dv8M%.1f %dv8"/>`, x(s.Low), y+10, x(s.High), x(s.Low), y+6, x(s.High), y+6)
		}
		text(&b, int(max(x(s.High), x(s.Median)))+6, y+15, "start", figure(s.Median))
	}
	b.WriteString("</svg>")
	return template.HTML(b.String()) // every text in it was escaped
}

// tails draws percentiles of latency on a logarithmic scale, one line per mode.
func (g Group) tails(colours map[string]int) template.HTML {
	quantiles := []struct {
		name string
		q    float64
	}{{"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"p99.9", 0.999}}
	values := make([][]float64, len(g.Rows))
	low, high := 0.0, 0.0
	for i, row := range g.Rows {
		for _, q := range quantiles {
			s := SpreadOf(row.Values(Metric{Of: quantile(q.q)}))
			if s.N == 0 || s.Median <= 0 {
				break
			}
			values[i] = append(values[i], s.Median)
			high = max(high, s.Median)
			if low == 0 || s.Median < low {
				low = s.Median
			}
		}
	}
	if high == 0 {
		return ""
	}
	const bottom = 30
	height := max(240, topMargin+17*len(g.Rows)+bottom) // the legend is beside it
	ticks := scale(low, high)
	first, last := math.Log10(ticks[0]), math.Log10(ticks[len(ticks)-1])
	var b strings.Builder
	begin(&b, height, "latency, µs, logarithmic")
	y := func(v float64) float64 {
		return float64(height-bottom) - (math.Log10(v)-first)/(last-first)*float64(height-bottom-topMargin-6)
	}
	x := func(i int) int { return 70 + i*80 }
	for _, v := range ticks {
		fmt.Fprintf(&b, `<path class="g" d="M60 %.1fH%d"/>`, y(v), x(3)+10)
		text(&b, 54, int(y(v))+4, "end", tick(v))
	}
	for i, q := range quantiles {
		text(&b, x(i), height-10, "middle", q.name)
	}
	legend := 0
	for i, row := range g.Rows {
		if len(values[i]) == 0 {
			continue
		}
		var d strings.Builder
		for k, v := range values[i] {
			fmt.Fprintf(&d, "%s%d %.1f", map[bool]string{true: "M", false: "L"}[k == 0], x(k), y(v))
			fmt.Fprintf(&b, `<circle class="c%d" cx="%d" cy="%.1f" r="3"/>`, colours[row.Mode], x(k), y(v))
		}
		fmt.Fprintf(&b, `<path class="l%d" d="%s"/>`, colours[row.Mode], d.String())
		at := topMargin + 12 + 17*legend
		legend++
		fmt.Fprintf(&b, `<rect class="c%d" x="%d" y="%d" width="10" height="10"/>`, colours[row.Mode], x(3)+24, at-9)
		text(&b, x(3)+38, at, "start", row.Mode)
	}
	b.WriteString("</svg>")
	return template.HTML(b.String()) // every text in it was escaped
}

// scale are round values from one below the lowest to one above the highest figure:
// powers of ten, and where these are few 2 and 5 times as much.
func scale(low, high float64) []float64 {
	steps := []float64{1, 2, 5}
	if high/low > 1000 {
		steps = steps[:1]
	}
	var out []float64
	for d := int(math.Floor(math.Log10(low))); ; d++ {
		for _, step := range steps {
			v := step * math.Pow10(d)
			if len(out) > 0 && v <= low {
				out[0] = v // nearer
				continue
			}
			if out = append(out, v); v >= high && len(out) > 1 {
				return out
			}
		}
	}
}

// tick names a value of a scale.
func tick(v float64) string {
	unit := 0
	for ; v >= 1000 && unit < 3; unit++ {
		v /= 1000
	}
	return strconv.FormatFloat(v, 'g', 3, 64) + []string{"", "k", "M", "G"}[unit]
}

func begin(b *strings.Builder, height int, title string) {
	fmt.Fprintf(b, `<svg viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">`, plotWidth, height, plotWidth, height, template.HTMLEscapeString(title))
	fmt.Fprintf(b, `<text class="t" x="4" y="15">%s</text>`, template.HTMLEscapeString(title))
}

func text(b *strings.Builder, x, y int, anchor, s string) {
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="%s">%s</text>`, x, y, anchor, template.HTMLEscapeString(s))
}
