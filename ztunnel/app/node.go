package app

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/direct"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/inbound"
	"github.com/ambit-mesh/ambit/ztunnel/inpod"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/origin"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
	"github.com/ambit-mesh/ambit/ztunnel/resolve"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// selfTimeout is how long a pod's first connections wait for its workload.
const selfTimeout = 5 * time.Second

// podNet is what one pod's connections are asked for.
type podNet struct {
	originalDst func(net.Conn) (netip.AddrPort, error)
	only        uint16 // the one port that peers may ask for; 0: any
}

// node is the data path of one node: everything between accepted connections
// and the network, without the processes around it.
type node struct {
	cfg     Config
	log     *slog.Logger
	reg     prometheus.Registerer
	store   *store.Store
	certs   *cert.Manager
	flow    *flow.Table
	tunnels *hbone.Dialer
	ledger  *ledger.Ledger
	health  *outbound.Health
	names   *resolve.Resolver
	changed *broadcast
	dns     *resolver // nil: not served
	only    only
	demand  func(ctx context.Context, keys ...string) error // nil: the whole mesh is known

	mu      sync.Mutex
	pods    map[string]*netns.NS // by stay
	serving map[string]*podServe // by stay
	stays   uint64

	origins    *origin.Names
	direct     *direct.Keeper // nil: no connection goes without the proxy
	link       *leaseLink
	leases     *outbound.Leases
	neighbours map[podName]*neighbour // latest stays; guarded by mu
}

// podServe is what peers reach of one stay of a pod.
type podServe struct {
	pod     handoff.Pod
	hbone   *hbone.Server
	account *ledger.Account
	retired bool // its peers were told that the pod ends; guarded by node.mu
}

func newNode(cfg Config, log *slog.Logger, reg prometheus.Registerer, authority cert.Authority) *node {
	n := &node{cfg: cfg, log: log, reg: reg, changed: newBroadcast(), pods: map[string]*netns.NS{}, serving: map[string]*podServe{}, ledger: ledger.New(ledger.DefaultLimits())}
	n.dns, n.origins = n.newResolver(), origin.New(origin.Config{})
	n.only.ref = cfg.Workload
	n.store = store.New(store.Config{Node: cfg.NodeName, Logger: boot.Scoped(log, "xds"), Registerer: reg})
	n.certs = cert.New(cert.Config{Authority: authority, TTL: cfg.SecretTTL, TrustDomainAliases: cfg.trustDomainAliases(),
		TLS12: cfg.TLS12, PostQuantum: cfg.CompliancePolicy == "pqc",
		Logger: boot.Scoped(log, "cert"), Registerer: reg})
	n.flow = flow.New(flow.Config{View: n.store.View, Logger: boot.Scoped(log, "access"), PolicyLogger: boot.Scoped(log, "policy"),
		PolicyInfo: cfg.PolicyInfoLogging, Names: n.origins.Of, Registerer: reg})
	n.tunnels = hbone.NewDialer(hbone.DialerConfig{
		DialTransport: n.dialTransport, GatewayHeader: n.gatewayHeader, TLS: n.clientTLS, AmbitRecords: cfg.TLSRecords == "ambit",
		Windows: cfg.windows(), MaxStreams: cfg.PoolMaxStreams, IdleTimeout: cfg.PoolIdle, Opened: n.track(cert.Source), Account: n.account,
		Logger: boot.Scoped(log, "hbone"), Registerer: reg,
	})
	n.leases, n.neighbours = outbound.NewLeases(outbound.LeaseConfig{Probe: n.handshake, Registerer: reg}), map[podName]*neighbour{}
	n.health, n.names = outbound.NewHealth(reg), resolve.New(resolve.Config{Registerer: reg})
	n.direct = n.newDirect()
	n.certs.Trust().OnChange(func(removed bool) {
		if removed { // a tunnel's peer may no longer be trusted: each proves itself again
			n.tunnels.CloseMatching(func(hbone.Key) bool { return true })
		}
	})
	n.store.Subscribe(n.flow.Changed)
	n.store.Subscribe(n.departed)
	n.store.Subscribe(func(_, _ *store.View, _ store.Change) { n.changed.signal() })
	return n
}

// account is the share of the pod that dials: what answers fill, and what
// tunnels and handshakes cost, is its as much as what it takes in.
func (n *node) account(k hbone.Key) *ledger.Account {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.serving[k.Pod]; s != nil {
		return s.account
	}
	return nil // its namespace is gone too, so that nothing can be dialled
}

// dialTransport opens a tunnel's socket in the source pod's namespace.
func (n *node) dialTransport(ctx context.Context, k hbone.Key) (net.Conn, error) {
	n.mu.Lock()
	ns, ok := n.pods[k.Pod]
	n.mu.Unlock()
	if !ok {
		return nil, flow.ErrPodGone
	}
	d := &net.Dialer{KeepAlive: -1, Control: sockopt.ControlFor(sockopt.Options{Mark: int(n.cfg.PacketMark)})}
	if k.SrcAddr.IsValid() && !k.SrcAddr.IsLoopback() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(k.SrcAddr, 0))
	}
	return n.dialed(ns.Dial(ctx, d, "tcp", k.Addr.String()))
}

// gatewayHeader says to the gateway of another network who its client is. The
// rest is for whom the gateway hands on to: connections share the tunnel.
func (n *node) gatewayHeader(k hbone.Key) []hbone.HeaderField {
	n.mu.Lock()
	s := n.serving[k.Pod]
	n.mu.Unlock()
	if s == nil {
		return nil
	}
	w := n.lookup(s.pod)
	if w == nil {
		return nil
	}
	return []hbone.HeaderField{{Name: "baggage", Value: outbound.Baggage(w)}}
}

// dialed gives a new socket the mesh's keepalive.
func (n *node) dialed(c net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	if t, ok := c.(*net.TCPConn); ok {
		if err := n.cfg.liveness().Set(t); err != nil {
			_ = t.Close() // err says more
			return nil, fmt.Errorf("set keepalive: %w", err)
		}
	}
	return c, nil
}

// track lets a tunnel be cut when its peer's certificate is no longer good.
func (n *node) track(side cert.Side) func(*tls.ConnectionState, func(error)) func() {
	return func(cs *tls.ConnectionState, cut func(error)) func() {
		return n.certs.Track(side, cs, func(err error) { cut(flow.Flagged(flow.FlagCertRevoked, err)) })
	}
}

// clientTLS waits for the certificate here, so that a slow CA does not count
// as a slow handshake.
func (n *node) clientTLS(ctx context.Context, k hbone.Key) (*tls.Config, error) {
	peers, err := cert.SplitPeers(k.Peers)
	if err != nil {
		return nil, err
	}
	c, err := n.certs.Get(ctx, k.Local)
	if err != nil {
		return nil, err
	}
	// The tunnel must know which leaf it stands on: it takes no new stream
	// after that one's end.
	cfg := n.certs.ClientConfig(k.Local, peers).Clone()
	cfg.GetClientCertificate, cfg.Certificates = nil, []tls.Certificate{c.TLS}
	return cfg, nil
}

// self finds the workload of a pod, waiting for one that xDS has not brought yet.
func (n *node) self(p handoff.Pod) func(context.Context) (*mesh.Workload, error) {
	return func(ctx context.Context) (*mesh.Workload, error) {
		if w := n.lookup(p); w != nil {
			return w, nil
		}
		if n.demand != nil {
			if err := n.demand(ctx, n.selfKey(p)); err != nil {
				return nil, err
			}
		}
		ctx, cancel := context.WithTimeout(ctx, selfTimeout)
		defer cancel()
		for {
			changec := n.changed.wait()
			if w := n.lookup(p); w != nil {
				return w, nil
			}
			select {
			case <-changec:
			case <-ctx.Done():
				return nil, flow.Failed(flow.ReasonUnknownWorkload, &UnknownWorkloadError{Pod: p, Node: n.cfg.NodeName})
			}
		}
	}
}

func (n *node) lookup(p handoff.Pod) *mesh.Workload {
	if n.cfg.Mode == dedicated {
		return n.only.lookup(n.store.View().Mesh)
	}
	w := n.store.View().Mesh.LocalWorkload(n.cfg.NodeName, p.Namespace, p.Name)
	if w == nil || w.ServiceAccount != p.ServiceAccount {
		return nil
	}
	return w
}

// UnknownWorkloadError is an enrolled pod that the control plane does not know.
type UnknownWorkloadError struct {
	Pod  handoff.Pod
	Node string
}

func (e *UnknownWorkloadError) Error() string {
	return fmt.Sprintf("unknown workload: the control plane has no workload for pod %s/%s (service account %s) on node %s",
		e.Pod.Namespace, e.Pod.Name, e.Pod.ServiceAccount, e.Node)
}

// serve makes what serves one pod.
func (n *node) serve(p handoff.Pod, pn podNet) inpod.Handlers {
	stay := n.enter(p)
	mark := int(n.cfg.PacketMark)
	self, account := n.self(p), n.ledger.Pod(p.UID)
	out := outbound.New(outbound.Config{
		Pod: p.UID, Tunnel: stay, Self: self, View: n.store.View, Flow: n.flow, Tunnels: n.tunnels, OriginalDst: pn.originalDst,
		Demand: n.demand, Resolver: n.names, Health: n.health, Neighbours: n, Leased: n.leased(stay), Origin: n.opener(new(origin.Reader)),
		Dial: func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
			d := &net.Dialer{Timeout: inbound.ConnectTimeout, KeepAlive: -1, Control: sockopt.ControlFor(sockopt.Options{Mark: mark})}
			return n.dialed(p.NS.Dial(ctx, d, "tcp", addr.String()))
		},
	})
	keepSource := n.cfg.EnableOrigSrc && pn.only == 0
	sockets := p.NS.NewStock(inbound.AppOptions(mark, keepSource, n.cfg.liveness()))
	app := &inbound.AppDialer{Sockets: sockets, KeepSource: keepSource, Buffers: account.Buffers}
	in := inbound.New(inbound.Config{Pod: p.UID, Self: self, View: n.store.View, Flow: n.flow, Dial: app.Dial, OriginalDst: inboundDst(pn.originalDst),
		Demand: n.demand, NoBaggage: !n.cfg.ResponseBaggage, LocalTunnel: n.cfg.LocalhostAppTunnel, Only: pn.only})
	srv := hbone.NewServer(hbone.ServerConfig{
		TLS:     func(ctx context.Context, _ netip.AddrPort) (*tls.Config, error) { return n.serverTLS(ctx, self) },
		Handler: in.ServeConnect, Opened: n.track(cert.Destination),
		Windows: n.cfg.windows(), Account: account, AmbitRecords: n.cfg.TLSRecords == "ambit",
		Logger: boot.Scoped(n.log, "hbone"), Registerer: n.reg,
	})
	nb := n.settle(p, stay, in)
	n.mu.Lock()
	n.serving[stay] = &podServe{pod: p, hbone: srv, account: account}
	n.mu.Unlock()
	h := inpod.Handlers{
		Account:   account,
		Refused:   func(c sockopt.Socket, err error) { n.refusedByShare(p, c, err) },
		Outbound:  func(ctx context.Context, c sockopt.Socket, ended func()) { out.Serve(ctx, c, ended) },
		Plaintext: func(ctx context.Context, c sockopt.Socket, ended func()) { in.Serve(ctx, c, ended) },
		HBONE: inpod.Blocking(func(ctx context.Context, c sockopt.Socket) {
			n.refused(p, c, srv.ServeConn(ctx, c))
		}),
		Drain: func(ctx context.Context) { _ = srv.Shutdown(ctx) }, // past the deadline Close cuts
		Wait:  func() { n.leave(nb); nb.conns.Wait() },
		Cut:   func(cause error) { n.leave(nb); nb.cut(cause) },
		Close: func() {
			_ = srv.Close() // idempotent, nothing to report
			sockets.Close()
			n.tunnels.ClosePod(stay)
			n.mu.Lock()
			delete(n.pods, stay)
			delete(n.serving, stay)
			n.mu.Unlock()
			n.leave(nb) // also of a pod that never came to be served
			account.Close()
		},
	}
	if n.cfg.SOCKS5 {
		h.SOCKS = n.socks(p, out, self)
	}
	if !n.cfg.EnableProxy {
		h.SOCKS = nil
		h.Outbound, h.Plaintext, h.HBONE = nil, nil, nil
	}
	n.serveDNS(p, pn, account, &h)
	return h
}

// opener reads who opened a pod's connections, if their lines will say it.
func (n *node) opener(r *origin.Reader) func(net.Conn, *origin.Origin) {
	return func(c net.Conn, to *origin.Origin) {
		if n.flow.Logs() {
			r.Read(c, to)
			n.origins.Note(*to)
		}
	}
}

// enter names one stay of a pod. A pod that returns while its earlier stay
// drains has two: the tunnels and sockets of one must not end with the other.
func (n *node) enter(p handoff.Pod) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stays++
	stay := p.UID + "#" + strconv.FormatUint(n.stays, 10)
	n.pods[stay] = p.NS
	return stay
}

func (n *node) serverTLS(ctx context.Context, self func(context.Context) (*mesh.Workload, error)) (*tls.Config, error) {
	w, err := self(ctx)
	if err != nil {
		return nil, err
	}
	c, err := n.certs.Get(ctx, w.Identity)
	if err != nil {
		return nil, err
	}
	// It is at hand, so that no handshake lets others pass in order to ask for it.
	cfg := n.certs.ServerConfig(w.Identity).Clone()
	cfg.GetCertificate, cfg.Certificates = nil, []tls.Certificate{c.TLS}
	return cfg, nil
}

// refused records a tunnel that never came to carry a stream. A peer that
// connects and leaves without a word (a port check) is not worth a line.
func (n *node) refused(p handoff.Pod, c net.Conn, err error) {
	s, ok := errors.AsType[*hbone.ServeError](err)
	if !ok || s.Stage == hbone.StageTLS && errors.Is(err, io.EOF) {
		return
	}
	if fault, ok := errors.AsType[*hbone.ConnError](err); s.Stage == hbone.StageH2 && (!ok || fault.Remote) {
		return // a tunnel that was in use: its streams have told
	}
	n.flow.Refuse(flow.Record{Direction: flow.Inbound, Pod: p.UID, Dst: n.lookup(p), SrcAddr: addrPortOf(c.RemoteAddr()), DstAddr: addrPortOf(c.LocalAddr())}, err)
}

// refusedByShare records a connection for which its own pod has no share left.
func (n *node) refusedByShare(p handoff.Pod, c net.Conn, err error) {
	rec := flow.Record{Direction: flow.Inbound, Pod: p.UID, SrcAddr: addrPortOf(c.RemoteAddr()), DstAddr: addrPortOf(c.LocalAddr()), Transport: flow.Plaintext}
	if w := n.lookup(p); rec.SrcAddr.Addr() == rec.DstAddr.Addr() || w != nil && w.HasAddr(rec.SrcAddr.Addr()) {
		rec.Direction, rec.Src = flow.Outbound, w
	} else {
		rec.Dst = w
	}
	n.flow.Refuse(rec, flow.Failed(flow.ReasonLimit, err))
}

func addrPortOf(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

// retire asks the peers of pods that are terminating to leave while the pods'
// namespaces still live: GOAWAY after the pod's end would reach nobody.
func (n *node) retire() {
	n.mu.Lock()
	var leaving []*hbone.Server
	for _, s := range n.serving {
		if w := n.lookup(s.pod); !s.retired && w != nil && w.Terminating {
			s.retired = true
			leaving = append(leaving, s.hbone)
		}
	}
	n.mu.Unlock()
	for _, s := range leaving {
		s.Retire()
	}
}

// departed ends new use of the tunnels to addresses where a workload no longer
// is. What has the address now, if anything, is reached by tunnels of its own.
func (n *node) departed(_, current *store.View, ch store.Change) {
	if gone := vacated(current.Mesh, ch, n.cfg.Network); len(gone) > 0 {
		n.tunnels.Gone(func(k hbone.Key) bool { return gone[k.Addr.Addr()] })
	}
}

// vacated returns the addresses in a network, or in any if it has no name, that
// a change has taken from workloads that tunnels led to.
func vacated(m *mesh.Snapshot, ch store.Change, network string) map[netip.Addr]bool {
	var gone map[netip.Addr]bool
	for _, c := range ch.Workloads {
		if c.Old == nil || c.Old.Tunnel != workload.TunnelProtocol_HBONE || network != "" && c.Old.Network != network {
			continue // another network's addresses are not dialled
		}
		for _, a := range c.Old.Addrs {
			if w := m.WorkloadByAddr(c.Old.Network, a); w != nil && w.UID == c.UID && w.Tunnel == c.Old.Tunnel {
				continue
			}
			if gone == nil {
				gone = map[netip.Addr]bool{}
			}
			gone[a] = true
		}
	}
	return gone
}

// identities follows the node's pods and tells the certificate manager whom to
// have certificates for.
func (n *node) identities(ctx context.Context, pods func() []handoff.Pod) error {
	for {
		changec := n.changed.wait()
		var ids []identity.ID
		for _, p := range pods() {
			if w := n.lookup(p); w != nil {
				ids = append(ids, w.Identity)
			}
		}
		n.certs.Retain(ids)
		n.retire()
		select {
		case <-changec:
		case <-ctx.Done():
			return nil
		}
	}
}

// broadcast wakes all that wait.
type broadcast struct {
	mu sync.Mutex
	c  chan struct{}
}

func newBroadcast() *broadcast { return &broadcast{c: make(chan struct{})} }

func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.c
}

func (b *broadcast) signal() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.c)
	b.c = make(chan struct{})
}
