// Package report is what a measurement found, and its forms: a table for people,
// JSON for machines, a page with plots, and the comparison of two of them. It
// computes nothing that is not in the runs. Everything here is pure.
package report

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
)

// Format is the version of the JSON form; readers refuse others.
const Format = 1

// Report is one invocation.
type Report struct {
	Format   int           `json:"format"`
	Started  time.Time     `json:"started"`
	Took     time.Duration `json:"took"`
	Command  []string      `json:"command"`
	Version  string        `json:"version"`
	Machine  Machine       `json:"machine"`
	Settings Settings      `json:"settings"`
	Paths    []Path        `json:"paths"`
	Rows     []Row         `json:"rows"`
	Stopped  string        `json:"stopped,omitempty"` // why it ended before everything was measured
}

// Machine is where it ran.
type Machine struct {
	CPU     string  `json:"cpu"`
	CPUs    int     `json:"cpus"`
	Memory  uint64  `json:"memory"`
	Kernel  string  `json:"kernel"`
	Go      string  `json:"go"`
	LoadAvg float64 `json:"loadAvg"` // of the last minute, before it began
}

// Settings are equal for all modes.
type Settings struct {
	Rounds    int           `json:"rounds"`
	Warm      time.Duration `json:"warm"`
	For       time.Duration `json:"for"`
	MaxSteal  float64       `json:"maxSteal"` // share of all CPU time above which a run is repeated
	AccessLog bool          `json:"accessLog"`
	Env       []string      `json:"env,omitempty"`      // of all node proxies
	Syscalls  bool          `json:"syscalls,omitempty"` // counted in a short run after the others
	Profiled  bool          `json:"profiled,omitempty"` // processes were profiled meanwhile: figures are no measurements
}

// Path is what a mode is, between two pods.
type Path struct {
	Mode      string   `json:"mode"`
	Placement string   `json:"placement"`
	About     string   `json:"about"`
	Version   string   `json:"version,omitempty"`
	Commands  []string `json:"commands,omitempty"`
	Settings  string   `json:"settings,omitempty"` // the file, or the variables, a peer was configured with
	Logs      string   `json:"logs,omitempty"`     // what it writes and serves meanwhile
	Records   string   `json:"records,omitempty"`  // who protects its TLS records
	TLS       []string `json:"tls,omitempty"`      // cipher suite and key exchange, as seen on the wire
}

// Scenario is what was asked of every mode.
type Scenario struct {
	Name      string    `json:"name"`
	Title     string    `json:"title"`
	Placement string    `json:"placement"`
	Load      load.Spec `json:"load"`
}

// Row is a mode in a scenario.
type Row struct {
	Scenario Scenario `json:"scenario"`
	Mode     string   `json:"mode"`
	TLS      []string `json:"tls,omitempty"`     // cipher suite and key exchange that this mode's proxies agree to, or the load itself did
	Runs     []Run    `json:"runs"`              // in the order of rounds
	Program  string   `json:"program,omitempty"` // version and command line of this mode's proxy
	Logs     string   `json:"logs,omitempty"`    // what it writes and serves meanwhile
	Records  string   `json:"records,omitempty"` // who protects its TLS records
	LeftOut  string   `json:"leftOut,omitempty"` // why there are none
	Counted  *Run     `json:"counted,omitempty"` // the run in which system calls were counted; its other figures are none
}

// Run is one of them.
type Run struct {
	Round    int         `json:"round"`
	Place    int         `json:"place,omitempty"`    // in its round: 1 ran first
	Repeated int         `json:"repeated,omitempty"` // times it was thrown away because CPU was stolen
	Stolen   bool        `json:"stolen,omitempty"`   // kept although CPU was stolen, after the last repetition
	Failed   string      `json:"failed,omitempty"`   // why there is no result
	Result   load.Result `json:"result"`
}

// Metric is one figure of a run.
type Metric struct {
	Name   string
	Unit   string
	Better int // +1: more is better, -1: less, 0: neither
	Of     func(load.Spec, load.Result) (float64, bool)
}

func quantile(q float64) func(load.Spec, load.Result) (float64, bool) {
	return func(_ load.Spec, r load.Result) (float64, bool) {
		v, ok := r.Latency.Quantile(q)
		return float64(v) / 1e3, ok
	}
}

// perWork is an amount per GB of a bulk load and per 1000 requests of others.
func perWork(amount func(load.Result) float64) func(load.Spec, load.Result) (float64, bool) {
	return func(s load.Spec, r load.Result) (float64, bool) {
		work := float64(r.Ops) / 1000
		if bulk(s) {
			work = float64(r.Bytes) / 1e9
		}
		if work == 0 || s.Kind == load.Idle {
			return 0, false
		}
		return amount(r) / work, true
	}
}

func bulk(s load.Spec) bool { return s.Kind == load.Up || s.Kind == load.Down }

// proxies adds up something over the proxies; ok is false where there are none.
func proxies(r load.Result, of func(load.Usage) float64) (sum float64, ok bool) {
	for _, u := range r.Usage {
		if u.Proxy {
			sum, ok = sum+of(u), true
		}
	}
	return sum, ok
}

func ofProxies(of func(load.Usage) float64) func(load.Spec, load.Result) (float64, bool) {
	return func(s load.Spec, r load.Result) (float64, bool) {
		sum, ok := proxies(r, of)
		if !ok {
			return 0, false
		}
		return perWork(func(load.Result) float64 { return sum })(s, r)
	}
}

// calls are system calls of proxies per MiB or per request.
func calls(s load.Spec, r load.Result) (float64, bool) {
	sum, ok := proxies(r, func(u load.Usage) float64 { return float64(u.Syscalls) })
	work := float64(r.Ops)
	if bulk(s) {
		work = float64(r.Bytes) / (1 << 20)
	}
	if !ok || sum == 0 || work == 0 {
		return 0, false
	}
	return sum / work, true
}

// Names of metrics that others refer to.
const (
	MetricRate = "rate"
	MetricP50  = "p50"
	MetricP99  = "p99"
	MetricCPU  = "cpu"

	MetricMachine  = "machine"
	MetricSyscalls = "syscalls"
	MetricHeap     = "heap"
	MetricRSS      = "rss"
	MetricPerConn  = "perconn"
	MetricErrors   = "errors"
	MetricKernel   = "kernel"

	MetricStall    = "stall"    // the longest request
	MetricKept     = "kept"     // rate, divided by that of the baseline
	MetricTail     = "tail"     // p99, likewise
	MetricSettled  = "settled"  // RSS of proxies after the wait, divided by what it was
	MetricAgainst  = "against"  // connections decided against a policy that had taken effect
	MetricPerPod   = "perpod"   // memory of the near proxy
	MetricKnown    = "known"    // memory of a proxy for workloads that became known
	MetricEffect   = "effect"   // from a declaration to the first connection decided by it
	MetricRise     = "rise"     // p99.9, minus that of the baseline
	MetricBase     = "base"     // memory of each proxy before idle connections
	MetricPushes   = "pushes"   // responses of the control plane
	MetricControl  = "control"  // its CPU
	MetricControlM = "controlm" // its memory
)

// Metrics are the figures of a kind of load, in the order of columns.
func Metrics(kind string) []Metric {
	unit, call := "k", "syscalls/op"
	if kind == load.Up || kind == load.Down {
		unit, call = "GB", "syscalls/MiB"
	}
	cpu := []Metric{
		{MetricCPU, "CPU-s/" + unit + " proxies", -1, ofProxies(func(u load.Usage) float64 { return u.CPU.Seconds() })},
		{MetricMachine, "CPU-s/" + unit + " machine", -1, perWork(func(r load.Result) float64 { return r.Machine.Busy.Seconds() })},
		{"switches", "switches/" + unit, -1, ofProxies(func(u load.Usage) float64 { return float64(u.Voluntary + u.Involuntary) })},
		{MetricSyscalls, call, -1, calls},
	}
	rss := Metric{MetricRSS, "RSS MiB proxies", -1, func(_ load.Spec, r load.Result) (float64, bool) {
		sum, ok := proxies(r, func(u load.Usage) float64 { return float64(u.RSS) })
		return sum / (1 << 20), ok
	}}
	heap := Metric{MetricHeap, "heap MiB proxies", -1, func(_ load.Spec, r load.Result) (float64, bool) {
		sum, _ := proxies(r, func(u load.Usage) float64 { return float64(u.Heap) })
		return sum / (1 << 20), sum > 0
	}}
	logged := Metric{"logged", "log lines", 0, func(_ load.Spec, r load.Result) (float64, bool) {
		return proxies(r, func(u load.Usage) float64 { return float64(u.LogLines) })
	}}
	failed := Metric{MetricErrors, "errors", -1, func(_ load.Spec, r load.Result) (float64, bool) { return float64(r.Errors), true }}
	tails := []Metric{
		{MetricP50, "p50 µs", -1, quantile(0.5)}, {"p90", "p90 µs", -1, quantile(0.9)},
		{MetricP99, "p99 µs", -1, quantile(0.99)}, {"p99.9", "p99.9 µs", -1, quantile(0.999)},
	}
	perSecond := Metric{MetricRate, "per s", +1, func(_ load.Spec, r load.Result) (float64, bool) {
		return float64(r.Ops) / r.Elapsed.Seconds(), r.Elapsed > 0
	}}
	more := slices.Concat(besides(), []Metric{rss, heap, logged, failed})
	switch kind {
	case load.Up, load.Down:
		rate := Metric{MetricRate, "GB/s", +1, func(_ load.Spec, r load.Result) (float64, bool) {
			return float64(r.Bytes) / 1e9 / r.Elapsed.Seconds(), r.Elapsed > 0
		}}
		return slices.Concat([]Metric{rate}, cpu, more)
	case load.Idle:
		return slices.Concat([]Metric{
			{"open", "connections", 0, func(_ load.Spec, r load.Result) (float64, bool) { return float64(r.Ops), true }},
			{MetricPerConn, "KiB/conn each proxy", -1, func(_ load.Spec, r load.Result) (float64, bool) {
				sum, ok := proxies(r, func(u load.Usage) float64 { return float64(u.Grown) })
				n, _ := proxies(r, func(load.Usage) float64 { return 1 })
				return sum / max(n, 1) / 1024 / float64(max(r.Ops, 1)), ok
			}},
			{MetricBase, "RSS MiB each before", -1, idleBase},
			{MetricKernel, "KiB/conn kernel, machine", 0, func(_ load.Spec, r load.Result) (float64, bool) {
				return float64(r.Machine.Kernel) / 1024 / float64(max(r.Ops, 1)), true
			}},
		}, more)
	case load.Settle:
		return slices.Concat([]Metric{
			{"open", "connections", 0, func(_ load.Spec, r load.Result) (float64, bool) { return float64(r.Ops), true }},
			{MetricSettled, "RSS after / before", -1, func(_ load.Spec, r load.Result) (float64, bool) {
				sum, ok := proxies(r, func(u load.Usage) float64 { return float64(u.RSS) })
				return sum / (1 << 20) / r.Figures[load.FigureBefore], ok && r.Figures[load.FigureBefore] > 0
			}},
			{"churned", "RSS MiB at its end", -1, figureOf(load.FigureChurned)},
		}, tails, more)
	case load.Enrol:
		return slices.Concat(enrolments(), []Metric{besidesDone, rss, heap, logged})
	case load.Learn:
		return slices.Concat(learnings(), []Metric{besidesDone, rss, heap, logged})
	case load.Decide:
		perSecond.Better = 0
		return slices.Concat([]Metric{perSecond}, more)
	case load.Rate:
		perSecond.Better = 0 // it is set
	}
	return slices.Concat([]Metric{perSecond}, tails, cpu, more)
}

// besides are the figures of loads beside which something else went on.
func besides() []Metric {
	milliseconds := func(r load.Result) (float64, bool) {
		return float64(r.Latency.Max()) / 1e6, r.Latency != nil // nil where no request was answered
	}
	return []Metric{
		{MetricStall, "longest ms", -1, func(s load.Spec, r load.Result) (float64, bool) {
			if s.Beside == "" {
				return 0, false
			}
			return milliseconds(r)
		}},
		{MetricKept, "rate / baseline", +1, func(_ load.Spec, r load.Result) (float64, bool) {
			if r.Baseline == nil || r.Baseline.Ops == 0 || r.Elapsed <= 0 {
				return 0, false
			}
			return float64(r.Ops) / r.Elapsed.Seconds() / (float64(r.Baseline.Ops) / r.Baseline.Elapsed.Seconds()), true
		}},
		{MetricTail, "p99 / baseline", -1, func(_ load.Spec, r load.Result) (float64, bool) {
			if r.Baseline == nil {
				return 0, false
			}
			with, ok := r.Latency.Quantile(0.99)
			without, had := r.Baseline.Latency.Quantile(0.99)
			return float64(with) / float64(max(without, 1)), ok && had
		}},
		{MetricRise, "p99.9 − baseline µs", 0, rise},
		{"unstalled", "baseline longest ms", 0, func(_ load.Spec, r load.Result) (float64, bool) {
			if r.Baseline == nil {
				return 0, false
			}
			return milliseconds(load.Result{Latency: r.Baseline.Latency})
		}},
		{"beside", "GB/s beside", +1, figureOf(load.FigureBeside)},
		{MetricEffect, "effect p50 ms", -1, figureOf(load.FigureEffect)},
		{"effects", "effect longest ms", -1, figureOf(load.FigureEffects)},
		{"missed", "without effect", -1, figureOf(load.FigureMissed)},
		{MetricAgainst, "connections against it later", -1, figureOf(load.FigureAgainst)},
		{"others", "beside, per s", 0, figureOf(load.FigureOthers)},
		{"changes", "changes/s", 0, figureOf(load.FigureChanges)},
		{MetricPushes, "pushes/s", -1, figureOf(load.FigurePushes)},
		{MetricControl, "CPU-s/s ambitd", -1, ofControl(func(r load.Result, u load.Usage) float64 { return u.CPU.Seconds() / r.Elapsed.Seconds() })},
		{MetricControlM, "RSS MiB ambitd", -1, ofControl(func(_ load.Result, u load.Usage) float64 { return float64(u.RSS) / (1 << 20) })},
		besidesDone,
	}
}

var besidesDone = Metric{"done", "s until done", 0, figureOf(load.FigureDone)}

// each is a figure of one of the things that come during a still load.
func each(of func(load.Result) (float64, bool)) func(load.Spec, load.Result) (float64, bool) {
	return func(_ load.Spec, r load.Result) (float64, bool) {
		v, ok := of(r)
		return v / float64(max(r.Ops, 1)), ok
	}
}

// agents adds up something over the agents that are measured.
func agents(r load.Result, of func(load.Usage) float64) (sum float64, ok bool) {
	for _, u := range r.Usage {
		if strings.HasPrefix(u.Name, load.Agent+"@") {
			sum, ok = sum+of(u), true
		}
	}
	return sum, ok
}

func grown(u load.Usage) float64 { return float64(u.Grown) }

func cpu(u load.Usage) float64 { return u.CPU.Seconds() }

// enrolments are what a pod costs that is taken into the mesh. Of the proxies only
// the near one has it.
func enrolments() []Metric {
	near := func(of func(load.Usage) float64) func(load.Result) (float64, bool) {
		return func(r load.Result) (float64, bool) {
			_, ok := proxies(r, of)
			return most(r, func(_ load.Result, u load.Usage) float64 { return of(u) }), ok
		}
	}
	agent := func(of func(load.Usage) float64) func(load.Result) (float64, bool) {
		return func(r load.Result) (float64, bool) { return agents(r, of) }
	}
	scaled := func(by float64, f func(load.Spec, load.Result) (float64, bool)) func(load.Spec, load.Result) (float64, bool) {
		return func(s load.Spec, r load.Result) (float64, bool) {
			v, ok := f(s, r)
			return v * by, ok
		}
	}
	later := func(u load.Usage) float64 { return u.Later.Seconds() }
	return []Metric{
		{MetricPerPod, "KiB/pod proxy", -1, scaled(1./1024, each(near(grown)))},
		{"podcpu", "CPU-ms/pod proxy", -1, scaled(1000, each(near(cpu)))},
		{"agentpod", "KiB/pod agent", -1, scaled(1./1024, each(agent(grown)))},
		{"agentcpu", "CPU-ms/pod agent", -1, scaled(1000, each(agent(cpu)))},
		{"podkernel", "KiB/pod kernel, machine", 0, scaled(1./1024, each(func(r load.Result) (float64, bool) { return float64(r.Machine.Kernel), true }))},
		{"idlecpu", "idle after: CPU-ms/s proxy", -1, func(_ load.Spec, r load.Result) (float64, bool) {
			v, ok := near(later)(r)
			return 1000 * v / r.Later.Seconds(), ok && r.Later > 0
		}},
		{"idleagent", "idle after: CPU-ms/s agent", -1, func(_ load.Spec, r load.Result) (float64, bool) {
			v, ok := agents(r, later)
			return 1000 * v / r.Later.Seconds(), ok && r.Later > 0
		}},
	}
}

// learnings are what workloads cost that become known, of the proxy that needs most.
func learnings() []Metric {
	return []Metric{
		{"learned", "workloads", 0, func(_ load.Spec, r load.Result) (float64, bool) { return float64(r.Ops), true }},
		{MetricKnown, "MiB for them, each proxy", -1, func(_ load.Spec, r load.Result) (float64, bool) {
			_, ok := proxies(r, grown)
			return most(r, func(_ load.Result, u load.Usage) float64 { return grown(u) }) / (1 << 20), ok
		}},
		{"learncpu", "CPU-s each proxy", -1, func(_ load.Spec, r load.Result) (float64, bool) {
			_, ok := proxies(r, cpu)
			return most(r, func(_ load.Result, u load.Usage) float64 { return cpu(u) }), ok
		}},
	}
}

// ofControl is something of the control plane, where it was watched.
func ofControl(of func(load.Result, load.Usage) float64) func(load.Spec, load.Result) (float64, bool) {
	return func(_ load.Spec, r load.Result) (float64, bool) {
		i := slices.IndexFunc(r.Usage, func(u load.Usage) bool { return u.Name == load.ControlPlane })
		if i < 0 || r.Elapsed <= 0 {
			return 0, false
		}
		return of(r, r.Usage[i]), true
	}
}

func figureOf(name string) func(load.Spec, load.Result) (float64, bool) {
	return func(_ load.Spec, r load.Result) (float64, bool) {
		v, ok := r.Figures[name]
		return v, ok
	}
}

// Metrics are the columns of a scenario: those of which some row has a figure.
func (g Group) Metrics() []Metric {
	return slices.DeleteFunc(Metrics(g.Scenario.Load.Kind), func(m Metric) bool {
		if m.Name == MetricErrors { // remarks say which
			return !slices.ContainsFunc(g.Rows, func(r Row) bool { return r.errors() > 0 })
		}
		return !slices.ContainsFunc(g.Rows, func(r Row) bool { return len(r.Values(m)) > 0 })
	})
}

// Values are a metric's of all runs that have it.
func (r Row) Values(m Metric) []float64 {
	var out []float64
	if m.Name == MetricSyscalls {
		if r.Counted != nil {
			if v, ok := r.Counted.value(r.Scenario.Load, m); ok {
				out = append(out, v)
			}
		}
		return out
	}
	for _, run := range r.Runs {
		if v, ok := run.value(r.Scenario.Load, m); ok {
			out = append(out, v)
		}
	}
	return out
}

func (run Run) value(s load.Spec, m Metric) (float64, bool) {
	if run.Failed != "" {
		return 0, false
	}
	return m.Of(s, run.Result)
}

// Repeated counts the runs that were thrown away, Stolen those that were kept
// although CPU was stolen, Failed those without result.
func (r Row) Repeated() (n int) {
	for _, run := range r.Runs {
		n += run.Repeated
	}
	return n
}

// Ratios are a row's figures divided by another's, round by round: what ran next
// to each other is compared with each other.
func Ratios(a, b Row, m Metric) []float64 {
	var out []float64
	if m.Name == MetricSyscalls { // there is one run
		p, q := a.Values(m), b.Values(m)
		if len(p) == 1 && len(q) == 1 && q[0] > 0 {
			out = append(out, p[0]/q[0])
		}
		return out
	}
	for _, x := range a.Runs {
		for _, y := range b.Runs {
			if x.Round != y.Round {
				continue
			}
			p, okP := x.value(a.Scenario.Load, m)
			q, okQ := y.value(b.Scenario.Load, m)
			if okP && okQ && q > 0 {
				out = append(out, p/q)
			}
		}
	}
	return out
}

// Group is a scenario with its rows, in the order of the report.
type Group struct {
	Scenario Scenario
	Rows     []Row
}

// Groups gathers rows by scenario, in the order of sections.
func (r *Report) Groups() []Group {
	var out []Group
	for _, row := range r.Rows {
		i := slices.IndexFunc(out, func(g Group) bool { return g.Scenario.Name == row.Scenario.Name })
		if i < 0 {
			out = append(out, Group{Scenario: row.Scenario})
			i = len(out) - 1
		}
		out[i].Rows = append(out[i].Rows, row)
	}
	order := sections()
	slices.SortStableFunc(out, func(a, b Group) int {
		return cmp.Compare(slices.Index(order, a.Scenario.section()), slices.Index(order, b.Scenario.section()))
	})
	return out
}

// sections are the parts of a report, in order.
func sections() (out []string) {
	for _, place := range []string{"between nodes", "one node", "one HTTP hop"} {
		for _, part := range []string{"bulk", "requests", "connections and handshakes", "HTTP and gRPC", "memory", "beside others", "changes of the mesh"} {
			out = append(out, place+": "+part)
		}
	}
	return out
}

// part is a section with what was measured of it.
type part struct {
	name   string
	groups []Group
}

func (r *Report) parts() (out []part) {
	for _, g := range r.Groups() {
		name := g.Scenario.section()
		if len(out) == 0 || out[len(out)-1].name != name {
			out = append(out, part{name: name})
		}
		out[len(out)-1].groups = append(out[len(out)-1].groups, g)
	}
	return out
}

// section is the part that a scenario belongs to.
func (s Scenario) section() string {
	place := map[string]string{"same-node": "one node", "http-hop": "one HTTP hop"}[s.Placement]
	if place == "" {
		place = "between nodes"
	}
	_, name, _ := strings.Cut(s.Name, "/")
	in := "requests"
	switch kind := s.Load.Kind; {
	case slices.Contains([]string{load.Idle, load.Settle, load.Enrol, load.Learn}, kind):
		in = "memory"
	case strings.HasPrefix(name, "mice") || strings.HasPrefix(name, "noisy"):
		in = "beside others"
	case s.Load.Beside != "":
		in = "changes of the mesh"
	case bulk(s.Load):
		in = "bulk"
	case slices.Contains([]string{load.Connect, load.Handshake, load.Tunnel}, kind):
		in = "connections and handshakes"
	case slices.Contains([]string{load.HTTP, load.GRPC, load.GRPCStream}, kind):
		in = "HTTP and gRPC"
	}
	return place + ": " + in
}

// subjects are the modes that are compared with all others.
var subjects = []string{"ambit", "ambit-accelerated", "net-http"}

// Pair is two rows of one scenario.
type Pair struct{ Subject, Other Row }

// Pairs lists the comparisons of a scenario.
func (g Group) Pairs() []Pair {
	var out []Pair
	for _, s := range g.Rows {
		if !slices.Contains(subjects, s.Mode) || len(s.Runs) == 0 {
			continue
		}
		for _, o := range g.Rows {
			if o.Mode != s.Mode && !slices.Contains(subjects, o.Mode) && len(o.Runs) > 0 {
				out = append(out, Pair{s, o})
			}
		}
	}
	return out
}

// Encode writes the JSON form.
func (r *Report) Encode(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", " ")
	return enc.Encode(r)
}

// Modes are those that have runs, in the order of the report.
func (r *Report) Modes() (out []string) {
	for _, row := range r.Rows {
		if len(row.Runs) > 0 && !slices.Contains(out, row.Mode) {
			out = append(out, row.Mode)
		}
	}
	return out
}

// Errors of reading a report.
var (
	errForeign = errors.New("it is none: want a file that ambit-perf run --json wrote")
	errCut     = errors.New("it ends in the middle: whoever wrote it was stopped, or had no room")
)

// Decode reads it.
func Decode(rd io.Reader) (*Report, error) {
	var r Report
	err := json.NewDecoder(rd).Decode(&r)
	_, garbled := errors.AsType[*json.SyntaxError](err)
	_, other := errors.AsType[*json.UnmarshalTypeError](err)
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil, fmt.Errorf("read report: %w", errCut)
	case errors.Is(err, io.EOF), garbled, other:
		return nil, fmt.Errorf("read report: %w (%w)", errForeign, err)
	case err != nil:
		return nil, fmt.Errorf("read report: %w", err)
	case r.Format != Format && r.Format != 0:
		return nil, fmt.Errorf("read report: format %d, want %d: measure again with this version", r.Format, Format)
	case r.Format == 0 || len(r.Rows) == 0:
		return nil, fmt.Errorf("read report: %w", errForeign)
	}
	for i, row := range r.Rows {
		if row.Mode == "" || row.Scenario.Name == "" || !load.Known(row.Scenario.Load.Kind) {
			return nil, fmt.Errorf("read report: %w: row %d has mode %q, scenario %q, load %q", errForeign, i+1, row.Mode, row.Scenario.Name, row.Scenario.Load.Kind)
		}
	}
	return &r, nil
}
