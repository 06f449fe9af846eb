package agent

import "github.com/ambit-mesh/ambit/ebpf/netns"

// readiness is when everything that the first update of the source named has been
// captured, or could not be. Guarded by Agent.mu.
type readiness struct {
	untried map[string]bool // pods, by UID; nil until the first update
	done    bool            // Ready succeeded
	running bool
}

// holding reports whether pods wait for all others to be captured again.
func (a *Agent) holding() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg.Rebuilt && !a.ready.done
}

// tried says that a pod of the first update is captured, or cannot be. One that
// cannot is not waited for: what it had from an earlier agent still stands in its
// namespace and lets nothing out, and the other pods must not wait for its repair.
func (a *Agent) tried(uid string) {
	a.mu.Lock()
	_, waited := a.ready.untried[uid]
	delete(a.ready.untried, uid)
	a.mu.Unlock()
	if waited {
		a.becomeReady()
	}
}

// becomeReady calls Ready once nothing is untried; a failure is repeated by the
// watch loop.
func (a *Agent) becomeReady() {
	a.mu.Lock()
	r := &a.ready
	if r.untried == nil || len(r.untried) > 0 || r.done || r.running {
		a.mu.Unlock()
		return
	}
	r.running = true
	a.mu.Unlock()
	var err error
	if a.cfg.Ready != nil {
		err = a.cfg.Ready()
	}
	if err != nil {
		a.cfg.Logger.Error("redirection of the node is not ready", "err", err)
	}
	a.mu.Lock()
	r.running, r.done = false, err == nil
	a.mu.Unlock()
}

// NamespaceOf returns the pod whose network namespace has this number, of those
// that shall be in the mesh.
func (a *Agent) NamespaceOf(inode uint64) (name string, ok bool) {
	a.eachWorker(func(w *worker) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if d := w.desired; d != nil && d.Enrolled && d.NetNS != "" {
			if i, err := netns.Inode(d.NetNS); err == nil && i == inode {
				name, ok = d.Namespace+"/"+d.Name, true
			}
		}
	})
	return name, ok
}
