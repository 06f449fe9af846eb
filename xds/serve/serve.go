// Package serve is the control plane's gRPC port: delta ADS and the
// certificate API, both over TLS and both only for callers with a valid token.
//
//	             ┌ auth ─ Caller ─┐
//	stream ──────┤                ├─ delta.Stream ◀─ wake ─ Push ◀─ delta.Store
//	certificate ─┘                └─ ca.NodeRule ─▶ ca.Authority
//
// Each ADS stream has two goroutines, both ended before its handler returns:
// the handler itself, which sends, and recvLoop. They share the stream's state
// under its lock. Push only wakes senders, so a slow client delays nobody, and
// what it has not been sent merges in the store (see package delta): there is
// no queue to overflow. A client that stopped reading holds its own connection
// until keepalive ends it.
package serve

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/ambit-mesh/ambit/xds/api/ca"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/api/trust"
	authority "github.com/ambit-mesh/ambit/xds/ca"
	"github.com/ambit-mesh/ambit/xds/delta"
	"github.com/ambit-mesh/ambit/xds/identity"
)

const (
	// maxReceive lets a client with 100k resources name all its versions in
	// one request (some 100 bytes each); the default of 4 MiB is a known trap.
	maxReceive = 24 << 20
	// maxSend is above the largest first response (delta.Limits.FirstBytes).
	maxSend = 256 << 20
	// maxStreamsPerConn bounds one connection: a proxy needs one for xDS and
	// up to eight certificate requests.
	maxStreamsPerConn = 64
	// streamsPerCaller leaves room for a client that reconnects before the
	// server has noticed that its last connections died.
	streamsPerCaller = 8
	// pingEvery and pingTimeout end connections of nodes that vanished.
	pingEvery   = 30 * time.Second
	pingTimeout = 10 * time.Second
	// idleTimeout ends connections without a call, such as those that never had
	// one. Proxies connect again when they need a certificate.
	idleTimeout = 10 * time.Minute
	// pingMin refuses clients that ping more often than proxies do (30 s).
	pingMin = 10 * time.Second
	// handshakeTimeout covers TCP accept to HTTP/2 preface.
	handshakeTimeout = 10 * time.Second
)

// signer is the part of the authority that requests need.
type signer interface {
	Sign(csrPEM []byte, id identity.ID, ttl time.Duration) ([]string, error)
}

// identityRule decides which identity a caller may have.
type identityRule interface {
	Identity(c authority.Caller, impersonate string) (identity.ID, error)
}

// Config is what a Server needs. All fields without a stated zero value are
// required.
type Config struct {
	Store    *delta.Store
	Reviewer authority.TokenReviewer
	Signer   signer
	// Trust is pushed to proxies that ask, as that of the first of TrustDomains;
	// the others are its aliases. nil: the service is not offered.
	Trust        bundler
	TrustDomains func() []string
	Rule         identityRule
	TLS          *tls.Config
	Log          *slog.Logger
	Metrics      prometheus.Registerer
	// MaxConnectionAge makes clients reconnect now and then, ±10 %, so that
	// they spread over replicas. 0: never.
	MaxConnectionAge time.Duration
	Limits           delta.Limits
	// Now is the clock of status pages; nil: time.Now.
	Now func() time.Time
}

// Server serves both APIs.
type Server struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	ca.UnimplementedIstioCertificateServiceServer

	cfg     Config
	grpc    *grpc.Server
	metrics *metrics
	stopc   chan struct{} // closed when shutdown begins: streams end themselves
	stop    sync.Once
	nextID  atomic.Uint64
	large   turns
	trust   *trustService // nil: not offered

	mu      sync.Mutex
	streams map[*stream]struct{} // guarded by mu
	callers map[string]int       // guarded by mu; streams per caller
}

// New registers the server's metrics and services.
func New(c Config) (*Server, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	s := &Server{cfg: c, stopc: make(chan struct{}), large: make(turns, largeTurns), streams: map[*stream]struct{}{}, callers: map[string]int{}}
	m, err := newMetrics(c.Metrics, s)
	if err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	s.metrics = m
	params := keepalive.ServerParameters{Time: pingEvery, Timeout: pingTimeout, MaxConnectionIdle: idleTimeout}
	if c.MaxConnectionAge > 0 {
		params.MaxConnectionAge = c.MaxConnectionAge // gRPC adds the jitter
		params.MaxConnectionAgeGrace = pingTimeout
	}
	s.grpc = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(c.TLS)),
		grpc.KeepaliveParams(params),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingMin, PermitWithoutStream: true}),
		grpc.MaxRecvMsgSize(maxReceive),
		grpc.MaxSendMsgSize(maxSend),
		grpc.MaxConcurrentStreams(maxStreamsPerConn),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.StreamInterceptor(s.authStream),
		grpc.WaitForHandlers(true), // Stop returns when no goroutine of ours is left
	)
	discovery.RegisterAggregatedDiscoveryServiceServer(s.grpc, s)
	s.grpc.RegisterService(&certificateService, s)
	if c.Trust != nil {
		s.trust = &trustService{server: s, watch: c.Trust, domains: c.TrustDomains, watchers: map[string]int{}}
		trust.RegisterTrustServiceServer(s.grpc, s.trust)
	}
	return s, nil
}

// Serve accepts connections until Shutdown.
func (s *Server) Serve(ln net.Listener) error {
	if err := s.grpc.Serve(ln); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve %s: %w", ln.Addr(), err)
	}
	return nil
}

// Shutdown tells clients to go elsewhere and waits for running calls until ctx
// ends, then cuts them.
func (s *Server) Shutdown(ctx context.Context) {
	s.stop.Do(func() { close(s.stopc) })
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		s.grpc.GracefulStop()
	}()
	select {
	case <-donec:
	case <-ctx.Done():
		s.grpc.Stop()
		<-donec
	}
}

// Push tells every stream that the store changed. It never blocks.
func (s *Server) Push() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := range s.streams {
		st.wake()
	}
}

// admit counts a stream against its caller.
func (s *Server) admit(st *stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.callers[st.key] >= streamsPerCaller {
		return false
	}
	s.callers[st.key]++
	s.streams[st] = struct{}{}
	return true
}

func (s *Server) release(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, st)
	if s.callers[st.key]--; s.callers[st.key] == 0 {
		delete(s.callers, st.key)
	}
}
