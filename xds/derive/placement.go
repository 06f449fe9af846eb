package derive

import (
	"sync"

	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/xds/dir"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// placement is where pods are: what the certificate authority asks. It has a lock
// of its own, held only while a change is noted, so that certificates are not
// delayed by resources being computed.
type placement struct {
	mu          sync.RWMutex
	trustDomain string          // guarded by mu
	domains     []string        // guarded by mu; the trust domain and its aliases
	pods        map[nn]home     // guarded by mu
	accounts    map[account]int // guarded by mu; live pods
}

// home is what a certificate depends on in a pod.
type home struct {
	uid  string
	live bool // has not ended
	account
}

// account is a service account in use on a node.
type account struct{ node, ns, name string }

// apply notes a change of the source.
func (p *placement) apply(c dir.Change, trustDomain string, domains []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trustDomain, p.domains = trustDomain, domains
	if p.pods == nil {
		p.pods, p.accounts = map[nn]home{}, map[account]int{}
	}
	for _, k := range c.Deletes {
		if k.Kind == "Pod" {
			p.putLocked(nn{k.Namespace, k.Name}, nil)
		}
	}
	for _, o := range c.Upserts {
		if pod, ok := o.Value.(*corev1.Pod); ok {
			p.putLocked(nn{o.Namespace, o.Name}, pod)
		}
	}
}

func (p *placement) putLocked(k nn, pod *corev1.Pod) {
	if was, had := p.pods[k]; had {
		if was.live {
			if p.accounts[was.account]--; p.accounts[was.account] == 0 {
				delete(p.accounts, was.account)
			}
		}
		delete(p.pods, k)
	}
	if pod == nil {
		return
	}
	h := home{uid: string(pod.UID), live: !terminal(pod), account: account{pod.Spec.NodeName, k.ns, serviceAccountOf(pod)}}
	p.pods[k] = h
	if h.live {
		p.accounts[h.account]++
	}
}

// RunsOn reports whether a pod with this identity is on the node and has not
// ended. A pod that is being deleted still needs its certificate.
func (e *Engine) RunsOn(node string, id identity.ID) bool {
	if node == "" || id.IsZero() {
		return false
	}
	p := &e.placed
	p.mu.RLock()
	defer p.mu.RUnlock()
	return id.TrustDomain() == p.trustDomain && p.accounts[account{node, id.Namespace(), id.ServiceAccount()}] > 0
}

// Pod returns the uid and the node of a pod that has not ended.
func (e *Engine) Pod(namespace, name string) (uid, node string, ok bool) {
	p := &e.placed
	p.mu.RLock()
	defer p.mu.RUnlock()
	h := p.pods[nn{namespace, name}]
	return h.uid, h.node, h.live
}

// TrustDomain returns the trust domain in force.
func (e *Engine) TrustDomain() string {
	p := &e.placed
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.trustDomain
}

// TrustDomains returns the trust domain in force, then its aliases.
func (e *Engine) TrustDomains() []string {
	p := &e.placed
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.domains
}
