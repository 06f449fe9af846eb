package agent

import "github.com/ambit-mesh/ambit/ebpf/netns"

// stage is reached when it has nothing to wait for any more of what the source named
// first: then call is called, until it succeeds. Guarded by Agent.mu.
type stage struct {
	name    string
	call    func() error    // nil: nothing
	left    map[string]bool // pods, by UID; nil until the first update
	running bool
	done    bool
}

// holding reports whether pods that were captured cannot connect until they are
// captured again: then that comes first.
func (a *Agent) holding() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg.Rebuilt && !a.ready.done
}

// progress says how far a pod of the first update is: nothing of it has to be waited
// for because it was tried, and because it is captured or need not be.
func (a *Agent) progress(uid string, tried, settled bool) {
	a.mu.Lock()
	advanced := tried && a.tried.left[uid] || settled && a.ready.left[uid]
	if tried {
		delete(a.tried.left, uid)
	}
	if settled {
		delete(a.ready.left, uid)
	}
	a.mu.Unlock()
	if advanced {
		a.advance()
	}
}

// advance calls what may be called; a failure is repeated by the watch loop.
func (a *Agent) advance() {
	a.enter(&a.tried)
	a.enter(&a.ready)
}

func (a *Agent) enter(s *stage) {
	a.mu.Lock()
	if s.left == nil || len(s.left) > 0 || s.done || s.running {
		a.mu.Unlock()
		return
	}
	s.running = true
	a.mu.Unlock()
	var err error
	if s.call != nil {
		err = s.call()
	}
	if err != nil {
		a.cfg.Logger.Error("redirection of the node is not complete", "stage", s.name, "err", err)
	}
	a.mu.Lock()
	s.running, s.done = false, err == nil
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
