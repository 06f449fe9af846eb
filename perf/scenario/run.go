package scenario

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
	"github.com/ambit-mesh/ambit/perf/report"
	"github.com/ambit-mesh/ambit/perf/topo"
)

// Network is what a Runner measures over; topo.Lab is one.
type Network interface {
	Path(mode string, p topo.Placement) (topo.Path, bool)
	Run(ctx context.Context, p topo.Path, s load.Spec) (load.Result, error)
}

// Runner measures scenarios.
type Runner struct {
	Network  Network
	Modes    []string
	Settings report.Settings
	// Progress is told before each run, and after it with its result.
	Progress func(Step)
}

// Step is a moment of a measurement.
type Step struct {
	Done, Of int // runs
	Scenario Scenario
	Mode     string
	Round    int
	Repeat   int         // 1 and up: CPU was stolen before
	Run      *report.Run // nil before the run
}

// attempts is how often a run with stolen CPU is made.
const attempts = 4

// Run measures; what was measured before ctx ended is returned with its error.
func (r *Runner) Run(ctx context.Context, scenarios []Scenario) ([]report.Row, error) {
	var rows []report.Row
	total, done := 0, 0
	for _, s := range scenarios {
		total += len(r.modesOf(s)) * r.rounds(s)
	}
	for _, s := range scenarios {
		modes := r.modesOf(s)
		group := make([]report.Row, len(modes))
		for i, m := range modes {
			group[i] = report.Row{Scenario: s.described(), Mode: m}
			group[i].Scenario.Load.Warm, group[i].Scenario.Load.For = r.Settings.Warm, r.Settings.For
		}
		for round := range r.rounds(s) {
			for k := range modes {
				i := (k + round) % len(modes) // nobody is always after the same one
				run, err := r.one(ctx, Step{Done: done, Of: total, Scenario: s, Mode: modes[i], Round: round})
				if err != nil {
					return append(rows, measured(group)...), err
				}
				group[i].Runs = append(group[i].Runs, run)
				done++
			}
		}
		for i := range group {
			if err := r.count(ctx, s, &group[i]); err != nil {
				return append(rows, group...), err
			}
		}
		rows = append(rows, group...)
	}
	return rows, nil
}

// countFor is enough to count system calls.
const countFor = 250 * time.Millisecond

// count makes one more short run of a mode in which system calls are counted, and
// nothing else is believed.
func (r *Runner) count(ctx context.Context, s Scenario, row *report.Row) error {
	path, _ := r.Network.Path(row.Mode, s.Placement) // modesOf has asked
	if !r.Settings.Syscalls || !countable(s.Load.Kind) || !slices.ContainsFunc(path.Watch, func(p load.Process) bool { return p.Proxy }) {
		return nil
	}
	spec := s.Load
	spec.Warm, spec.For, spec.Syscalls = min(r.Settings.Warm, countFor), min(r.Settings.For, countFor), true
	result, err := r.Network.Run(ctx, path, spec)
	if ctx.Err() != nil {
		return fmt.Errorf("count system calls of %s over %s: %w", s.Name, row.Mode, context.Cause(ctx))
	}
	row.Counted = &report.Run{Result: result}
	if err != nil {
		row.Counted.Failed = err.Error()
	}
	return nil
}

// countable are loads of which every moment is like the other.
func countable(kind string) bool {
	return slices.Contains([]string{load.Up, load.Down, load.Ask, load.Connect, load.Rate, load.HTTP, load.GRPC, load.GRPCStream}, kind)
}

// rounds is how often a scenario runs. Memory of idle connections is no matter of
// chance, and opening them takes long.
func (r *Runner) rounds(s Scenario) int {
	if s.Load.Kind == load.Idle {
		return 1
	}
	return r.Settings.Rounds
}

// measured are the rows that have a run.
func measured(rows []report.Row) []report.Row {
	var out []report.Row
	for _, r := range rows {
		if len(r.Runs) > 0 {
			out = append(out, r)
		}
	}
	return out
}

func (r *Runner) modesOf(s Scenario) []string {
	var out []string
	for _, m := range r.Modes {
		if _, ok := r.Network.Path(m, s.Placement); ok {
			out = append(out, m)
		}
	}
	return out
}

// one makes a run, and again while CPU is stolen. Only the end of ctx is an error:
// a run that fails is part of the report.
func (r *Runner) one(ctx context.Context, step Step) (report.Run, error) {
	path, _ := r.Network.Path(step.Mode, step.Scenario.Placement) // modesOf has asked
	spec := step.Scenario.Load
	spec.Warm, spec.For = r.Settings.Warm, r.Settings.For
	spec.Label = fmt.Sprintf("%s.%s.round%d", step.Scenario.Name, step.Mode, step.Round+1)
	run := report.Run{Round: step.Round + 1}
	for ; ; run.Repeated++ {
		step.Repeat = run.Repeated
		r.tell(step, nil)
		result, err := r.Network.Run(ctx, path, spec)
		if ctx.Err() != nil {
			return run, fmt.Errorf("measure %s over %s: %w", step.Scenario.Name, step.Mode, context.Cause(ctx))
		}
		run.Result = result
		if err != nil {
			run.Failed = err.Error()
			break
		}
		if result.StealShare() <= r.Settings.MaxSteal {
			break
		}
		if run.Repeated == attempts-1 {
			run.Stolen = true
			break
		}
	}
	step.Done++
	r.tell(step, &run)
	return run, nil
}

func (r *Runner) tell(s Step, run *report.Run) {
	if r.Progress != nil {
		s.Run = run
		r.Progress(s)
	}
}

// Estimate is about how long a measurement takes without the lab's start.
func (r *Runner) Estimate(scenarios []Scenario) time.Duration {
	const between = 60 * time.Millisecond // a process is started per run
	var d time.Duration
	for _, s := range scenarios {
		one := r.Settings.Warm + r.Settings.For + between
		if s.Load.Kind == load.Idle {
			one = r.Settings.For + time.Duration(s.Load.Conns)*300*time.Microsecond
		}
		d += one * time.Duration(len(r.modesOf(s))*r.rounds(s))
		if r.Settings.Syscalls && countable(s.Load.Kind) {
			d += time.Duration(len(r.modesOf(s))) * (min(r.Settings.Warm, countFor) + min(r.Settings.For, countFor) + between)
		}
	}
	return d
}
