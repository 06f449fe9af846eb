package report

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Text writes the report for people.
func (r *Report) Text(w io.Writer) error {
	p := &printer{w: w}
	p.head(r)
	for _, s := range r.parts() {
		p.f("\n==== %s\n", s.name)
		for _, g := range s.groups {
			p.group(r, g)
		}
	}
	p.bars(r)
	if s := r.SizingOf("ambit", ExampleNode); s.Measured() {
		p.f("\nsizing: one node proxy, one end of each connection; ambit-perf sizing does it for other nodes\n")
		s.lines().print(p)
		p.says("  ", s.follows()+".")
	}
	p.notes(r)
	return p.err
}

// printer remembers the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) f(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

func (p *printer) head(r *Report) {
	p.says("", r.Version+" · "+strings.Join(r.Command, " "))
	p.f("%s, %d CPUs, %d GiB, Linux %s, %s, load %.2f before\n", r.Machine.CPU, r.Machine.CPUs, (r.Machine.Memory+1<<29)>>30, r.Machine.Kernel, r.Machine.Go, r.Machine.LoadAvg)
	p.says("", r.Settings.String())
	for _, s := range r.Warnings() {
		p.says("", s)
	}
}

// Warnings are what makes figures doubtful.
func (r *Report) Warnings() []string {
	var out []string
	if r.Stopped != "" {
		out = append(out, "STOPPED before its end, "+r.Stopped)
	}
	if r.Settings.Profiled {
		out = append(out, notMeasured)
	}
	if r.loaded() {
		out = append(out, fmt.Sprintf("BUSY MACHINE: a load of %.2f on %d CPUs in the minute before. What else ran may be in these figures.", r.Machine.LoadAvg, r.Machine.CPUs))
	}
	runs, stolen, failed, errs := 0, 0, 0, uint64(0)
	for _, row := range r.Rows {
		for _, run := range row.Runs {
			runs++
			if run.Failed != "" {
				failed++
			}
		}
		stolen += row.stolen()
		errs += row.errors()
	}
	if busy, all := r.disturbed(); tooMany(busy, all) {
		out = append(out, fmt.Sprintf("BUSY MACHINE: in %d of %d runs programs that are not part of the measurement took more than a quarter of the CPU.", busy, all))
	}
	if stolen > 0 {
		out = append(out, fmt.Sprintf("STOLEN CPU: %d of %d runs were kept although other machines took more than %.1f %% of the CPU.", stolen, runs, 100*r.Settings.MaxSteal))
	}
	if failed > 0 {
		out = append(out, fmt.Sprintf("FAILED: %d of %d runs have no figures; the remarks say why.", failed, runs))
	}
	if errs > 0 {
		out = append(out, fmt.Sprintf("ERRORS: %d requests or connections failed; the remarks say in which rows.", errs))
	}
	return out
}

// loaded says that something ran before it began. Half of it may be the invocation before.
func (r *Report) loaded() bool {
	return r.Machine.CPUs > 0 && r.Machine.LoadAvg > 0.75*float64(r.Machine.CPUs)
}

func tooMany(busy, all int) bool { return 7*busy > all }

// busy says that figures are doubtful because of what else ran.
func (r *Report) busy() bool { return r.loaded() || tooMany(r.disturbed()) }

// disturbed counts runs in which more than a quarter of all CPU time went to others
// than the processes of the measurement. Some of it is the network's work in the
// kernel, which nobody is charged for: a few such runs are no sign of anything.
func (r *Report) disturbed() (busy, all int) {
	for _, row := range r.Rows {
		for _, run := range row.Runs {
			if run.Failed != "" || run.Result.Elapsed <= 0 || run.Result.Machine.CPUs == 0 || row.Scenario.Load.Beside != "" {
				continue
			}
			all++
			others := run.Result.Machine.Busy
			for _, u := range run.Result.Usage {
				others -= u.CPU
			}
			if 4*others > run.Result.Elapsed*time.Duration(run.Result.Machine.CPUs) {
				busy++
			}
		}
	}
	return busy, all
}

// firstInTurn is how runs that were the first in their turn compare with the same
// mode's others, over all rows: 1 where the place makes no difference.
func (r *Report) firstInTurn() Spread {
	var ratios []float64
	for _, row := range r.Rows {
		m := Metrics(row.Scenario.Load.Kind)[0]
		if p50, ok := metric(row.Scenario.Load.Kind, MetricP50); ok && row.Scenario.Load.PerSec > 0 {
			m = p50 // the rate is given
		}
		var first, others []float64
		for _, run := range row.Runs {
			if v, ok := run.value(row.Scenario.Load, m); ok && m.Better != 0 && run.Place == 1 {
				first = append(first, v)
			} else if ok && m.Better != 0 && run.Place > 1 {
				others = append(others, v)
			}
		}
		if a, b := SpreadOf(first), SpreadOf(others); a.N > 0 && b.N > 0 && b.Median > 0 {
			ratios = append(ratios, a.Median/b.Median)
		}
	}
	return SpreadOf(ratios)
}

// bars says which of them are met. A short measurement is not asked about those of
// scenarios that it left out.
func (p *printer) bars(r *Report) {
	judged := r.Judge(bars)
	t, elsewhere := barLines(judged)
	if len(t) > 0 {
		p.f("\nbars\n")
		append(table{barHead}, t...).print(p)
		p.f("  %s\n", Tally(judged))
		if len(elsewhere) > 0 {
			p.says("  not measured because the scenario was not run: ", strings.Join(elsewhere, ", "))
		}
		p.f("  within noise: the bar lies in the interval of what was measured.\n")
	}
}

// notMeasured is said of reports with profiles.
const notMeasured = "PROFILED: processes were recorded while they worked, which slows them down. These figures are no measurements."

// String is the settings in a line.
func (s Settings) String() string {
	log := "access logs on"
	if !s.AccessLog {
		log = "access logs off"
	}
	rounds := "rounds"
	if s.Rounds == 1 {
		rounds = "round"
	}
	out := fmt.Sprintf("%d %s of %s after %s, modes in turn; runs with more than %.1f %% stolen CPU repeated; %s, metrics served, both the same for all node proxies",
		s.Rounds, rounds, s.For, s.Warm, 100*s.MaxSteal, log)
	if len(s.Env) > 0 {
		out += "; " + strings.Join(s.Env, " ")
	}
	return out
}

// group is a scenario's table and, below it, what it says about us.
func (p *printer) group(r *Report, g Group) {
	p.f("\n")
	p.says("", fmt.Sprintf("%s · %s [%s]", g.Scenario.Title, g.Scenario.Placement, g.Scenario.Name))
	metrics := g.Metrics()
	t := table{{"mode"}}
	for _, m := range metrics {
		t[0] = append(t[0], m.Unit)
	}
	secured := slices.ContainsFunc(g.Rows, func(row Row) bool { return len(row.TLS) > 0 })
	if secured {
		t[0] = append(t[0], "TLS")
	}
	described := slices.ContainsFunc(g.Rows, func(row Row) bool { return row.Program != "" })
	if described {
		t[0] = append(t[0], setupHead)
	}
	for _, row := range g.Rows {
		if len(row.Runs) == 0 {
			continue // it was left out, which remarks say
		}
		line := []string{row.Mode}
		for i, m := range metrics {
			s := SpreadOf(row.Values(m))
			if i == 0 { // its spread stands for all
				line = append(line, s.String())
			} else if s.N == 0 {
				line = append(line, "–")
			} else {
				line = append(line, figure(s.Median))
			}
		}
		if secured {
			line = append(line, orDash(row.secured()))
		}
		if described {
			line = append(line, row.setup())
		}
		t = append(t, line)
	}
	t.print(p)
	for _, pair := range g.Pairs() {
		var ratios []string
		for _, m := range metrics {
			if m.Better != 0 && m.Name != MetricErrors && m.Name != "switches" {
				if s := SpreadOf(Ratios(pair.Subject, pair.Other, m)); s.N > 0 {
					ratios = append(ratios, m.Name+" "+s.Interval())
				}
			}
		}
		if len(ratios) > 0 {
			p.wrapped("  "+pair.Subject.Mode+" / "+pair.Other.Mode+"  ", ratios)
		}
	}
	for _, row := range g.Rows {
		p.remarks(row)
	}
}

// setupHead is the head of what setup says.
const setupHead = "version, program; log and metrics; TLS records"

// remarks says what is wrong with a row's runs.
func (p *printer) remarks(row Row) {
	if row.LeftOut != "" {
		p.f("  %s: left out, %s\n", row.Mode, row.LeftOut)
	}
	if n := row.Repeated(); n > 0 {
		p.f("  %s: %d runs repeated because CPU was stolen\n", row.Mode, n)
	}
	for _, run := range row.Runs {
		switch {
		case run.Failed != "":
			why, _, _ := strings.Cut(run.Failed, "\n") // what follows is in the JSON form
			p.f("  %s, round %d failed: %s\n", row.Mode, run.Round, why)
		case run.Result.Errors > 0:
			p.f("  %s, round %d: %d errors, the first: %s\n", row.Mode, run.Round, run.Result.Errors, run.Result.Error)
		}
		if run.Stolen {
			p.f("  %s, round %d kept with %.1f %% stolen CPU\n", row.Mode, run.Round, 100*run.Result.StealShare())
		}
	}
}

// secured is what a row's proxies agreed to, in short.
func (r Row) secured() string {
	return strings.NewReplacer("TLS_", "", "_SHA256", "", "_SHA384", "", ",", "", "_", "-").Replace(strings.Join(r.TLS, " | "))
}

// Describe notes in each row what its figures are about: the proxy's version and
// command line, what it logs, who protects its records, and what TLS was spoken: by
// the load itself where it made handshakes, otherwise on the path.
func (r *Report) Describe() {
	for i := range r.Rows {
		row := &r.Rows[i]
		if len(row.Runs) == 0 {
			continue
		}
		for _, p := range r.Paths {
			if p.Mode == row.Mode && p.Placement == row.Scenario.Placement {
				row.TLS, row.Logs, row.Records = p.TLS, p.Logs, p.Records
				row.Program = r.program(p)
			}
		}
		if own := row.agreed(); own != "" {
			row.TLS = []string{own}
		}
	}
}

// program is a path's version and command line, in short; the path has them in full.
func (r *Report) program(p Path) string {
	if len(p.Commands) == 0 {
		return ""
	}
	version := p.Version
	if strings.HasPrefix(version, "as ") { // this program itself
		version = r.Version
	}
	words := strings.Fields(p.Commands[0])
	for i, w := range words {
		if filepath.IsAbs(w) {
			words[i] = filepath.Base(w)
		}
	}
	return shortVersion(version) + " " + strings.Join(words, " ")
}

// setup is a row's program and what it does besides, in a cell of a table.
func (r Row) setup() string {
	out := r.Program
	if out == "" {
		return "–"
	}
	if r.Logs != "" {
		out += "; " + r.Logs
	}
	if r.Records != "" && len(r.TLS) > 0 {
		out += "; records " + r.Records
	}
	return out
}

// agreed is what the client's own handshakes agreed to.
func (r Row) agreed() string {
	for _, run := range r.Runs {
		if run.Result.Agreed != "" {
			return run.Result.Agreed
		}
	}
	return ""
}

// notes say what each mode is.
func (p *printer) notes(r *Report) {
	p.f("\nmodes\n")
	for _, path := range r.Paths {
		p.f("  %s, %s: %s\n", path.Mode, path.Placement, path.About)
		for _, line := range [][2]string{{"TLS on the wire", strings.Join(path.TLS, " | ")}, {"TLS records", path.Records}, {"program", strings.Join(path.Commands, " | ")}, {"version", path.Version}, {"writes, serves", path.Logs}} {
			if line[1] != "" {
				p.says(fmt.Sprintf("    %-17s", line[0]), line[1])
			}
		}
	}
	if s := r.firstInTurn(); s.N > 5 {
		p.f("\nFirst in their turn, runs had %s of the same mode's others (%d rows; 1 is no difference).\n", s.Interval(), s.N)
	}
	p.f("\n%s\nTook %s.\n", strings.Join(legend, "\n"), r.Took.Round(time.Second))
}

// legend says how figures are to be read.
var legend = []string{
	"rate: payload received or requests answered; p50 and so on: of each run, then the median of runs.",
	"In parentheses after a figure: quartiles of runs.",
	"Ratios are taken round by round. In parentheses: the interval that has the median of all such pairs in it, by order",
	"statistics, with 95 % or more from six rounds on; the extremes of 5, 4, 3 or 2 rounds have it with 94, 88, 75 or 50 %.",
	"CPU-s are per GB (10^9 bytes) or per 1000 requests; machine is everything, client, server and kernel included.",
}

func orDash(s string) string {
	if s == "" {
		return "–"
	}
	return s
}

// lineWidth is what a terminal shows of a line.
const lineWidth = 120

// table is aligned by columns. Columns that do not fit into a line follow below, after
// the first one again.
type table [][]string

func (t table) print(p *printer) {
	var width []int
	for _, line := range t {
		for i, cell := range line {
			if i == len(width) {
				width = append(width, 0)
			}
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for from := 1; from == 1 || from < len(width); {
		to, used := from, 0
		if len(width) > 0 {
			used = 2 + width[0]
		}
		for to < len(width) && (to == from || used+2+width[to] <= lineWidth) {
			used += 2 + width[to]
			to++
		}
		for _, line := range t {
			var b strings.Builder
			for i, cell := range line {
				if i == 0 || from <= i && i < to {
					b.WriteString("  " + cell + strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell)))
				}
			}
			p.f("%s\n", strings.TrimRight(b.String(), " "))
		}
		from = max(to, from+1)
	}
}

// wrapped prints words after a heading, in lines of the same width.
func (p *printer) wrapped(head string, words []string) { p.fold(head, words, "  ") }

// says prints a sentence likewise.
func (p *printer) says(head, text string) { p.fold(head, strings.Fields(text), " ") }

func (p *printer) fold(head string, words []string, between string) {
	line, indent := head, strings.Repeat(" ", utf8.RuneCountInString(head))
	for i, word := range words {
		if i > 0 && utf8.RuneCountInString(line+between+word) > lineWidth {
			p.f("%s\n", strings.TrimRight(line, " "))
			line = indent
		} else if i > 0 {
			line += between
		}
		line += word
	}
	p.f("%s\n", strings.TrimRight(line, " "))
}
