package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
)

// sockets makes as many with numbers of their own.
func sockets(first, n int) (out []sockdiag.Socket) {
	for i := range n {
		out = append(out, sockdiag.Socket{Cookie: uint64(first + i), State: sockdiag.Established})
	}
	return out
}

func (w *world) setUncaptured(u redirect.Uncaptured) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.uncaptured = u
}

func (w *world) wantOlder(why string, n int, onEnrol string) {
	w.t.Helper()
	var s agent.Status
	for range 60000 {
		if s = w.wantStatus("a", agent.Enabled, ""); s.PreEnrolment == n && s.OnEnrol == onEnrol {
			return
		}
		time.Sleep(2 * time.Millisecond) // the bubble's clock
	}
	w.t.Fatalf("%s: status counts %d older connections (%q), want %d (%q)", why, s.PreEnrolment, s.OnEnrol, n, onEnrol)
}

func TestOlderAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.setUncaptured(redirect.Uncaptured{Connections: sockets(1, 3), HalfOpen: sockets(50, 2)})
		w.start()
		p := w.pod("a")
		w.pods <- []agent.Pod{p}
		w.want("rules first, and what is half open ends", "add a web", "apply inbound=true v6=false", "reset 2")
		w.wantOlder("enrolled", 3, "keep")
		// A probe of the node's is not older; one that was has ended.
		w.setUncaptured(redirect.Uncaptured{Connections: append(sockets(1, 2), sockets(90, 1)...), HalfOpen: sockets(60, 1)})
		w.want("a look now and then", "check")
		w.wantOlder("one ended", 2, "keep")
		p.OnEnrol = agent.OnEnrol{Reset: true}
		w.pods <- []agent.Pod{p}
		w.want("another wish", "reset 2")
		w.wantOlder("reset", 0, "")
	})
}

func TestOlderDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.setUncaptured(redirect.Uncaptured{Connections: sockets(1, 3)})
		w.start()
		p := w.pod("a")
		p.OnEnrol = agent.OnEnrol{Reset: true, After: 10 * time.Minute}
		begin := time.Now()
		w.pods <- []agent.Pod{p}
		w.want("enrolled", "apply inbound=true v6=false")
		w.wantOlder("enrolled", 3, "drain=10m0s")
		w.setUncaptured(redirect.Uncaptured{Connections: append(sockets(1, 1), sockets(90, 1)...)})
		w.failing("reset 1", errors.New("busy"))
		w.sleepUntil(begin.Add(10*time.Minute + time.Second))
		w.want("in the end", "reset 1")
		w.wantOlder("what could not be reset", 1, "drain=10m0s")
		w.failing("reset 1", nil)
		w.want("again", "reset 1")
		w.wantOlder("drained", 0, "")
	})
}

// sleepUntil lets the bubble's clock go on.
func (w *world) sleepUntil(at time.Time) { time.Sleep(time.Until(at)) }

// The next agent finds rules in place: what it lists itself would contain probes.
func TestOlderOutliveTheAgent(t *testing.T) {
	dir := t.TempDir()
	again := func(t *testing.T) *world {
		w := newWorld(t)
		w.dir = dir
		var err error
		if w.status, err = agent.OpenStatusDir(filepath.Join(dir, "status")); err != nil {
			t.Fatal(err)
		}
		return w
	}
	synctest.Test(t, func(t *testing.T) {
		w := again(t)
		w.setUncaptured(redirect.Uncaptured{Connections: sockets(1, 3)})
		w.start()
		p := w.pod("a")
		p.OnEnrol = agent.OnEnrol{Reset: true, After: time.Minute}
		w.pods <- []agent.Pod{p}
		w.wantOlder("enrolled", 3, "drain=1m0s")
	})
	synctest.Test(t, func(t *testing.T) {
		w := again(t)
		w.present = true
		w.setUncaptured(redirect.Uncaptured{Connections: append(sockets(2, 2), sockets(90, 5)...), HalfOpen: sockets(60, 1)})
		begin := time.Now()
		w.start()
		p := w.pod("a")
		p.OnEnrol = agent.OnEnrol{Reset: true, After: time.Minute}
		w.pods <- []agent.Pod{p}
		w.want("the old ones alone", "apply inbound=true v6=false", "reset 2")
		if d := time.Since(begin); d < 30*time.Second || d > 2*time.Minute {
			t.Errorf("they were reset %v after the agent's restart, want what was left of a minute", d)
		}
		w.wantOlder("drained", 0, "")
		p.Enrolled = false
		w.pods <- []agent.Pod{p}
		w.want("un-enrolled", "release", "del a", "remove")
		w.wantStatus("a", "", "")
		if left, err := os.ReadDir(filepath.Join(dir, "status")); err != nil || len(left) != 0 {
			t.Errorf("files %v remain, %v", left, err)
		}
	})
}

func TestOlderThatCannotBeListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.uncapturedErr = errors.New("no socket monitoring")
		w.start()
		w.pods <- []agent.Pod{w.pod("a")}
		w.want("enrolled all the same", "add a web", "apply inbound=true v6=false")
		w.wantOlder("unknown", 0, "")
	})
}
