package inpod

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// Handler serves one accepted connection. It calls ended once, when that has
// ended, and may return before.
type Handler func(ctx context.Context, c sockopt.Socket, ended func())

// Blocking is a handler that returns when the connection has ended.
func Blocking(serve func(ctx context.Context, c sockopt.Socket)) Handler {
	return func(ctx context.Context, c sockopt.Socket, ended func()) {
		defer ended()
		serve(ctx, c)
	}
}

// Handlers are what serves a pod. A port without a handler is not listened on.
type Handlers struct {
	Outbound, Plaintext, HBONE Handler
	// DNS of the pod: its UDP sockets and TCP connections, or neither.
	DNSPacket PacketHandler
	DNSStream Handler
	SOCKS     Handler // on loopback only
	// Account is the pod's share of the node; nil means no limits.
	Account *ledger.Account
	// Refused is told of connections that are reset at once, and why; it must
	// not block. Nil: nobody is.
	Refused func(c sockopt.Socket, err error)
	// Drain asks peers to leave (GOAWAY) and returns when they have or ctx
	// ends. Close cuts what is left and frees the rest.
	Drain func(ctx context.Context)
	Close func()
	// Wait ends and awaits what reaches the pod by other ways than its
	// listeners: through the handlers of pods on the same node. Cut ends it at
	// once. Nil: nothing does.
	Wait func()
	Cut  func(cause error)
}

// ErrNoShare is why a connection is reset as soon as it is accepted.
var ErrNoShare = errors.New("the pod has used up its share of the node's connections")

// Ports of the proxy, the reference's. socksPort is nobody's but the pod's own
// processes'.
const (
	outboundPort  = "15001"
	plaintextPort = "15006"
	hbonePort     = "15008"
	socksPort     = "15080"
)

// pod is one served pod.
type pod struct {
	info      handoff.Pod
	handlers  Handlers
	log       *slog.Logger
	ctx       context.Context // of its connections
	cancel    context.CancelCauseFunc
	listeners []listener    // until stopAccepting
	stopc     chan struct{} // closed by stopAccepting
	acceptCtx context.Context
	endAccept context.CancelFunc
	endDNS    context.CancelCauseFunc
	accepting sync.WaitGroup
	conns     sync.WaitGroup
}

// listener accepts connections; *netns.Listener is one.
type listener interface {
	// Each calls f with each of them until accepting fails, and returns why.
	Each(f func(c *netns.Conn)) error
	Addr() net.Addr
	Close() error
}

func newPod(info handoff.Pod, h Handlers, log *slog.Logger) *pod {
	p := &pod{info: info, handlers: h, log: log, stopc: make(chan struct{}), endDNS: func(error) {}}
	p.ctx, p.cancel = context.WithCancelCause(context.Background())
	p.acceptCtx, p.endAccept = context.WithCancel(context.Background())
	return p
}

// listen makes one listener, and with it what all that it accepts has in common. The
// mark says to the pod's rules that the listener's own traffic is not to be
// captured; transparency lets 15006 answer from addresses that are not the pod's.
// Captured connections end with RST if this process dies, from the moment the
// kernel has accepted them: FIN would look like an empty answer. relay.Join
// restores the orderly close when both directions have ended.
func (m *Manager) listen(ctx context.Context, ns *netns.NS, port string) (listener, error) {
	ln, err := m.bind(ctx, ns, port)
	if err != nil {
		return nil, err
	}
	return netns.NewListener(ln)
}

func (m *Manager) bind(ctx context.Context, ns *netns.NS, port string) (net.Listener, error) {
	lc := &net.ListenConfig{
		KeepAlive: -1, // the mesh's instead
		Control: sockopt.ControlFor(sockopt.Options{Mark: m.cfg.Mark, TransparentBestEffort: true, ReusePort: !m.cfg.NoPortReuse, NoDelay: true,
			Liveness: &m.cfg.Liveness, ResetOnClose: port == outboundPort || port == plaintextPort}),
	}
	if port == socksPort {
		return ns.Listen(ctx, lc, "tcp4", "127.0.0.1:"+port)
	}
	if m.cfg.IPv6 {
		ln, err := ns.Listen(ctx, lc, "tcp", "[::]:"+port)
		if err == nil || !errors.Is(err, syscall.EAFNOSUPPORT) && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			return ln, err
		}
	}
	return ns.Listen(ctx, lc, "tcp4", "0.0.0.0:"+port)
}

// accept takes connections of ln. account bounds them, nil where the handler
// does so itself.
func (p *pod) accept(ln listener, account *ledger.Account, serve Handler) {
	p.listeners = append(p.listeners, ln)
	p.accepting.Go(func() { p.acceptLoop(ln, account, serve) })
}

// acceptLoop goes on through every error but its listener's end: out of
// descriptors it waits, longer each time, so that others can close theirs.
func (p *pod) acceptLoop(ln listener, account *ledger.Account, serve Handler) {
	wait := time.Duration(0)
	for {
		err := ln.Each(func(c *netns.Conn) {
			wait = 0
			p.accepted(c, account, serve)
		})
		if errors.Is(err, net.ErrClosed) {
			return
		}
		wait = min(max(2*wait, 5*time.Millisecond), time.Second)
		p.log.Warn("accept", "addr", ln.Addr().String(), "error", err.Error(), "retry_in", wait.String())
		select {
		case <-time.After(wait):
		case <-p.stopc:
		}
	}
}

// accepted starts serving one connection, or refuses it.
func (p *pod) accepted(c *netns.Conn, account *ledger.Account, serve Handler) {
	if !account.TryAcquire(ledger.Connections, 1) {
		if p.handlers.Refused != nil {
			p.handlers.Refused(c, ErrNoShare)
		}
		_ = sockopt.Reset(c) // it is gone either way
		return
	}
	o, _ := account.Open(p.acceptCtx) // at the end, what was accepted is served without
	p.conns.Add(1)
	go p.serveConn(c, account, o, serve)
}

func (p *pod) serveConn(c sockopt.Socket, account *ledger.Account, o *ledger.Opening, serve Handler) {
	ended := func() {
		_ = c.Close() // most have done that
		account.Release(ledger.Connections, 1)
		o.Done()
		p.conns.Done()
	}
	if size := account.Buffers(); size > 0 && local(c) { // where it is costs a system call to know
		_ = sockopt.BoundBuffers(c, size) // memory, not correctness
	}
	serve(o.With(p.ctx), c, ended)
}

// local reports whether one of the pod's own processes connected: the kernel
// redirects those to loopback.
func local(c net.Conn) bool {
	a, ok := c.LocalAddr().(*net.TCPAddr)
	return ok && a.IP.IsLoopback()
}

// stopAccepting closes the listeners, once; connections go on.
func (p *pod) stopAccepting() {
	close(p.stopc)
	p.endAccept()
	p.endDNS(flow.ErrDrained)
	for _, ln := range p.listeners {
		_ = ln.Close() // nothing to lose on a listener
	}
	p.accepting.Wait()
}

// drain waits for the connections until ctx ends, then cuts them.
func (p *pod) drain(ctx context.Context) {
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		if p.handlers.Wait != nil {
			p.handlers.Wait() // first: neighbours have no listener that is closed to them
		}
		p.conns.Wait()
	}()
	// Its context ends after the connections, so that each of these ends with
	// the cause below and not with that of a tunnel that vanished under it.
	dctx, dcancel := context.WithCancel(context.Background())
	defer dcancel()
	var draining sync.WaitGroup
	if p.handlers.Drain != nil {
		draining.Go(func() { p.handlers.Drain(dctx) })
	}
	select {
	case <-donec:
	case <-ctx.Done():
	}
	p.cancel(flow.ErrDrained)
	if p.handlers.Cut != nil {
		p.handlers.Cut(flow.ErrDrained)
	}
	<-donec
	dcancel()
	draining.Wait()
	if p.handlers.Close != nil {
		p.handlers.Close()
	}
	_ = p.info.NS.Close() // its sockets are gone
}
