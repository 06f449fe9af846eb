package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/perf/peer"
	"github.com/ambit-mesh/ambit/perf/report"
	"github.com/ambit-mesh/ambit/perf/scenario"
	"github.com/ambit-mesh/ambit/perf/topo"
	"github.com/ambit-mesh/ambit/xds/boot"
)

// options are the flags of run.
type options struct {
	set         scenario.Set
	settings    report.Settings
	modes       []string
	peers       map[string]topo.Peer
	json, html  string
	profile     string
	output      string
	bin         string
	words       []string
	self        string
	accessLog   string
	pinned      bool
	quick, more bool
	given       map[string]bool // flags that are on the command line
}

func runOptions(args []string, stderr io.Writer) (options, error) {
	self, err := os.Executable()
	if err != nil {
		return options{}, err
	}
	o := options{peers: map[string]topo.Peer{}, self: self, set: scenario.Core}
	flags := flag.NewFlagSet("run", flag.ContinueOnError)
	flags.BoolVar(&o.quick, "quick", false, "the quick set, short runs: less than a minute without peers")
	flags.BoolVar(&o.more, "all", false, "every scenario; those beyond the core set in a third of the rounds")
	flags.Func("modes", "comma-separated `list`; default: "+strings.Join(topo.BuiltIn, ",")+" and all peers", func(s string) error {
		o.modes = strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
		if len(o.modes) == 0 {
			return errors.New("want one mode or more")
		}
		return nil
	})
	flags.Func("peer", "`NAME[:KIND]=PROGRAM`: another node proxy that speaks as Istio's, or for one HTTP hop a program of kind envoy, haproxy or nginx, measured as mode NAME; the kind is recognised by the name; may be repeated", o.peer)
	flags.Func("rounds", "`rounds`, 1 to 1000; default: of the set", func(s string) (err error) {
		o.settings.Rounds, err = strconv.Atoi(s)
		if err != nil || o.settings.Rounds < 1 || o.settings.Rounds > 1000 {
			return errors.New("want a number from 1 to 1000")
		}
		return nil
	})
	flags.Func("for", "`length` of a run, as 500ms or 2s; default: of the set", lengthOf(&o.settings.For, time.Millisecond))
	flags.Func("warm", "`time` before it that is not measured; default: of the set", lengthOf(&o.settings.Warm, 0))
	flags.Float64Var(&o.settings.MaxSteal, "max-steal", 0.01, "share of CPU time that may be stolen before a run is repeated")
	flags.BoolVar(&o.settings.Syscalls, "syscalls", true, "count the system calls of proxies, in one more short run of each mode that is not measured")
	flags.BoolVar(&o.pinned, "pinned", false, "clients and servers on CPUs of their own; scenarios whose name says so do it in any case")
	flags.StringVar(&o.accessLog, "access-log", "on", "`on|off` for all node proxies")
	flags.Func("env", "`NAME=VALUE` for all node proxies; may be repeated", func(s string) error {
		if strings.Index(s, "=") < 1 {
			return errors.New("want NAME=VALUE")
		}
		o.settings.Env = append(o.settings.Env, s)
		return nil
	})
	flags.StringVar(&o.profile, "profile", "", "keep CPU, allocation, heap, block, mutex and execution-trace profiles of our processes, per run, in this `directory`; such runs are no measurements")
	flags.StringVar(&o.json, "json", "", "keep the report in this `file`, as JSON")
	flags.StringVar(&o.html, "html", "", "write the page with plots to this `file`")
	flags.StringVar(&o.output, "o", "table", "what is printed: `table|json`")
	flags.StringVar(&o.bin, "bin", filepath.Dir(self), "`directory` of ambit-lab, ztunnel and the others")
	if err := parse(flags, &args, stderr); err != nil {
		return o, err
	}
	o.words, o.given = args, given(flags)
	return o, o.finish()
}

// lengthOf reads a time from a flag.
func lengthOf(d *time.Duration, least time.Duration) func(string) error {
	const most = time.Hour
	return func(s string) (err error) {
		if *d, err = time.ParseDuration(s); err != nil || *d < least || *d > most {
			return fmt.Errorf("want a time from %s to %s, as 500ms or 2s", least, most)
		}
		return nil
	}
}

// peer takes NAME=PROGRAM or NAME:KIND=PROGRAM. The name becomes a namespace's.
func (o *options) peer(s string) error {
	name, program, ok := strings.Cut(s, "=")
	name, kind, given := strings.Cut(name, ":")
	if !ok || name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return errors.New("want NAME=PROGRAM or NAME:KIND=PROGRAM, the name of small letters, digits and -")
	}
	p := topo.Peer{Kind: peer.KindOf(name)}
	if given {
		if p.Kind = peer.Kind(kind); p.Kind != peer.Ztunnel && !slices.Contains(peer.HTTP, p.Kind) {
			return fmt.Errorf("kind %q: want %s, %s, %s or %s", kind, peer.Ztunnel, peer.Envoy, peer.HAProxy, peer.Nginx)
		}
	}
	if slices.Contains(topo.BuiltIn, name) || slices.Contains([]string{"plain", "accelerated", "default"}, name) {
		return fmt.Errorf("%q is taken: choose another name", name)
	}
	if o.peers[name] != (topo.Peer{}) {
		return fmt.Errorf("%q is given twice: choose another name", name)
	}
	program, err := filepath.Abs(program)
	if err != nil {
		return err
	}
	if err := unix.Access(program, unix.X_OK); err != nil {
		return fmt.Errorf("run %s: %w", program, err)
	}
	if st, err := os.Stat(program); err != nil || !st.Mode().IsRegular() {
		return fmt.Errorf("run %s: not a program", program)
	}
	p.Program = program
	o.peers[name] = p
	return nil
}

func (o *options) finish() error {
	switch {
	case o.quick && o.more:
		return fmt.Errorf("%w: --quick and --all exclude each other", errUsage)
	case o.quick:
		o.set = scenario.Quick
	case o.more:
		o.set = scenario.All
	}
	rounds, warm, length := scenario.Defaults(o.set)
	if o.profile != "" {
		o.settings.Syscalls = false
		// Profiles are windows of whole seconds; one of them says enough.
		o.settings.Profiled, rounds, length = true, 1, 3*time.Second
	}
	if !o.given["rounds"] {
		o.settings.Rounds = rounds
	}
	if !o.given["for"] {
		o.settings.For = length
	}
	if !o.given["warm"] {
		o.settings.Warm = warm
	}
	if s := o.settings.MaxSteal; !(s >= 0 && s <= 1) {
		return fmt.Errorf("%w: --max-steal %v: want a share from 0 to 1", errUsage, s)
	}
	for flag, file := range map[string]string{"json": o.json, "html": o.html} {
		if file == "" {
			continue
		}
		// Minutes from now it would be too late to say so.
		if err := writable(file); err != nil {
			return fmt.Errorf("%w: --%s %s: %w", errUsage, flag, file, err)
		}
	}
	if o.output != "table" && o.output != "json" {
		return fmt.Errorf("%w: -o %s: want table or json", errUsage, o.output)
	}
	switch o.accessLog {
	case "on":
		o.settings.AccessLog = true
	case "off":
		// Both our proxy and its reference know this target.
		o.settings.Env = append(o.settings.Env, topo.NoAccessLog)
	default:
		return fmt.Errorf("%w: --access-log %s: want on or off", errUsage, o.accessLog)
	}
	return o.chooseModes()
}

// chooseModes takes those that are named, all otherwise.
func (o *options) chooseModes() error {
	peers := slices.Sorted(maps.Keys(o.peers))
	if !o.given["modes"] {
		o.modes = slices.Concat(topo.BuiltIn, peers)
		return nil
	}
	for i, m := range o.modes {
		if slices.Contains(o.modes[:i], m) {
			return fmt.Errorf("%w: --modes: %q is given twice", errUsage, m)
		}
		if !slices.Contains(topo.BuiltIn, m) && o.peers[m] == (topo.Peer{}) {
			return fmt.Errorf("%w: --modes: %q is neither one of %s nor a peer: give it a program with --peer %s=PROGRAM", errUsage, m, strings.Join(topo.BuiltIn, ", "), m)
		}
	}
	for _, name := range peers {
		if !slices.Contains(o.modes, name) {
			return fmt.Errorf("%w: --peer %s would not be measured: add %s to --modes %s, or leave the peer out", errUsage, name, name, strings.Join(o.modes, ","))
		}
	}
	return nil
}

// writable tells before anything is measured whether a file can be written then.
func writable(file string) error {
	_, err := os.Stat(file)
	fresh := errors.Is(err, fs.ErrNotExist)
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return fmt.Errorf("it cannot be written: %w: name a file in a directory that exists", errors.Unwrap(err))
	}
	if err := f.Close(); err != nil || !fresh {
		return err
	}
	return os.Remove(file)
}

// programs are what a lab is made of; net-http and the like need no mesh, but a lab
// has it all beside it.
var programs = []string{"ambit-lab", "ambit-sample", "ambitd", "ambit-node", "ambit-cni", "ztunnel"}

// prepared tells what is missing before a lab is started.
func (o *options) prepared() error {
	for _, name := range programs {
		if err := unix.Access(filepath.Join(o.bin, name), unix.X_OK); err != nil {
			return fmt.Errorf("run %s: %w: make build puts it beside ambit-perf; --bin names another directory", filepath.Join(o.bin, name), err)
		}
	}
	return nil
}

// fit leaves out the modes that no scenario has use for, which are not started. A
// peer is given to be measured.
func (o *options) fit(cfg topo.Config, list []scenario.Scenario, stderr io.Writer) error {
	var out []string
	for _, m := range o.modes {
		if slices.ContainsFunc(list, func(s scenario.Scenario) bool { return cfg.Supports(m, s.Placement) }) {
			out = append(out, m)
			continue
		}
		places := topo.Config{Peers: o.peers}
		first := topo.Placements[slices.IndexFunc(topo.Placements, func(p topo.Placement) bool { return places.Supports(m, p) })]
		if o.peers[m] != (topo.Peer{}) {
			return fmt.Errorf("%w: --peer %s would not be measured: it is for scenarios that begin with %s/, and none of them is chosen", errUsage, m, first)
		}
		if o.given["modes"] {
			fmt.Fprintf(stderr, "%s is left out: it is for scenarios that begin with %s/, and none of them is chosen\n", m, first)
		}
	}
	if o.modes = out; len(out) == 0 {
		return fmt.Errorf("%w: none of the modes exists for the chosen scenarios", errUsage)
	}
	return nil
}

func runCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := runOptions(args, stderr)
	if err != nil {
		return err
	}
	list, err := scenario.Select(scenario.Catalog(), o.set, o.words)
	if err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	cfg := topo.Config{Bin: o.bin, Self: o.self, Peers: o.peers, Env: o.settings.Env, Out: stderr}
	cfg.Placements = []topo.Placement{}
	for _, s := range list {
		cfg.Neighbours = cfg.Neighbours || s.Beside.Neighbourly()
		if !slices.Contains(cfg.Placements, s.Placement) {
			cfg.Placements = append(cfg.Placements, s.Placement)
		}
	}
	if err := o.fit(cfg, list, stderr); err != nil {
		return err
	}
	cfg.Modes = o.modes
	if err := o.prepared(); err != nil {
		return err
	}
	if o.profile != "" {
		if err := os.MkdirAll(o.profile, 0o755); err != nil {
			return err
		}
		cfg.ProfileDir = o.profile
	}
	machine, err := thisMachine()
	if err != nil {
		return err
	}
	r := &report.Report{Format: report.Format, Started: time.Now(), Command: append([]string{"ambit-perf", "run"}, args...), Machine: machine, Settings: o.settings}
	var version strings.Builder
	if err := boot.PrintVersion(&version, "ambit-perf", nil); err != nil {
		return err
	}
	r.Version = strings.TrimSpace(version.String())
	progress := newProgress(stderr)
	runner := &scenario.Runner{Network: planned{Config: cfg}, Modes: o.modes, Settings: o.settings, Progress: progress.step, Pinned: o.pinned, Sparse: o.more && len(o.words) == 0}
	fmt.Fprintf(stderr, "%d scenarios, about %s, longer where CPU is stolen and runs are repeated\nstarting a lab with %s\n", len(list), seconds(runner.Estimate(list)+starting), strings.Join(o.modes, ", "))
	lab, err := topo.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer lab.Close()
	runner.Network = lab
	runner.Measured = o.keeping(r, func() { r.Paths = paths(lab, o.modes, list) }, progress)
	var failed error
	r.Rows, failed = runner.Run(ctx, list)
	progress.end()
	r.Stopped = ""
	if failed != nil {
		r.Stopped = fmt.Sprintf("%d of %d runs were made: %v", progress.done, progress.of, failed)
	}
	r.Took = time.Since(r.Started)
	r.Paths = paths(lab, o.modes, list)
	r.Describe()
	if len(r.Rows) == 0 {
		return failed
	}
	if o.profile != "" {
		fmt.Fprintf(stderr, profileHint, o.profile)
	}
	return errors.Join(failed, o.write(r, stdout), failures(r))
}

// keepEvery is how often what was measured is written while it goes on: who is killed
// in the middle of half an hour loses this much.
const keepEvery = 30 * time.Second

// keeping writes the JSON form now and then.
func (o *options) keeping(r *report.Report, describe func(), progress *progress) func([]report.Row) {
	if o.json == "" {
		return nil
	}
	last := time.Now()
	return func(rows []report.Row) {
		if time.Since(last) < keepEvery {
			return
		}
		last = time.Now()
		r.Rows, r.Took = rows, time.Since(r.Started)
		r.Stopped = fmt.Sprintf("%d of %d runs were made, then it was killed", progress.done, progress.of)
		describe()
		r.Describe()
		_ = replaceFile(o.json, r.Encode) // it is written again at the end, which tells what is wrong
	}
}

// starting is about what the lab takes to come and go.
const starting = 5 * time.Second

// planned is a network that is not there yet: it knows which paths there will be.
type planned struct {
	scenario.Network
	topo.Config
}

func (p planned) Path(mode string, to topo.Placement) (topo.Path, bool) {
	return p.Planned(mode, to)
}

// failures is an error where a report has gaps. Others than a failed run are no
// reason to stop: what can be measured is.
func failures(r *report.Report) error {
	failed, all := 0, 0
	var first string
	for _, row := range r.Rows {
		for _, run := range row.Runs {
			all++
			if run.Failed == "" {
				continue
			}
			if failed++; first == "" {
				first = fmt.Sprintf("%s over %s: %s", row.Scenario.Name, row.Mode, run.Failed)
			}
		}
	}
	if failed == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d runs failed, the first: %s", failed, all, first)
}

// profileHint says how profiles are opened.
const profileHint = `profiles are in %[1]s, SCENARIO.MODE.ROUND.PROCESS.KIND:
  go tool pprof -http=: %[1]s/NAME.cpu.pb.gz       and .allocs, .heap, .block, .mutex; -top instead of -http=: for text,
                                                      -sample_index=alloc_space for what .allocs is about
  go tool pprof -diff_base %[1]s/A.cpu.pb.gz %[1]s/B.cpu.pb.gz
  go tool trace %[1]s/NAME.trace
`

// write gives the report its forms; what was measured before an interruption is
// worth keeping too.
func (o *options) write(r *report.Report, stdout io.Writer) error {
	var errs []error
	if o.json != "" {
		errs = append(errs, writeFile(o.json, r.Encode))
	}
	if o.html != "" {
		errs = append(errs, writeFile(o.html, r.HTML))
	}
	if o.output == "json" {
		errs = append(errs, r.Encode(stdout))
	} else {
		errs = append(errs, r.Text(stdout))
	}
	return errors.Join(errs...)
}

// paths describes the modes where they were used.
func paths(lab *topo.Lab, modes []string, list []scenario.Scenario) []report.Path {
	var out []report.Path
	for _, p := range topo.Placements {
		if !slices.ContainsFunc(list, func(s scenario.Scenario) bool { return s.Placement == p }) {
			continue
		}
		for _, m := range modes {
			if path, ok := lab.Path(m, p); ok {
				out = append(out, report.Path{Mode: m, Placement: string(p), About: path.About, Version: path.Version, Commands: path.Commands, Settings: path.Settings, Logs: path.Logs, Records: path.Records, TLS: lab.Agreed(path)})
			}
		}
	}
	return out
}

func thisMachine() (m report.Machine, err error) {
	m.CPUs, m.Go = runtime.NumCPU(), runtime.Version()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, os.NewSyscallError("uname", err)
	}
	m.Kernel = unix.ByteSliceToString(u.Release[:])
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, os.NewSyscallError("sysinfo", err)
	}
	m.Memory = uint64(info.Totalram) * uint64(info.Unit)
	m.CPU = "unknown CPU"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, after, ok := strings.Cut(string(b), "model name\t: "); ok {
			m.CPU, _, _ = strings.Cut(after, "\n")
		}
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		first, _, _ := strings.Cut(string(b), " ")
		m.LoadAvg, _ = strconv.ParseFloat(first, 64) // the kernel's own format
	}
	return m, nil
}
