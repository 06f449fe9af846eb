package report

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// Text writes the report for people.
func (r *Report) Text(w io.Writer) error {
	p := &printer{w: w}
	p.head(r)
	for _, g := range r.Groups() {
		p.group(r, g)
	}
	p.bars(r)
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
	p.f("%s · %s\n", r.Version, strings.Join(r.Command, " "))
	p.f("%s, %d CPUs, %d GiB, Linux %s, %s, load %.2f before\n", r.Machine.CPU, r.Machine.CPUs, (r.Machine.Memory+1<<29)>>30, r.Machine.Kernel, r.Machine.Go, r.Machine.LoadAvg)
	p.f("%s\n", r.Settings)
	for _, s := range r.Warnings() {
		p.f("%s\n", s)
	}
}

// Warnings are what makes figures doubtful.
func (r *Report) Warnings() []string {
	var out []string
	if r.Settings.Profiled {
		out = append(out, notMeasured)
	}
	// Half of it may be the invocation before.
	if r.Machine.CPUs > 0 && r.Machine.LoadAvg > 0.75*float64(r.Machine.CPUs) {
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
			p.f("  not measured because the scenario was not run: %s\n", strings.Join(elsewhere, ", "))
		}
		p.f("  within noise: the bar lies between the quartiles, with less than 4 rounds between the extremes.\n")
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
	out := fmt.Sprintf("%d rounds of %s after %s, modes in turn; runs with more than %.1f %% stolen CPU repeated; %s, the same for all node proxies",
		s.Rounds, s.For, s.Warm, 100*s.MaxSteal, log)
	if len(s.Env) > 0 {
		out += "; " + strings.Join(s.Env, " ")
	}
	return out
}

// group is a scenario's table and, below it, what it says about us.
func (p *printer) group(r *Report, g Group) {
	p.f("\n%s · %s  [%s]\n", g.Scenario.Title, g.Scenario.Placement, g.Scenario.Name)
	metrics := g.Metrics()
	t := table{{"mode"}}
	for _, m := range metrics {
		t[0] = append(t[0], m.Unit)
	}
	for _, row := range g.Rows {
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
		t = append(t, line)
	}
	t.print(p)
	t = table{}
	for _, pair := range g.Pairs() {
		line := []string{pair.Subject.Mode + " / " + pair.Other.Mode}
		for _, m := range metrics {
			if m.Better != 0 && m.Name != MetricErrors && m.Name != "switches" {
				if s := SpreadOf(Ratios(pair.Subject, pair.Other, m)); s.N > 0 {
					line = append(line, m.Name+" "+s.String())
				}
			}
		}
		if len(line) > 1 {
			t = append(t, line)
		}
	}
	t.print(p)
	for _, row := range g.Rows {
		p.remarks(row)
	}
}

// remarks says what is wrong with a row's runs.
func (p *printer) remarks(row Row) {
	if row.LeftOut != "" {
		p.f("  %s: left out, %s\n", row.Mode, row.LeftOut)
	}
	if agreed := row.agreed(); agreed != "" {
		p.f("  %s: %s\n", row.Mode, agreed)
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
	t := table{{"mode", "placement", "what", "TLS on the wire", "program", "version"}}
	for _, path := range r.Paths {
		t = append(t, []string{path.Mode, path.Placement, path.About, orDash(strings.Join(path.TLS, " | ")), orDash(strings.Join(path.Commands, " | ")), orDash(path.Version)})
	}
	t.print(p)
	p.f("\nrate: payload received or requests answered; p50 and so on: of each run, then the median of runs; a figure in parentheses: quartiles of runs.\n")
	p.f("Ratios are taken round by round. CPU-s are per GB (10^9 bytes) or per 1000 requests; machine is everything, client, server and kernel included.\n")
	p.f("Took %s.\n", r.Took.Round(time.Second))
}

func orDash(s string) string {
	if s == "" {
		return "–"
	}
	return s
}

// table is aligned by columns; its first is flush left, as are words elsewhere.
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
	for _, line := range t {
		var b strings.Builder
		for i, cell := range line {
			b.WriteString("  " + cell + strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell)))
		}
		p.f("%s\n", strings.TrimRight(b.String(), " "))
	}
}
