package app

import (
	"context"
	"net/netip"

	"golang.org/x/sync/errgroup"

	"github.com/ambit-mesh/ambit/ebpf/lease"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/direct"
)

// newDirect has connections between accelerated pods go without the proxy, if the
// agent knows how. nil: none do.
func (n *node) newDirect() *direct.Keeper {
	// What a CRL revokes is for handshakes to find out.
	if n.cfg.Mode == dedicated || n.cfg.CRLPath != "" {
		return nil
	}
	link := &leaseLink{}
	k := direct.New(direct.Config{Agent: link, Pods: servedPods{n}, View: n.store.View, Flow: n.flow,
		Logger: boot.Scoped(n.log, "direct"), Registerer: n.reg})
	link.Client = lease.NewClient(lease.ClientConfig{Path: lease.Path(n.cfg.InpodUDS), Events: k,
		Connected: k.Connected, Disconnected: k.Disconnected, Logger: boot.Scoped(n.log, "direct")})
	n.store.Subscribe(k.Changed)
	n.link = link
	return k
}

// leaseLink is made before what it tells events.
type leaseLink struct{ *lease.Client }

// runDirect follows the agent and keeps leases until ctx ends.
func (n *node) runDirect(ctx context.Context) error {
	if n.direct == nil {
		return nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.direct.Run(ctx) })
	g.Go(func() error { return n.link.Run(ctx) })
	return g.Wait()
}

// servedPods is direct.Pods.
type servedPods struct{ *node }

func (s servedPods) ByStay(stay string) (direct.Pod, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ps := s.serving[stay]
	if ps == nil {
		return direct.Pod{}, false
	}
	nb := s.neighbours[podName{ps.pod.Namespace, ps.pod.Name}]
	if nb == nil || nb.stay != stay {
		return direct.Pod{}, false
	}
	return s.pod(nb), true
}

func (s servedPods) ByWorkload(w *mesh.Workload) (direct.Pod, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	nb := s.neighbours[podName{w.Namespace, w.Name}]
	if nb == nil {
		return direct.Pod{}, false
	}
	p := s.pod(nb)
	return p, p.Self != nil && p.Self.UID == w.UID
}

func (s servedPods) pod(nb *neighbour) direct.Pod {
	return direct.Pod{UID: nb.pod.UID, NetNS: nb.cookie, Self: s.lookup(nb.pod), Enter: nb.enter}
}

// Certified does not wait: see node.Open for what a certificate says here.
func (s servedPods) Certified(w *mesh.Workload) bool {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := s.certs.Get(ctx, w.Identity)
	return err == nil
}

// leased is nil where nothing is.
func (n *node) leased(stay string) func(netip.AddrPort, *mesh.Workload) bool {
	if n.direct == nil {
		return nil
	}
	return func(dst netip.AddrPort, w *mesh.Workload) bool { return n.direct.Has(stay, dst, w) }
}
