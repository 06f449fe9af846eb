package agent_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// run runs an agent that c describes in w.
func (w *world) run(c agent.Config) *agent.Agent {
	w.t.Helper()
	c.Source, c.Proxies, c.Rules, c.Status, c.Via = source{w}, proxies{w}, rules{w}, w.status, "ebpf"
	c.Resolves = func(*netns.NS) (bool, error) { return false, nil }
	a := agent.New(c)
	a.ByPath() // all pods are in the test's own namespace
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan error, 1)
	go func() { donec <- a.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-donec; err != nil {
			w.t.Errorf("agent ended with %v", err)
		}
	})
	return a
}

func (w *world) done(line string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Contains(w.log, line)
}

// Who was captured cannot connect until it is captured again. Rules do not wait for
// the proxy then, and who cannot be captured is not opened by Ready.
func TestReadyWhenAllPodsAreCaptured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.hang = make(chan struct{})
		vanished, unknown, refused := w.pod("vanished"), w.pod("unknown"), w.pod("refused")
		vanished.NetNS, unknown.NetNS = filepath.Join(w.dir, "nowhere"), ""
		refused.BypassInbound = true
		w.failing("apply inbound=false v6=false", errors.New("no memory"))
		var calls atomic.Int32
		w.run(agent.Config{Rebuilt: true,
			Tried: func() error { return w.do("tried") },
			Ready: func() error {
				_ = w.do("ready")
				if calls.Add(1) == 1 {
					return errors.New("not yet")
				}
				return nil
			}})
		pods := []agent.Pod{w.pod("hang"), w.pod("b"), vanished, unknown, refused}
		w.pods <- pods
		w.want("rules before the proxy answers", "tried")
		if w.done("add hang web") {
			t.Error("the proxy was waited for")
		}
		time.Sleep(time.Minute) // the bubble's clock
		w.failing("apply inbound=false v6=false", nil)
		w.wantStatus("refused", agent.Enabled, "")
		if calls.Load() > 0 {
			t.Error("ready, although the namespace of a pod is not known")
		}
		pods[3] = w.pod("unknown")
		w.pods <- pods
		w.want("and again after its failure", "ready", "ready")
		close(w.hang)
		w.wantStatus("hang", agent.Enabled, "")
		w.pods <- append(pods, w.pod("c"))
		w.wantStatus("c", agent.Enabled, "")
		time.Sleep(time.Minute) // the bubble's clock
		if n := calls.Load(); n != 2 {
			t.Errorf("Ready was called %d times, want once after its failure", n)
		}
	})
}

func TestReadyWithoutPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(agent.Config{Ready: func() error { return w.do("ready") }})
		w.pods <- nil
		w.want("nothing to wait for", "ready")
	})
}

// A pod of the first update that goes before it was looked at is not waited for.
func TestReadyWithoutAPodThatGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.run(agent.Config{Rebuilt: true, Ready: func() error { return w.do("ready") }})
		w.pods <- []agent.Pod{w.pod("a")}
		w.pods <- nil
		w.want("the pod is gone", "ready")
	})
}

// A pod that another redirector captures is closed already: it changes over when
// the proxy is there, and stays enabled until then.
func TestPodOfAnotherRedirectorWaitsForTheProxy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.present = true
		p := w.pod("a")
		if err := w.status.Write(agent.Status{UID: "a", NetNS: p.NetNS, Redirection: agent.Enabled, Via: "nftables"}); err != nil {
			t.Fatal(err)
		}
		w.failing("add a web", handoff.ErrNoProxy)
		w.run(agent.Config{
			Waiting: func(*netns.NS) (bool, error) { return true, nil }, Tried: func() error { return w.do("tried") },
		})
		w.pods <- []agent.Pod{p}
		if s := w.wantStatus("a", agent.Enabled, "no proxy"); s.Via != "nftables" {
			t.Errorf("captured via %s, want what captured it before", s.Via)
		}
		w.want("tried again", "add a web")
		if w.done("apply inbound=true v6=false") {
			t.Error("changed over to rules that no proxy serves")
		}
		if w.done("tried") {
			t.Error("what the other redirector needs is no longer needed, says the agent")
		}
		w.failing("add a web", nil)
		w.want("listeners first", "add a web", "apply inbound=true v6=false", "tried")
		if s := w.wantStatus("a", agent.Enabled, "labelled"); s.Via != "ebpf" {
			t.Errorf("captured via %s, want ebpf", s.Via)
		}
	})
}

// What stands from an earlier agent stays in force when rules cannot be renewed.
func TestCapturedPodStaysEnabledWhenRulesFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.present = true
		p := w.pod("a")
		if err := w.status.Write(agent.Status{UID: "a", NetNS: p.NetNS, Redirection: agent.Enabled, Via: "ebpf"}); err != nil {
			t.Fatal(err)
		}
		w.failing("apply inbound=true v6=false", &redirect.UnsupportedError{Feature: "x", Err: errors.New("no")})
		w.run(agent.Config{})
		w.pods <- []agent.Pod{p}
		w.wantStatus("a", agent.Enabled, "does not support x")
	})
}

// A proxy keeps the listeners of a pod that it has. Where the redirection does not
// know them it is asked to listen again: once, since that ends connections.
func TestProxyListensAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var listening atomic.Bool
		w.run(agent.Config{Listening: func(*netns.NS) (bool, error) { return listening.Load(), nil }})
		w.pods <- []agent.Pod{w.pod("a")}
		w.want("asked again, then to begin anew", "add a web", "add a web", "del a", "add a web")
		w.wantStatus("a", agent.Pending, "no listener")
		w.want("tried again", "add a web")
		w.mu.Lock()
		dels := strings.Count(strings.Join(w.log, ";"), "del a")
		w.mu.Unlock()
		if dels > 0 {
			t.Error("the pod's connections were ended again and again")
		}
		listening.Store(true)
		w.wantStatus("a", agent.Enabled, "labelled")
		// A proxy that is gone takes its listeners along.
		listening.Store(false)
		w.failing("add a web", handoff.ErrNoProxy)
		w.wantStatus("a", agent.Enabled, "no proxy")
		if w.done("del a") {
			t.Error("a pod was forgotten because its proxy is gone")
		}
		w.failing("add a web", nil)
		listening.Store(true)
		w.wantStatus("a", agent.Enabled, "labelled")
	})
}

func TestNamespaceOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		home, err := netns.Current()
		if err != nil {
			t.Fatal(err)
		}
		defer home.Close()
		a := w.run(agent.Config{})
		out := w.pod("out")
		out.Enrolled = false
		w.pods <- []agent.Pod{out}
		if name, ok := a.NamespaceOf(home.Inode()); ok {
			t.Errorf("%s has a namespace that nobody enrolled", name)
		}
		w.pods <- []agent.Pod{w.pod("a")}
		w.wantStatus("a", agent.Enabled, "")
		if name, ok := a.NamespaceOf(home.Inode()); !ok || name != "shop/web-a" {
			t.Errorf("NamespaceOf: %q %t", name, ok)
		}
		if name, ok := a.NamespaceOf(1); ok {
			t.Errorf("namespace 1 is of %q", name)
		}
	})
}
