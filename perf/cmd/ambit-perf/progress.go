package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/perf/report"
	"github.com/ambit-mesh/ambit/perf/scenario"
)

// progress tells what is being measured: on a terminal in one line that changes,
// elsewhere one line per run.
type progress struct {
	w        io.Writer
	terminal bool
	done, of int // runs
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w}
	if f, ok := w.(*os.File); ok {
		_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
		p.terminal = err == nil
	}
	return p
}

func (p *progress) step(s scenario.Step) {
	p.done, p.of = s.Done, s.Of
	left := ""
	if s.Done < s.Of {
		left = " · " + seconds(s.Left) + " left"
	}
	line := fmt.Sprintf("[%d/%d%s] %s · %s · round %d", s.Done, s.Of, left, s.Scenario.Name, s.Mode, s.Round+1)
	if s.Repeat > 0 && s.Run == nil {
		line += fmt.Sprintf(" · again, CPU was stolen (%d)", s.Repeat)
	}
	if s.Run != nil {
		line += " · " + outcome(s)
	}
	switch {
	case p.terminal:
		fmt.Fprintf(p.w, "\r\x1b[K%s", line)
	case s.Run != nil:
		fmt.Fprintln(p.w, line)
	}
}

// outcome is a run's first figures.
func outcome(s scenario.Step) string {
	if s.Run.Failed != "" {
		return "failed: " + s.Run.Failed
	}
	var out []string
	for _, m := range report.Metrics(s.Scenario.Load.Kind)[:2] {
		if v, ok := m.Of(s.Scenario.Load, s.Run.Result); ok {
			out = append(out, report.SpreadOf([]float64{v}).String()+" "+m.Unit)
		}
	}
	return strings.Join(out, ", ")
}

func (p *progress) end() {
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
