package agent

import (
	"net/netip"
	"slices"
	"sync"
)

// probes is the set of addresses that the node's own processes reach without the
// mesh. All methods may run at the same time.
type probes struct {
	rules HostRules // nil: nothing is done

	mu   sync.Mutex
	pods map[string][]netip.Addr // by UID
}

// put makes addrs those of the pod; none takes the pod out. If the kernel refuses
// the pod's entry stays as it was.
func (p *probes) put(uid string, addrs []netip.Addr) error {
	if p.rules == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.pods[uid]
	if slices.Equal(old, addrs) {
		return nil
	}
	p.setLocked(uid, addrs)
	if err := p.writeLocked(); err != nil {
		p.setLocked(uid, old)
		return err
	}
	return nil
}

// rewrite repairs what somebody else may have changed.
func (p *probes) rewrite() error {
	if p.rules == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.writeLocked()
}

func (p *probes) setLocked(uid string, addrs []netip.Addr) {
	if len(addrs) == 0 {
		delete(p.pods, uid)
		return
	}
	p.pods[uid] = addrs
}

func (p *probes) writeLocked() error {
	var all []netip.Addr
	for _, addrs := range p.pods {
		all = append(all, addrs...)
	}
	return p.rules.Set(all)
}
