package scenario

import (
	"context"
	"errors"
	"fmt"
	"maps"
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
	// Begin starts what goes on beside a load of a length; end ends it.
	Begin(ctx context.Context, p topo.Path, b topo.Beside, length time.Duration) (end func(load.Result) (map[string]float64, error), err error)
	// Gather makes the control plane know so much.
	Gather(ctx context.Context, c topo.Crowd) error
	// Renew replaces a path's proxies by processes that have done nothing yet.
	Renew(ctx context.Context, mode string, p topo.Placement) error
}

// Runner measures scenarios.
type Runner struct {
	Network  Network
	Modes    []string
	Settings report.Settings
	// Progress is told before each run, and after it with its result.
	Progress func(Step)
	// Measured is told after each scenario what there is; nil: nobody wants to know.
	Measured func([]report.Row)
	// Pinned puts the clients and servers of all scenarios on CPUs of their own.
	Pinned bool
	// Sparse gives scenarios that only the set All has a third of the rounds, and
	// counts no system calls in them: they are many, and nothing depends on one.
	Sparse bool

	turns   int // rounds begun, of all scenarios
	elapsed struct {
		since           time.Time
		estimated, left time.Duration // by Estimate's figures: of what was done, and of what was not
	}
}

// Step is a moment of a measurement.
type Step struct {
	Done, Of int           // runs
	Left     time.Duration // about how long it will still take
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
	r.turns, r.elapsed.since, r.elapsed.estimated, r.elapsed.left = 0, time.Now(), 0, r.Estimate(scenarios)
	for _, s := range scenarios {
		cost := r.cost(s)
		if err := r.Network.Gather(ctx, s.Crowd); err != nil {
			return rows, fmt.Errorf("prepare %s: %w", s.Name, err)
		}
		r.spent(cost.once)
		modes := r.modesOf(s)
		group := make([]report.Row, len(modes))
		for i, m := range modes {
			group[i] = report.Row{Scenario: s.described(), Mode: m}
			group[i].Scenario.Load.Pinned = r.pinned(s)
			group[i].Scenario.Load.Warm, group[i].Scenario.Load.For = r.Settings.Warm, r.length(s)
		}
		first := r.firstTurn(r.rounds(s))
		for round := range r.rounds(s) {
			for k := range modes {
				i := turn(k, first+round, len(modes))
				run, err := r.one(ctx, Step{Done: done, Of: total, Scenario: s, Mode: modes[i], Round: round}, cost.run)
				if err != nil {
					return append(rows, measured(group)...), err
				}
				run.Place = k + 1
				group[i].Runs = append(group[i].Runs, run)
				done++
			}
		}
		for i := range group {
			if err := r.count(ctx, s, &group[i]); err != nil {
				return append(rows, group...), err
			}
			r.spent(cost.count)
		}
		rows = append(append(rows, group...), r.leftOut(s)...)
		if r.Measured != nil {
			r.Measured(rows)
		}
	}
	return rows, nil
}

// firstTurn is the number of a scenario's first round among all: who is first goes on
// from one scenario to the next, as few rounds are not enough for everybody to be. A
// turn and its reverse stay together.
func (r *Runner) firstTurn(rounds int) int {
	if rounds > 1 {
		r.turns += r.turns % 2
	}
	first := r.turns
	r.turns += rounds
	return first
}

// turn says who of n is at place k in a round. Rounds come in pairs, an order and its reverse, so that of each two modes
// either is the earlier one equally often. Orders are rows of a Williams design (0, 1, n-1, 2, n-2 and so on, each
// shifted by one): over n rounds, 2n where n is odd, everybody is at each place, and directly after each other, equally
// often.
func turn(k, round, n int) int {
	if round%2 == 1 {
		k = n - 1 - k
	}
	zigzag := (k + 1) / 2
	if k%2 == 0 && k > 0 {
		zigzag = n - k/2
	}
	return (zigzag + round/2) % n
}

// countFor is enough to count system calls.
const countFor = 250 * time.Millisecond

// count makes one more short run of a mode in which system calls are counted, and
// nothing else is believed.
func (r *Runner) count(ctx context.Context, s Scenario, row *report.Row) error {
	path, _ := r.Network.Path(row.Mode, s.Placement) // modesOf has asked
	if !r.counts(s) || !slices.ContainsFunc(path.Watch, func(p load.Process) bool { return p.Proxy }) {
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
func (s Scenario) countable() bool {
	kind := s.Load.Kind
	return s.Beside == "" && slices.Contains([]string{load.Up, load.Down, load.Ask, load.Connect, load.Rate, load.HTTP, load.GRPC, load.GRPCStream}, kind)
}

// rounds is how often a scenario runs. Memory of idle connections is no matter of
// chance, and opening them takes long.
func (r *Runner) rounds(s Scenario) int {
	if s.Load.Kind == load.Idle || s.Once {
		return 1
	}
	if r.sparse(s) {
		return max(1, r.Settings.Rounds/3)
	}
	return r.Settings.Rounds
}

func (r *Runner) sparse(s Scenario) bool { return r.Sparse && s.Set == All }

// counts says whether system calls are counted in a scenario.
func (r *Runner) counts(s Scenario) bool {
	return r.Settings.Syscalls && s.countable() && !r.sparse(s)
}

// pinned says whether client and server are on CPUs of their own. Whoever makes
// handshakes has no server.
func (r *Runner) pinned(s Scenario) bool {
	return s.Load.Pinned || r.Pinned && s.Load.Kind != load.Handshake && s.Load.Kind != load.Tunnel
}

// length is how long a run is measured.
func (r *Runner) length(s Scenario) time.Duration { return max(r.Settings.For, s.AtLeast) }

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
		if p, ok := r.Network.Path(m, s.Placement); ok && s.lacks(p) == "" {
			out = append(out, m)
		}
	}
	return out
}

// leftOut are the rows of modes in which a scenario makes no sense.
func (r *Runner) leftOut(s Scenario) (rows []report.Row) {
	for _, m := range r.Modes {
		if p, ok := r.Network.Path(m, s.Placement); ok && s.lacks(p) != "" {
			rows = append(rows, report.Row{Scenario: s.described(), Mode: m, LeftOut: s.lacks(p)})
		}
	}
	return rows
}

// one makes a run, and again while CPU is stolen. Only the end of ctx is an error:
// a run that fails is part of the report.
func (r *Runner) one(ctx context.Context, step Step, cost time.Duration) (report.Run, error) {
	spec := step.Scenario.Load
	spec.Warm, spec.For = r.Settings.Warm, r.length(step.Scenario)
	spec.Pinned = r.pinned(step.Scenario)
	spec.Label = fmt.Sprintf("%s.%s.round%d", step.Scenario.Name, step.Mode, step.Round+1)
	run := report.Run{Round: step.Round + 1}
	for ; ; run.Repeated++ {
		step.Repeat = run.Repeated
		r.tell(step, nil)
		if step.Scenario.Fresh {
			if err := r.Network.Renew(ctx, step.Mode, step.Scenario.Placement); err != nil && ctx.Err() == nil {
				run.Failed = fmt.Errorf("replace the proxies: %w", err).Error()
				break
			}
		}
		result, stolen, err := r.measure(ctx, step, spec)
		if ctx.Err() != nil {
			return run, fmt.Errorf("measure %s over %s: %w", step.Scenario.Name, step.Mode, context.Cause(ctx))
		}
		run.Result = result
		if err != nil {
			run.Failed = err.Error()
			break
		}
		if max(stolen, result.StealShare()) <= r.Settings.MaxSteal {
			break
		}
		if run.Repeated == attempts-1 {
			run.Stolen = true
			break
		}
	}
	step.Done++
	r.spent(cost)
	r.tell(step, &run)
	return run, nil
}

// longBaseline is enough of a baseline, where it shall take long at all.
const longBaseline = 5 * time.Second

// measure makes a load, and where something is to go on beside it, first the one
// that it is compared with. Stolen is the share of CPU that was taken from the latter.
func (r *Runner) measure(ctx context.Context, step Step, spec load.Spec) (result load.Result, stolen float64, err error) {
	s := step.Scenario
	if s.Beside == "" {
		path, _ := r.Network.Path(step.Mode, s.Placement) // modesOf has asked
		result, err = r.Network.Run(ctx, path, spec)
		return result, 0, err
	}
	var baseline *load.Baseline
	if s.Baseline.There {
		alone := spec
		alone.For = min(spec.For, max(r.Settings.For, longBaseline))
		before, err := r.beside(ctx, step, alone, s.Baseline.Beside)
		if err != nil {
			return before, 0, fmt.Errorf("measure what it is compared with: %w", err)
		}
		stolen = before.StealShare()
		baseline = &load.Baseline{Elapsed: before.Elapsed, Ops: before.Ops, Errors: before.Errors, Latency: before.Latency, Steal: before.Machine.Steal}
	}
	result, err = r.beside(ctx, step, spec, s.Beside)
	result.Baseline = baseline
	return result, stolen, err
}

// beside makes a load while something goes on.
func (r *Runner) beside(ctx context.Context, step Step, spec load.Spec, b topo.Beside) (load.Result, error) {
	path, _ := r.Network.Path(step.Mode, step.Scenario.Placement) // modesOf has asked
	if b == "" {
		return r.Network.Run(ctx, path, spec)
	}
	spec.Beside = string(b)
	end, err := r.Network.Begin(ctx, path, b, spec.Warm+spec.For)
	if err != nil {
		return load.Result{}, err
	}
	result, err := r.Network.Run(ctx, path, spec)
	figures, endErr := end(result)
	if result.Figures == nil {
		result.Figures = figures
	} else {
		maps.Copy(result.Figures, figures)
	}
	return result, errors.Join(err, endErr)
}

func (r *Runner) tell(s Step, run *report.Run) {
	if r.Progress != nil {
		s.Run, s.Left = run, r.left()
		r.Progress(s)
	}
}

// Estimate is about how long a measurement takes without the lab's start.
func (r *Runner) Estimate(scenarios []Scenario) (d time.Duration) {
	for _, s := range scenarios {
		c, modes := r.cost(s), time.Duration(len(r.modesOf(s)))
		d += c.once + modes*(time.Duration(r.rounds(s))*c.run+c.count)
	}
	return d
}

// cost is about what a scenario takes: once, per run, and per mode for counting.
type cost struct{ once, run, count time.Duration }

func (r *Runner) cost(s Scenario) (c cost) {
	const (
		between = 60 * time.Millisecond  // a process is started per run, and ends
		opening = 300 * time.Microsecond // a connection, several at a time
		renewal = 1500 * time.Millisecond
	)
	c.run = r.Settings.Warm + r.length(s) + between
	switch s.Load.Kind {
	case load.Idle:
		c.run = r.length(s) + between + time.Duration(s.Load.Conns)*opening
	case load.Settle:
		c.run = r.length(s) + between + time.Duration(s.Load.Total)*opening
	}
	if s.Beside != "" {
		c.run += s.Beside.Lead() + s.Beside.Extra()
	}
	if s.Baseline.There {
		c.run += r.Settings.Warm + min(r.length(s), max(r.Settings.For, longBaseline)) + between + s.Baseline.Beside.Lead()
	}
	if s.Fresh {
		c.run += renewal
	}
	if s.Crowd.Workloads > 0 {
		c.once = s.Crowd.Takes()
	}
	if r.counts(s) {
		c.count = min(r.Settings.Warm, countFor) + min(r.Settings.For, countFor) + between
	}
	return c
}

// spent takes something that was done from what is left.
func (r *Runner) spent(d time.Duration) {
	r.elapsed.estimated += d
	r.elapsed.left -= d
}

// left is what Estimate says of the rest, by how it has been right so far: a busy
// machine or one whose CPU is stolen is slower all the time.
func (r *Runner) left() time.Duration {
	const enough = 10 * time.Second // to judge by
	took := time.Since(r.elapsed.since)
	by := float64(took+enough) / float64(r.elapsed.estimated+enough)
	return time.Duration(float64(r.elapsed.left) * min(max(by, 0.5), 4))
}
