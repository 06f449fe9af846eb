package serve

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
	authority "github.com/ambit-mesh/ambit/xds/ca"
	"github.com/ambit-mesh/ambit/xds/delta"
)

// stream is one proxy's ADS stream.
type stream struct {
	// immutable
	id     uint64
	key    string // of the caller, for limits
	caller authority.Caller
	peer   string
	since  time.Time
	log    *slog.Logger
	wakec  chan struct{} // cap 1: wakes merge

	mu       sync.Mutex
	state    *delta.Stream // guarded by mu
	node     string        // guarded by mu; the id of the first request
	nackTime time.Time     // guarded by mu
}

func (st *stream) wake() {
	select {
	case st.wakec <- struct{}{}:
	default:
	}
}

// DeltaAggregatedResources serves one proxy until either side ends the stream.
func (s *Server) DeltaAggregatedResources(ss grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]) error {
	ctx := ss.Context()
	st := s.newStream(ctx)
	if !s.admit(st) {
		s.metrics.streamsRefused.Inc()
		st.log.Warn("stream refused", "error", "too many streams of this caller", "limit", streamsPerCaller)
		return status.Errorf(codes.ResourceExhausted, "%s has %d streams open already, the limit per caller", st.caller, streamsPerCaller)
	}
	defer s.release(st)
	st.log.Debug("stream opened")

	recvc := make(chan error, 1)
	go func() { recvc <- s.recvLoop(ss, st) }()
	err := s.sendLoop(ctx, ss, st, recvc)
	why := "closed by the proxy"
	if err != nil {
		why = err.Error()
	}
	st.log.Info("proxy disconnected", "node", st.nodeID(), "why", why)
	return err
	// recvLoop ends when the handler returns, which cancels the stream; its
	// result fits the channel. Server.Shutdown cannot wait for it, but it
	// touches nothing of the server once its Recv has failed.
}

func (s *Server) newStream(ctx context.Context) *stream {
	caller := callerOf(ctx)
	id := s.nextID.Add(1)
	return &stream{
		id: id, caller: caller, peer: peerAddr(ctx), since: s.cfg.Now(),
		key:   strings.Join([]string{caller.Namespace, caller.ServiceAccount, caller.PodName, caller.PodUID, caller.Node}, "\x00"),
		log:   s.cfg.Log.With("stream", id, "peer", peerAddr(ctx), "caller", caller.String()),
		wakec: make(chan struct{}, 1),
		state: s.cfg.Store.NewStream(s.cfg.Limits),
	}
}

// recvLoop takes in requests and wakes the sender for each.
func (s *Server) recvLoop(ss grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse], st *stream) error {
	for {
		req, err := ss.Recv()
		if err != nil {
			return err
		}
		if err := s.request(st, req); err != nil {
			return err
		}
		st.wake()
	}
}

func (s *Server) request(st *stream, req *discovery.DeltaDiscoveryRequest) error {
	if err := st.identify(req.Node); err != nil {
		return err
	}
	st.mu.Lock()
	ev, err := st.state.Request(req)
	if ev.Rejected {
		st.nackTime = s.cfg.Now()
	}
	st.mu.Unlock()
	if err != nil {
		s.metrics.requests.WithLabelValues("bad").Inc()
		return status.Error(codes.InvalidArgument, err.Error())
	}
	switch {
	case ev.Rejected:
		s.metrics.requests.WithLabelValues("nack").Inc()
		st.log.Warn("proxy rejected resources", "type", ev.Type, "error", ev.Nack)
	case ev.Ack:
		s.metrics.requests.WithLabelValues("ack").Inc()
	default:
		s.metrics.requests.WithLabelValues("subscribe").Inc()
	}
	if ev.First {
		st.log.Info("proxy subscribed", "node", st.nodeID(), "type", ev.Type, "resumed", ev.Resumed)
	}
	return nil
}

// maxNodeID bounds what a client can make status pages and logs show: two names
// of Kubernetes, an address and a domain fit.
const maxNodeID = 1024

// identify notes the node of the first request that has one, and refuses a
// proxy that claims to be on another node or in another namespace than its
// token says.
func (st *stream) identify(n *discovery.Node) error {
	if n == nil {
		return nil
	}
	st.mu.Lock()
	known := st.node != ""
	if !known {
		st.node = n.Id[:min(len(n.Id), maxNodeID)]
	}
	st.mu.Unlock()
	if known {
		return nil
	}
	claimed := n.GetMetadata().GetFields()
	if node := claimed["NODE_NAME"].GetStringValue(); node != "" && st.caller.Node != "" && node != st.caller.Node {
		return status.Errorf(codes.PermissionDenied, "metadata NODE_NAME is %q, the token is of node %q: give the proxy the token of its own node", node, st.caller.Node)
	}
	if ns := claimed["NAMESPACE"].GetStringValue(); ns != "" && ns != st.caller.Namespace {
		return status.Errorf(codes.PermissionDenied, "metadata NAMESPACE is %q, the token is of namespace %q: give the proxy the token of its own pod", ns, st.caller.Namespace)
	}
	return nil
}

func (st *stream) nodeID() string {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.node
}

// sendLoop sends what is due after each wake, one response at a time. Send
// blocks on the client's flow control; meanwhile changes merge in the store.
func (s *Server) sendLoop(ctx context.Context, ss grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse], st *stream, recvc <-chan error) error {
	for {
		select {
		case <-st.wakec:
			if err := s.sendDue(ss, st); err != nil {
				return err
			}
		case err := <-recvc:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-s.stopc:
			return status.Error(codes.Unavailable, "ambitd is shutting down: reconnect")
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func (s *Server) sendDue(ss grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse], st *stream) error {
	for {
		st.mu.Lock()
		resp, err := st.state.Next()
		st.mu.Unlock()
		if errors.Is(err, delta.ErrBehind) {
			s.metrics.behind.Inc()
			return status.Error(codes.Unavailable, err.Error()+": reconnect")
		}
		if err != nil {
			return status.Error(codes.Internal, err.Error())
		}
		if resp == nil {
			return nil
		}
		begin := time.Now()
		if err := s.send(ss, resp); err != nil {
			return err
		}
		s.metrics.sent(resp, time.Since(begin))
		st.log.Debug("sent", "type", resp.TypeUrl, "nonce", resp.Nonce, "resources", len(resp.Resources), "removed", len(resp.RemovedResources))
	}
}

// send sends one response, a large one when it is its turn.
func (s *Server) send(ss grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse], resp *discovery.DeltaDiscoveryResponse) error {
	if len(resp.Resources) < largeResponse {
		return ss.Send(resp)
	}
	done, ok := s.large.wait(ss.Context(), s.stopc)
	if !ok {
		return status.Error(codes.Unavailable, "the stream ends: reconnect")
	}
	defer done()
	return ss.Send(resp)
}

func peerAddr(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr.String()
	}
	return ""
}
