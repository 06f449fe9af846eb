package topo

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
)

// Beside is what goes on in the lab while a load is measured.
type Beside string

// What there is. A neighbour is another pod of the client's node, which uses the
// same proxies on the way to another server: well-behaved, or not.
const (
	Elephant Beside = "an elephant"       // bulk between the load's own pods, as fast as it can
	Calf     Beside = "a paced elephant"  // the same, 100 MB/s
	Connects Beside = "fresh connections" // 64 at a time, a request on each
	Streams  Beside = "1000 streams"      // requests and answers of 64 KiB
	Greets   Beside = "64 handshakes at a time"

	AttackConnects Beside = "an attack with connections" // as many as it can, nothing on them
	AttackRefused  Beside = "an attack with connections to a port that nobody listens on"
	AttackStreams  Beside = "an attack with streams" // 1000 on which nothing is read
	AttackGreets   Beside = "an attack with handshakes"

	Changes Beside = "changes of objects"                    // 50 per second
	Toggles Beside = "changes of objects, and of one policy" // the load tells when it takes effect
	Rollout Beside = "a rolling restart of both proxies"
	Restart Beside = "a restart of the control plane"
	Arrival Beside = "70000 workloads that appear at once"

	Enrolment Beside = "100 pods that are taken into the mesh"
	Learning  Beside = "10000 workloads that become known"
)

// Neighbourly says that it needs a neighbour.
func (b Beside) Neighbourly() bool {
	switch b {
	case Connects, Streams, Greets, AttackConnects, AttackRefused, AttackStreams, AttackGreets:
		return true
	}
	return false
}

// Lead is how long it goes on before it is worth measuring beside.
func (b Beside) Lead() time.Duration {
	switch {
	case b.Neighbourly():
		return time.Second
	case b == Elephant || b == Calf:
		return 300 * time.Millisecond
	}
	return 0
}

// Extra is about how long it takes to prepare and to clear up after it.
func (b Beside) Extra() time.Duration {
	switch b {
	case Enrolment:
		return 15 * time.Second
	case Learning:
		return 15 * time.Second
	case Arrival:
		return 35 * time.Second
	case Toggles, Restart:
		return time.Second
	}
	return 0
}

// Crowd is how much the control plane knows besides the lab.
type Crowd struct{ Workloads, Services int }

// Takes is about how long it takes until everybody knows it.
func (c Crowd) Takes() time.Duration {
	return quiet + time.Duration(c.Workloads+c.Services)*400*time.Microsecond
}

// Sizes of Enrolment and Learning.
const (
	Pods      = 100
	Workloads = 10000
)

// clusterDir is where the lab's objects are published.
const clusterDir = "/run/ambit-lab/cluster"

// watched are the processes to measure: not those that are replaced meanwhile, and
// the control plane where it has something to do.
func (p Path) watched(b Beside, control int) []load.Process {
	var out []load.Process
	for _, w := range p.Watch {
		if b != Rollout || !w.Proxy {
			out = append(out, w)
		}
	}
	if (b == Changes || b == Toggles) && control != 0 {
		out = append(out, load.Process{Name: load.ControlPlane, PID: control})
	}
	return out
}

// Begin starts what goes on beside a load of about that length over a path. What it
// returns ends it, and has its figures.
func (l *Lab) Begin(ctx context.Context, p Path, b Beside, length time.Duration) (end func(load.Result) (map[string]float64, error), err error) {
	switch b {
	case Elephant, Calf:
		end, err = l.elephant(ctx, p, b, length)
	case Changes, Toggles:
		end, err = l.changes(ctx, p, b)
	case Rollout:
		end = l.later(ctx, length/4, "restart "+p.Near+" and "+p.Far, []string{"restart", "ztunnel@" + p.Near, "--rolling"}, []string{"restart", "ztunnel@" + p.Far, "--rolling"})
	case Arrival:
		end, err = l.arrival(ctx, length/8, Crowd{Workloads: 70000, Services: 1000})
	case Learning:
		end, err = l.learning(ctx, p, length)
	case Enrolment:
		end, err = l.enrolment(ctx, p, length)
	case Restart:
		end = l.later(ctx, length/4, "restart the control plane", []string{"restart", load.ControlPlane})
	default:
		end, err = l.neighbour(ctx, p, b, length)
	}
	if err != nil {
		return nil, fmt.Errorf("begin %s: %w", b, err)
	}
	select {
	case <-time.After(b.Lead()):
	case <-ctx.Done():
	}
	return end, nil
}

// aside is a command of the lab's beside others.
type aside struct {
	cmd       *exec.Cmd
	out, errs bytes.Buffer
}

func (l *Lab) aside(ctx context.Context, args ...string) (*aside, error) {
	a := &aside{cmd: l.command(ctx, args...)}
	a.cmd.Stdout, a.cmd.Stderr = &a.out, &a.errs
	a.cmd.Cancel = func() error { return a.cmd.Process.Signal(os.Interrupt) } // it hands signals on
	a.cmd.WaitDelay = 10 * time.Second
	return a, a.cmd.Start()
}

// end waits for the command, after a signal where it does not end by itself.
func (a *aside) end(sig os.Signal) error {
	if sig != nil {
		_ = a.cmd.Process.Signal(sig) // it may have ended, which Wait tells
	}
	if err := a.cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(a.errs.String()))
	}
	return nil
}

func (l *Lab) elephant(ctx context.Context, p Path, b Beside, length time.Duration) (func(load.Result) (map[string]float64, error), error) {
	spec := load.Spec{Kind: load.Up, Server: p.Server, Conns: 1, Size: 64 << 10, Warm: b.Lead(), For: length + 200*time.Millisecond}
	if b == Calf {
		spec.Pace = 100e6
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	a, err := l.aside(ctx, "exec", "client", "-n", p.Namespace, "--", l.Self, Client, string(text))
	if err != nil {
		return nil, err
	}
	return func(load.Result) (map[string]float64, error) {
		if err := a.end(nil); err != nil { // its time is up
			return nil, err
		}
		var r load.Result
		if err := json.Unmarshal(a.out.Bytes(), &r); err != nil {
			return nil, fmt.Errorf("read what the elephant measured: %w", err)
		}
		return map[string]float64{load.FigureBeside: float64(r.Bytes) / 1e9 / r.Elapsed.Seconds()}, nil
	}, nil
}

// neighbour lets another pod do something until it is told to end.
func (l *Lab) neighbour(ctx context.Context, p Path, b Beside, length time.Duration) (func(load.Result) (map[string]float64, error), error) {
	e := l.ends[p.Mode]
	server, closed, tunnels := e.otherIP+":9000", e.otherIP+":9999", fmt.Sprintf("%s:%d", e.otherIP, tunnelPort)
	pod, args := "neighbour", map[Beside][]string{
		Connects:       {"load", "--fresh", "--conns", "64", "--for", "10m", server},
		Streams:        {"load", "--conns", "1000", "--size", "65536", "--for", "10m", server},
		Greets:         {"load", "--tls", "--conns", "64", "--for", "10m", tunnels},
		AttackConnects: {"attack", "--n", "64", "connects", server},
		AttackRefused:  {"attack", "--n", "64", "connects", closed},
		AttackStreams:  {"attack", "--n", "1000", "stalled", server},
		AttackGreets:   {"attack", "--n", "10000", "handshakes", tunnels},
	}[b]
	if args == nil {
		return nil, errors.New("it is not known")
	}
	if b == Greets || b == AttackGreets {
		pod = "stranger" // whose connections no proxy takes
	}
	limit := strconv.Itoa(int((b.Lead() + length + 5*time.Second).Seconds())) // where nobody ends it
	began := time.Now()
	a, err := l.aside(ctx, append([]string{"exec", pod, "-n", p.Namespace, "--", "timeout", "-s", "INT", limit, "ambit-sample"}, args...)...)
	if err != nil {
		return nil, err
	}
	return func(load.Result) (map[string]float64, error) {
		if err := a.end(os.Interrupt); err != nil && a.out.Len() == 0 {
			return nil, err
		}
		var did struct {
			Opened, Requests, Refused float64
			Error                     string
		}
		if err := json.Unmarshal(a.out.Bytes(), &did); err != nil {
			return nil, fmt.Errorf("read what the neighbour did: %w", err)
		}
		n := cmp.Or(did.Opened, did.Requests)
		if b == AttackRefused { // where no proxy takes them they are
			n = did.Opened + did.Refused
		}
		if n == 0 {
			return nil, fmt.Errorf("the neighbour did nothing: %s", cmp.Or(did.Error, a.out.String()))
		}
		return map[string]float64{load.FigureOthers: n / time.Since(began).Seconds()}, nil
	}, nil
}

// later runs commands of the lab's in turn, some time from now.
func (l *Lab) later(ctx context.Context, after time.Duration, what string, commands ...[]string) func(load.Result) (map[string]float64, error) {
	wait := delayed(ctx, after, func() error {
		for _, args := range commands {
			if _, err := l.do(ctx, "", args...); err != nil {
				return err
			}
		}
		return nil
	})
	return func(load.Result) (map[string]float64, error) {
		took, err := wait()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		return map[string]float64{load.FigureDone: took.Seconds()}, l.refresh(ctx)
	}
}

// delayed has something done some time from now, unless ctx ends before. wait, which
// is called once, says how long it took.
func delayed(ctx context.Context, after time.Duration, do func() error) (wait func() (took time.Duration, err error)) {
	type ended struct {
		took time.Duration
		err  error
	}
	donec := make(chan ended, 1)
	go func() {
		select {
		case <-time.After(after):
		case <-ctx.Done():
			donec <- ended{0, context.Cause(ctx)}
			return
		}
		began := time.Now()
		err := do()
		donec <- ended{time.Since(began), err}
	}()
	return func() (time.Duration, error) {
		e := <-donec
		return e.took, e.err
	}
}

// refresh looks for the processes of paths where some were replaced.
func (l *Lab) refresh(ctx context.Context) error {
	s, err := l.status(ctx)
	if err != nil {
		return err
	}
	l.locateParts(s)
	for name, p := range l.paths {
		for i, w := range p.Watch {
			if pid := s.pid(w.Name); pid != 0 {
				p.Watch[i].PID = pid
			}
		}
		for i, t := range p.Targets {
			if pid := s.pid(t.Name); pid != 0 {
				p.Targets[i].PID = pid
			}
		}
		l.paths[name] = p
	}
	clear(l.members) // they name processes
	return nil
}

// locateParts remembers the processes that belong to no path.
func (l *Lab) locateParts(s status) {
	l.control = s.pid(load.ControlPlane)
	l.agents = map[string]int{}
	for _, c := range s.Parts {
		if strings.HasPrefix(c.Name, load.Agent+"@") {
			l.agents[c.Name] = c.PID
		}
	}
}

// changes lets objects come and go.
func (l *Lab) changes(ctx context.Context, p Path, b Beside) (func(load.Result) (map[string]float64, error), error) {
	if !l.meshed {
		return nil, errors.New("there is no control plane")
	}
	c := load.Churn{Dir: clusterDir, Name: "changes", PerSec: 50}
	if b == Toggles {
		c.Deny, c.Every = p.Namespace, time.Second
	}
	text, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	before := l.pushes(ctx)
	a, err := l.aside(ctx, "exec", "node-1", "--", l.Self, Churn, string(text))
	if err != nil {
		return nil, err
	}
	began := time.Now()
	return func(r load.Result) (map[string]float64, error) {
		if err := a.end(os.Interrupt); err != nil {
			return nil, err
		}
		took := time.Since(began).Seconds()
		lines := bytes.Split(bytes.TrimSpace(a.out.Bytes()), []byte("\n"))
		var did load.Churned
		if err := json.Unmarshal(lines[len(lines)-1], &did); err != nil {
			return nil, fmt.Errorf("read what was changed: %w", err)
		}
		out := map[string]float64{
			load.FigureChanges: float64(did.Changes+len(did.Toggles)) / did.Elapsed.Seconds(),
			load.FigurePushes:  (l.pushes(ctx) - before) / took,
		}
		if b != Toggles {
			return out, nil
		}
		e := load.EffectOf(did.Toggles, r.Decided, r.Ended)
		out[load.FigureMissed], out[load.FigureAgainst] = float64(e.Missed), float64(e.Against)
		if v, ok := e.Delays.Quantile(0.5); ok {
			out[load.FigureEffect], out[load.FigureEffects] = float64(v)/1e6, float64(e.Delays.Max())/1e6
		}
		return out, l.prove(ctx, p) // it is allowed again
	}, nil
}

// pushes is how many responses the control plane has sent.
func (l *Lab) pushes(ctx context.Context) float64 {
	return l.ofControl(ctx, "ambit_ambitd_xds_responses_total")
}

// ofControl is a metric of the control plane's, added up; 0 while it says nothing.
func (l *Lab) ofControl(ctx context.Context, name string) float64 {
	if l.asks == nil || l.control == 0 {
		return 0
	}
	b, err := l.asks.Get(ctx, l.control, "http://"+controlPlaneAdmin+"/metrics")
	if err != nil {
		return 0
	}
	return sum(string(b), name)
}

// sum adds up a metric over its labels.
func sum(text, name string) (total float64) {
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest == "" || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		f := strings.Fields(line)
		v, err := strconv.ParseFloat(f[len(f)-1], 64)
		if err == nil {
			total += v
		}
	}
	return total
}

// arrival lets a crowd appear some time from now; the one before is gone first.
func (l *Lab) arrival(ctx context.Context, after time.Duration, c Crowd) (func(load.Result) (map[string]float64, error), error) {
	if err := l.Gather(ctx, Crowd{}); err != nil {
		return nil, err
	}
	wait := delayed(ctx, after, func() error {
		return l.Gather(ctx, c) // nobody else does, until end
	})
	return func(load.Result) (map[string]float64, error) {
		took, err := wait()
		if err != nil {
			return nil, fmt.Errorf("let a crowd arrive: %w", err)
		}
		return map[string]float64{load.FigureDone: (took - quiet).Seconds()}, nil
	}, nil
}

// Gather makes the control plane know a crowd, and no other, and waits until it has
// been told to everybody. Where there is no control plane it does nothing.
func (l *Lab) Gather(ctx context.Context, c Crowd) error {
	if c == l.crowd || !l.meshed {
		return nil
	}
	text, err := json.Marshal(load.Churn{Dir: clusterDir, Name: "crowd", Workloads: c.Workloads, Services: c.Services, Stay: true})
	if err != nil {
		return err
	}
	want := l.known(ctx) + float64(c.Workloads+c.Services-l.crowd.Workloads-l.crowd.Services)
	if _, err := l.do(ctx, "", "exec", "node-1", "--", l.Self, Churn, string(text)); err != nil {
		return fmt.Errorf("gather a crowd: %w", err)
	}
	l.crowd = c
	return l.calm(ctx, want)
}

// known is how much the control plane serves.
func (l *Lab) known(ctx context.Context) float64 {
	return l.ofControl(ctx, "ambit_ambitd_xds_stored_resources")
}

// quiet is how long the control plane has nothing to send when all have been told.
const quiet = 3 * time.Second

// calm waits until the control plane serves about so much and has had nothing to
// send for a while.
func (l *Lab) calm(ctx context.Context, want float64) error {
	const about = 100 // what other things do meanwhile
	ctx, cancel := context.WithTimeoutCause(ctx, 3*time.Minute, errors.New("the control plane is still busy after three minutes"))
	defer cancel()
	last, since := l.pushes(ctx), time.Now()
	for time.Since(since) < quiet {
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if n := l.pushes(ctx); n != last || math.Abs(l.known(ctx)-want) > about {
			last, since = n, time.Now()
		}
	}
	return nil
}
