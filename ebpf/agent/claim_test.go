package agent_test

import (
	"slices"
	"testing"
	"testing/synctest"

	"github.com/ambit-mesh/ambit/ebpf/agent"
)

// TestNamespaceIsOnePods has a pod that names another's namespace: it is not served
// there, and the other's capture does not end with it.
func TestNamespaceIsOnePods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.present = true
		w.start()
		victim, thief := w.pod("a"), w.pod("b")
		w.pods <- []agent.Pod{victim}
		w.wantStatus("a", agent.Enabled, "")
		thief.NetNS = victim.NetNS
		w.pods <- []agent.Pod{victim, thief}
		w.wantStatus("b", agent.Pending, "is that of pod shop/web-a")
		thief.Enrolled = false
		w.pods <- []agent.Pod{victim, thief}
		w.wantStatus("b", "", "")
		synctest.Wait()
		w.never("release", "remove", "add b web")
		w.wantStatus("a", agent.Enabled, "")
		// It is free when its pod is gone.
		thief.Enrolled = true
		w.pods <- []agent.Pod{thief}
		w.wantStatus("b", agent.Enabled, "")
	})
}

// TestForeignNamespaceAtTheStart is the same when neither is known yet.
func TestForeignNamespaceAtTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.present = true
		w.start()
		victim, thief := w.pod("a"), w.pod("b")
		thief.NetNS, thief.Enrolled = victim.NetNS, false
		w.pods <- []agent.Pod{thief, victim}
		w.wantStatus("a", agent.Enabled, "")
		synctest.Wait()
		w.never("release", "remove")
	})
}

// TestRuntimeKnowsWhoseNamespaceItIs has the container runtime's word count before
// that of who came first.
func TestRuntimeKnowsWhoseNamespaceItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		thief := w.pod("b")
		thief.NetNS = w.pod("a").NetNS
		w.pods <- nil
		if err := a.Attach(t.Context(), w.attachment("a", "c1")); err != nil {
			t.Fatal(err)
		}
		w.pods <- []agent.Pod{thief}
		w.wantStatus("b", agent.Pending, "is that of pod shop/web-a")
		w.pods <- []agent.Pod{thief, w.starting("a")}
		w.wantStatus("a", agent.Enabled, "")
		w.never("add b web")
	})
}

// TestNamespaceThatComesBack has a pod whose path led nowhere for a while, and which
// left the mesh meanwhile: what it left there is taken away.
func TestNamespaceThatComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		p := w.pod("a")
		w.pods <- []agent.Pod{p}
		w.wantStatus("a", agent.Enabled, "")
		w.present = true
		p.NetNS += "-gone"
		w.pods <- []agent.Pod{p}
		w.wantStatus("a", agent.Pending, "no such file")
		p = w.pod("a")
		p.Enrolled = false
		w.pods <- []agent.Pod{p}
		w.want("un-enrolled", "release", "remove")
	})
}

// never says that none of the lines was done since what was wanted last.
func (w *world) never(lines ...string) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, line := range lines {
		if slices.Contains(w.log, line) {
			w.t.Errorf("%q was done: %q", line, w.log)
		}
	}
}
