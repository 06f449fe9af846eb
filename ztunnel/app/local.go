package app

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/inbound"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// neighbour is one stay of a pod as pods of the same node reach it.
type neighbour struct {
	pod  handoff.Pod
	stay string
	in   *inbound.Proxy
	// cookie is the namespace's, 0 where there is none.
	cookie uint64

	mu      sync.Mutex
	leaving bool
	cuts    map[*localConn]struct{} // live connections; guarded by mu
	conns   sync.WaitGroup          // of cuts; added to only while not leaving
}

type localConn struct{ cut func(error) }

type podName struct{ namespace, name string }

// settle makes a stay reachable for its neighbours.
func (n *node) settle(p handoff.Pod, stay string, in *inbound.Proxy) *neighbour {
	nb := &neighbour{pod: p, stay: stay, in: in, cuts: map[*localConn]struct{}{}}
	if p.NS != nil {
		nb.cookie, _ = p.NS.Cookie() // without it no connection of the pod's goes straight
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.neighbours[podName{p.Namespace, p.Name}] = nb
	return nb
}

// leave ends new connections to a stay.
func (n *node) leave(nb *neighbour) {
	n.mu.Lock()
	if name := (podName{nb.pod.Namespace, nb.pod.Name}); n.neighbours[name] == nb {
		delete(n.neighbours, name)
	}
	n.mu.Unlock()
	nb.mu.Lock()
	nb.leaving = true
	nb.mu.Unlock()
	if n.direct != nil {
		n.direct.Left(nb.stay)
	}
}

// Open is outbound.Neighbours: the pod must be here, be the workload that was
// meant, and be where the network would let the connection through.
func (n *node) Open(ctx context.Context, r outbound.LocalRequest) (*outbound.LocalPath, error) {
	n.mu.Lock()
	nb := n.neighbours[podName{r.Dst.Namespace, r.Dst.Name}]
	n.mu.Unlock()
	if nb == nil {
		return nil, outbound.ErrNotLocal
	}
	if w := n.lookup(nb.pod); w == nil || w.UID != r.Dst.UID || !w.HasAddr(r.Target.Addr()) {
		return nil, outbound.ErrNotLocal
	}
	// The certificate is not used here, and yet it says what no local knowledge
	// does: that the control plane has this account run on this node, and still
	// has. Without one there is no tunnel, and so nothing instead of a tunnel.
	// What a CRL revokes is for a handshake to find out.
	if err := n.certified(ctx, r.Peer); err != nil || n.cfg.CRLPath != "" {
		return nil, outbound.ErrNotLocal
	}
	release, err := n.leases.Acquire(ctx, outbound.LeaseKey{Src: r.Stay, Dst: nb.stay, From: r.Src.Addr(), To: r.Target.Addr()}, r.Cut)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", outbound.ErrNotLocal, err)
	}
	leave, ok := nb.enter(r.Cut)
	if !ok {
		release()
		return nil, outbound.ErrNotLocal
	}
	path, err := nb.in.OpenLocal(ctx, r)
	if err != nil {
		leave()
		release()
		return nil, err
	}
	if n.direct != nil {
		n.direct.Offer(r.Stay, r.Asked)
	}
	end := path.End
	path.End = func(err error) {
		end(err)
		leave()
		release()
	}
	return path, nil
}

// certified waits a bounded time for a valid certificate.
func (n *node) certified(ctx context.Context, id identity.ID) error {
	ctx, cancel := context.WithTimeout(ctx, selfTimeout)
	defer cancel()
	_, err := n.certs.Get(ctx, id)
	return err
}

// enter registers a connection.
func (nb *neighbour) enter(cut func(error)) (leave func(), ok bool) {
	nb.mu.Lock()
	defer nb.mu.Unlock()
	if nb.leaving {
		return nil, false
	}
	c := &localConn{cut}
	nb.cuts[c] = struct{}{}
	nb.conns.Add(1)
	return func() {
		nb.mu.Lock()
		delete(nb.cuts, c)
		nb.mu.Unlock()
		nb.conns.Done()
	}, true
}

// cut ends the connections that are left.
func (nb *neighbour) cut(cause error) {
	nb.mu.Lock()
	var cuts []*localConn
	for c := range nb.cuts {
		cuts = append(cuts, c)
	}
	nb.mu.Unlock()
	for _, c := range cuts {
		c.cut(cause)
	}
}

// handshake is the lease's question to the network: a connection from one pod
// to another's HBONE port, over both pods' interfaces, as a tunnel would make
// it. It ends without a word, which the other side does not log.
func (n *node) handshake(ctx context.Context, k outbound.LeaseKey) error {
	n.mu.Lock()
	ns, ok := n.pods[k.Src]
	n.mu.Unlock()
	if !ok {
		return flow.ErrPodGone
	}
	d := &net.Dialer{KeepAlive: -1, Control: sockopt.ControlFor(sockopt.Options{Mark: int(n.cfg.PacketMark)}),
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(k.From, 0))}
	c, err := ns.Dial(ctx, d, "tcp", netip.AddrPortFrom(k.To, hbonePort).String())
	if err != nil {
		return err
	}
	return c.Close()
}

const hbonePort = 15008
