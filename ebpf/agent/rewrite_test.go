package agent_test

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/ambit-mesh/ambit/ebpf/agent"
)

func TestRewrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		if err := a.Rewrite(); err != nil {
			t.Errorf("with no pod: %v", err)
		}
		p := w.pod("a")
		w.pods <- []agent.Pod{p}
		w.wantStatus("a", agent.Enabled, "")
		w.want("enrolled", "apply inbound=true v6=false")
		if err := a.Rewrite(); err != nil {
			t.Errorf("with a pod: %v", err)
		}
		w.wantNow("written before Rewrite returns", "apply inbound=true v6=false")
		w.failing("apply inbound=true v6=false", errors.New("busy"))
		if err := a.Rewrite(); err != nil {
			t.Errorf("with a pod that fails: %v", err)
		}
		w.wantNow("tried", "apply inbound=true v6=false")
		w.failing("apply inbound=true v6=false", nil)
		w.want("and tried again", "apply inbound=true v6=false")
		p.Enrolled = false
		w.pods <- []agent.Pod{p}
		w.want("released", "release")
		if err := a.Rewrite(); err != nil {
			t.Errorf("with a pod that leaves: %v", err)
		}
		w.want("gone", "remove")
		if err := a.Rewrite(); err != nil {
			t.Errorf("with a pod that left: %v", err)
		}
	})
}

// wantNow is want for what has happened already.
func (w *world) wantNow(why, line string) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, l := range w.log {
		if l == line {
			w.log = w.log[i+1:]
			return
		}
	}
	w.t.Errorf("%s: %q has not happened, only %q", why, line, w.log)
}
