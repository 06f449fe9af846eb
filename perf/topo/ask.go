package topo

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/ambit-mesh/ambit/perf/inspect"
	"github.com/ambit-mesh/ambit/perf/load"
)

// Where processes tell about themselves, each in its own network.
const (
	proxyAdmin        = "127.0.0.1:15000"
	proxyMetrics      = "http://127.0.0.1:15020/metrics"
	controlPlaneAdmin = "127.0.0.1:15014"
)

// targets are those of the processes that are programs of Go's.
func (l *Lab) targets(ctx context.Context, s status, proxies []load.Process) []inspect.Target {
	var out []inspect.Target
	for _, c := range s.Parts {
		if c.Name == "ambitd" {
			out = append(out, inspect.Target{Name: c.Name, PID: c.PID, Admin: controlPlaneAdmin})
		}
	}
	for _, p := range proxies {
		if _, ok := l.asks.Heap(ctx, p.PID, proxyMetrics); ok {
			out = append(out, inspect.Target{Name: p.Name, PID: p.PID, Admin: proxyAdmin})
		}
	}
	return out
}

// status is what the lab says of its processes.
type status struct {
	Redirect []struct{ Node, Redirector string } `json:"redirect"`
	Enrolled int                                 `json:"enrolled"`
	Parts    []struct {
		Name string `json:"name"`
		PID  int    `json:"pid"`
	} `json:"components"`
}

// pid is a component's; 0: it does not run.
func (s status) pid(name string) int {
	for _, c := range s.Parts {
		if c.Name == name {
			return c.PID
		}
	}
	return 0
}

func (l *Lab) status(ctx context.Context) (s status, err error) {
	out, err := l.do(ctx, "", "status", "-o", "json")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("read the lab's status: %w", err)
	}
	return s, nil
}

// startAsker starts the process that asks others for memory and profiles.
func (l *Lab) startAsker(ctx context.Context) error {
	in, to := io.Pipe()
	r, err := l.beginAs(ctx, &struct{}{}, in, "node-1", Asker)
	if err != nil {
		return err
	}
	l.asks, l.asking = inspect.NewClient(to, r), to
	return nil
}

// heaps fills in what Go programs among the proxies say of their memory.
func (l *Lab) heaps(ctx context.Context, r load.Result) {
	if l.asks == nil {
		return
	}
	for i, u := range r.Usage {
		if u.Proxy && strings.HasPrefix(u.Name, "ztunnel@") {
			r.Usage[i].Heap, _ = l.asks.Heap(ctx, u.PID, proxyMetrics) // 0: not known
		}
	}
}

// profile starts to take profiles of a run; what it returns waits for them. Runs
// without a label prepare something and are of no interest.
func (l *Lab) profile(ctx context.Context, p Path, s load.Spec) (wait func() error) {
	if l.ProfileDir == "" || l.asks == nil || s.Label == "" || len(p.Targets) == 0 {
		return func() error { return nil }
	}
	donec := make(chan error, 1)
	go func() {
		donec <- l.asks.Profile(ctx, l.ProfileDir, s.Label, inspect.Window{Before: s.Warm, For: s.For}, p.Targets)
	}()
	return func() error { return <-donec }
}
