package agent

import (
	"fmt"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// A namespace is one pod's. Where it is comes from whoever describes pods, who may be
// wrong or lie: a pod that names another's would be served there under its own
// identity, and with its end the other's capture would end.

// claim makes a namespace the worker's, or says whose it is: what the container
// runtime said counts before who came first.
func (w *worker) claim(ns *netns.NS, p Pod) error {
	a := w.agent
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.number(ns.Inode(), p.NetNS)
	for uid, at := range a.admission.attached {
		if uid != p.runtimeUID() && a.number(at.Inode, at.NetNS) == n {
			return errOthers(p.NetNS, at.Pod())
		}
	}
	if o := a.claims[n]; o != nil && o != w {
		return errOthers(p.NetNS, o.name)
	}
	a.claims[n] = w
	return nil
}

func errOthers(path, pod string) error {
	return fmt.Errorf("network namespace %s is that of pod %s: two pods cannot share one (does an annotation %s name it by mistake?)", path, pod, annotationNetNS)
}

// unclaim gives up what the worker has claimed.
func (w *worker) unclaim() {
	a := w.agent
	a.mu.Lock()
	defer a.mu.Unlock()
	for n, o := range a.claims {
		if o == w {
			delete(a.claims, n)
		}
	}
}

// others reports whether a namespace is, or is to be, another pod's of the mesh.
func (w *worker) others(ns *netns.NS, p Pod) bool {
	a := w.agent
	a.mu.Lock()
	workers := make([]*worker, 0, len(a.workers))
	for _, o := range a.workers {
		if o != w {
			workers = append(workers, o)
		}
	}
	a.mu.Unlock()
	n := a.number(ns.Inode(), p.NetNS)
	for _, o := range workers {
		o.mu.Lock()
		d := o.desired
		o.mu.Unlock()
		if d == nil || !d.Enrolled || d.NetNS == "" {
			continue
		}
		if inode, err := netns.Inode(d.NetNS); err == nil && a.number(inode, d.NetNS) == n {
			return true
		}
	}
	return false
}
