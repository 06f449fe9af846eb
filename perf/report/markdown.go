package report

import (
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/ambit-mesh/ambit/perf/load"
)

// headline are the figures of a kind of load that a short table shows.
func headline(s load.Spec) []string {
	switch {
	case s.Kind == load.Idle:
		return []string{MetricPerConn, MetricBase}
	case s.Kind == load.Settle:
		return []string{MetricSettled}
	case s.Kind == load.Enrol:
		return []string{MetricPerPod, "agentpod", "agentcpu"}
	case s.Kind == load.Learn:
		return []string{MetricKnown, "learncpu"}
	case s.Kind == load.Decide:
		return []string{MetricEffect, "effects", MetricAgainst}
	case s.Kind == load.Handshake || s.Kind == load.Tunnel:
		return []string{MetricRate}
	case s.Beside != "":
		return []string{MetricKept, MetricTail, MetricStall}
	case s.PerSec > 0:
		return []string{MetricP50, MetricP99, MetricCPU}
	case s.Conns == 1 && !bulk(s):
		return []string{MetricP50, MetricCPU}
	}
	return []string{MetricRate, MetricCPU}
}

// Markdown writes short tables for a document: per section, the figures that a
// scenario is about, then what ours are of each other mode's, then bars and sizing. Nothing of the
// machine but its kind is in it.
func (r *Report) Markdown(w io.Writer) error {
	p := &printer{w: w}
	for _, s := range r.Warnings() {
		p.f("**%s**\n\n", s)
	}
	for _, s := range r.parts() {
		markdownTable(p, s.name, s.groups)
	}
	if t, _ := barLines(r.Judge(bars)); len(t) > 0 {
		p.f("| bar | | measured | rounds | |\n|---|---|---|---|---|\n")
		for _, line := range t {
			p.f("| %s | %s | %s | %s | %s |\n", line[1], line[2], line[3], line[4], line[0])
		}
		p.f("\n")
	}
	if s := r.SizingOf("ambit", ExampleNode); s.Measured() {
		for i, line := range s.lines() {
			p.f("| %s |\n", strings.Join(line, " | "))
			if i == 0 {
				p.f("|---|%s---|\n", strings.Repeat("---:|", len(line)-2))
			}
		}
		p.f("\n%s.\n\n", s.follows())
	}
	p.f("%s\n%s\n\n```sh\n", r.about(), strings.Join(legend, "\n"))
	for command := range strings.SplitSeq(strings.Join(r.PlainCommand(), " "), " ; ") {
		p.f("%s\n", command)
	}
	p.f("```\n")
	return p.err
}

func markdownTable(p *printer, place string, groups []Group) {
	t := overview(place, groups).withoutEmpty()
	for i, line := range t {
		p.f("| %s |\n", strings.Join(line[1:], " | "))
		if i == 0 {
			p.f("|%s\n", "---|---|"+strings.Repeat("---:|", len(line)-3))
		}
	}
	p.f("\n")
}

// overview has a line for each figure that a scenario is about: its scenario's name,
// which only the first has, its title, likewise, the figure's unit, then one column
// per mode and one for each comparison that a short table has room for.
func overview(head string, groups []Group) table {
	var modes []string
	var pairs [][2]string
	for _, g := range groups {
		for _, row := range g.Rows {
			if !slices.Contains(modes, row.Mode) && len(row.Runs) > 0 {
				modes = append(modes, row.Mode)
			}
		}
		for _, pair := range g.Pairs() {
			names := [2]string{pair.Subject.Mode, pair.Other.Mode}
			if !slices.Contains(pairs, names) && short(names) {
				pairs = append(pairs, names)
			}
		}
	}
	t := table{slices.Concat([]string{"", head, ""}, modes)}
	for _, names := range pairs {
		t[0] = append(t[0], names[0]+" / "+names[1])
	}
	for _, g := range groups {
		name, title := g.Scenario.Name, g.Scenario.Title
		for _, figure := range headline(g.Scenario.Load) {
			m, ok := metric(g.Scenario.Load.Kind, figure)
			if !ok {
				continue
			}
			cells, some := g.cells(m, modes, pairs)
			if some {
				t = append(t, append([]string{name, title, m.Unit}, cells...))
				name, title = "", "" // said once
			}
		}
	}
	return t
}

// cells are a figure's of modes and of comparisons; some is false where no mode has it.
func (g Group) cells(m Metric, modes []string, pairs [][2]string) (out []string, some bool) {
	for _, mode := range modes {
		cell := ""
		if row, ok := g.row(mode); ok {
			if s := SpreadOf(row.Values(m)); s.N > 0 {
				cell, some = figure(s.Median), true
			}
		}
		out = append(out, cell)
	}
	for _, names := range pairs {
		cell := ""
		x, okX := g.row(names[0])
		y, okY := g.row(names[1])
		if s := SpreadOf(Ratios(x, y, m)); okX && okY && s.N > 0 && m.Better != 0 {
			cell = s.Interval()
		}
		out = append(out, cell)
	}
	return out, some
}

// short are the comparisons that a short table has room for: with what is the same
// kind of thing.
func short(pair [2]string) bool {
	if pair[0] == "ambit-accelerated" {
		return pair[1] == "none"
	}
	return pair[1] != "none" && pair[1] != "relay" || pair[0] != "ambit"
}

// withoutEmpty leaves out columns, after those that say what a line is, in which nothing is.
func (t table) withoutEmpty() table {
	var out table
	for range t {
		out = append(out, nil)
	}
	for i := range t[0] {
		empty := i > 2
		for _, line := range t[1:] {
			empty = empty && (line[i] == "" || line[i] == "–")
		}
		if empty {
			continue
		}
		for k, line := range t {
			out[k] = append(out[k], line[i])
		}
	}
	return out
}

// about is what was measured, where.
func (r *Report) about() string {
	memory := (r.Machine.Memory + 1<<29) >> 30
	out := fmt.Sprintf("%s, %d CPUs, %d GiB, Linux %s, %s; %s. %s.", r.Machine.CPU, r.Machine.CPUs, memory, series(r.Machine.Kernel), r.Machine.Go, r.Version, r.Settings)
	for _, path := range r.Paths {
		if path.Mode == ztunnel && path.Version != "" {
			return out + " ztunnel: " + shortVersion(path.Version) + "."
		}
	}
	return out
}

// series is a kernel's version without what its builder calls it.
func series(kernel string) string {
	if i := strings.IndexAny(kernel, "-+"); i > 0 {
		return kernel[:i]
	}
	return kernel
}

// revision and release are how programs name what they were built of.
var (
	revision = regexp.MustCompile(`\b([0-9a-f]{7,12})[0-9a-f]*(-dirty)?\b`)
	release  = regexp.MustCompile(`(^|[ /])v?[0-9]+\.[0-9][^ /,]*`)
)

// shortVersion finds a release, or else a revision, in what a program says of itself.
func shortVersion(s string) string {
	if _, after, ok := strings.Cut(s, `GitRevision:"`); ok { // as Istio's say it
		s = after
	}
	if v := release.FindString(s); v != "" {
		return strings.Trim(v, " /")
	}
	if v := revision.FindStringSubmatch(s); v != nil {
		return v[1] + v[2]
	}
	if words := strings.Fields(s); len(words) > 2 && strings.HasPrefix(words[2], "go1") { // ours, built without a version
		return words[1]
	}
	return s
}

// PlainCommand is the command without what belongs to one machine: where files are.
func (r *Report) PlainCommand() []string {
	var out []string
	for args := r.Command; len(args) > 0; args = args[1:] {
		flag, value, joined := strings.Cut(args[0], "=")
		switch strings.TrimLeft(flag, "-") {
		case "json", "html", "bin", "profile":
			if strings.HasPrefix(flag, "-") {
				if !joined && len(args) > 1 {
					args = args[1:]
				}
				continue
			}
		case "peer":
			if !joined && len(args) > 1 {
				args = args[1:]
				value = args[0]
			}
			name, _, _ := strings.Cut(value, "=")
			out = append(out, "--peer", name+"=PATH")
			continue
		}
		switch {
		case filepath.IsAbs(args[0]):
			out = append(out, filepath.Base(args[0]))
		case strings.ContainsAny(args[0], "|$()*? "):
			out = append(out, "'"+args[0]+"'")
		default:
			out = append(out, args[0])
		}
	}
	return out
}
