package topo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/perf/load"
)

// Renew replaces a path's proxies by processes that have done nothing yet, and
// proves the path again. Memory tells of all that a process has done: without it the
// order of scenarios would be what is measured.
func (l *Lab) Renew(ctx context.Context, mode string, to Placement) error {
	p, ok := l.Path(mode, to)
	if !ok || p.Placement == Hop1 || len(p.Watch) < 2 {
		return nil
	}
	if !p.Meshed {
		fresh, err := l.lay(ctx, mode, l.ends[mode], to)
		if err != nil {
			return err
		}
		l.paths[mode+string(to)] = fresh
		return l.prove(ctx, fresh) // what was there before is idle until the lab ends
	}
	for _, w := range p.Watch {
		if !w.Proxy {
			continue
		}
		if _, err := l.do(ctx, "", "restart", w.Name); err != nil {
			return err
		}
	}
	if err := l.refresh(ctx); err != nil {
		return err
	}
	p, _ = l.Path(mode, to)
	if err := l.prove(ctx, p); err != nil {
		return err
	}
	return settled(ctx)
}

// settled waits until what a start leaves behind is over.
func settled(ctx context.Context) error {
	select {
	case <-time.After(500 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

const (
	manyNamespace = "many"
	meshLabel     = "istio.io/dataplane-mode"
)

// manyPods are those of Enrolment, on a node.
func manyPods(node string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n", manyNamespace)
	for i := range Pods {
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: p-%d, namespace: %s}\nspec: {nodeName: %s, terminationGracePeriodSeconds: 1, "+
			"containers: [{name: c, image: ambit-sample, command: [ambit-sample, pause]}]}\n", i, manyNamespace, node)
	}
	return b.String()
}

// enrolment has pods beside the client that are not in the mesh, and takes them into
// it some time from now: what it costs is the mesh's, and not a pod's.
func (l *Lab) enrolment(ctx context.Context, p Path, length time.Duration) (func(load.Result) (map[string]float64, error), error) {
	if _, err := l.do(ctx, manyPods(p.Near), "apply", "-f", "-"); err != nil {
		return nil, err
	}
	if _, err := l.do(ctx, "", "wait", "-n", manyNamespace, "--timeout", "120s"); err != nil {
		return nil, err
	}
	before, err := l.status(ctx)
	if err != nil {
		return nil, err
	}
	if err := settled(ctx); err != nil {
		return nil, err
	}
	wait := delayed(ctx, length/20, func() error {
		if _, err := l.do(ctx, "", "label", "ns", manyNamespace, meshLabel+"=ambient"); err != nil {
			return err
		}
		return l.enrolled(ctx, before.Enrolled+Pods)
	})
	return func(load.Result) (map[string]float64, error) {
		took, err := wait()
		_, gone := l.do(ctx, "", "delete", "ns", manyNamespace) // and what is in it
		if err := errors.Join(err, gone, l.enrolled(ctx, before.Enrolled)); err != nil {
			return nil, fmt.Errorf("take pods into the mesh: %w", err)
		}
		return map[string]float64{load.FigureDone: took.Seconds()}, l.inTime(took, length)
	}, nil
}

// enrolled waits until so many pods are in the mesh.
func (l *Lab) enrolled(ctx context.Context, want int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, fmt.Errorf("%d pods were not in the mesh after two minutes", want))
	defer cancel()
	for {
		s, err := l.status(ctx)
		if err != nil || s.Enrolled == want {
			return err
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// learning lets a crowd appear some time from now.
func (l *Lab) learning(ctx context.Context, p Path, length time.Duration) (func(load.Result) (map[string]float64, error), error) {
	if err := l.Gather(ctx, Crowd{}); err != nil {
		return nil, err
	}
	// Processes that had known the crowd of a run before have its memory.
	if err := l.Renew(ctx, p.Mode, p.Placement); err != nil {
		return nil, err
	}
	end, err := l.arrival(ctx, length/20, Crowd{Workloads: Workloads, Services: Workloads / 10})
	if err != nil {
		return nil, err
	}
	return func(r load.Result) (map[string]float64, error) {
		figures, err := end(r)
		if err != nil {
			return nil, err
		}
		return figures, l.inTime(time.Duration(figures[load.FigureDone]*float64(time.Second)), length)
	}, nil
}

// inTime says whether something was over when a still load looked.
func (l *Lab) inTime(took, length time.Duration) error {
	if most := length/20 + took; most > length*2/3 {
		return fmt.Errorf("what went on took %s of %s: too long for its cost to be told from that of what comes after", took.Round(time.Second), length)
	}
	return nil
}

// withAgent adds the agent of the path's node to what is measured.
func (l *Lab) withAgent(p Path, watch []load.Process) []load.Process {
	if name := load.Agent + "@" + p.Near; l.agents[name] != 0 {
		watch = append(watch, load.Process{Name: name, PID: l.agents[name]})
	}
	return watch
}
