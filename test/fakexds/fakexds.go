// Package fakexds is a small delta-ADS server inside the test's process: real
// gRPC over real TLS, with resources that the test sets and removes. It honours
// initial_resource_versions and keeps what each client sent.
//
// Its methods may be called from any goroutine. It is not a model of the
// product's control plane: it serves wildcard subscriptions only.
package fakexds

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"maps"
	"math/big"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/test/netlab"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

// Server serves what Set and Remove put into it.
type Server struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer

	addr  string
	roots *x509.CertPool
	cert  tls.Certificate

	mu        sync.Mutex
	version   int
	resources map[string]map[string]*discovery.Resource // type → name
	streams   map[*stream]bool
	requests  []Request
	responses []*discovery.DeltaDiscoveryResponse
	changed   chan struct{} // closed and replaced when requests grow
	grpc      *grpc.Server
	served    sync.WaitGroup
}

// Request is a request with the headers of its stream.
type Request struct {
	*discovery.DeltaDiscoveryRequest
	Header metadata.MD
	Stream int // counts from 1
}

type stream struct {
	number int
	has    map[string]map[string]string // type → name → version
	wakec  chan struct{}
	rawc   chan *discovery.DeltaDiscoveryResponse
}

// New starts a server that ends with the test.
func New(tb testing.TB) *Server {
	tb.Helper()
	s := &Server{
		resources: map[string]map[string]*discovery.Resource{}, streams: map[*stream]bool{},
		changed: make(chan struct{}),
	}
	if err := s.makeCert(); err != nil {
		tb.Fatal(err)
	}
	s.listen(netlab.ListenAgain(tb))
	tb.Cleanup(s.Stop)
	return s
}

func (s *Server) listen(l net.Listener) {
	s.addr = l.Addr().String()
	creds := credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{s.cert}})
	// The default limit on requests: clients must stay below it.
	g := grpc.NewServer(grpc.Creds(creds))
	discovery.RegisterAggregatedDiscoveryServiceServer(g, s)
	s.mu.Lock()
	s.grpc = g
	s.mu.Unlock()
	s.served.Go(func() { _ = g.Serve(l) }) // ends with Stop
}

// Stop cuts all streams and stops listening.
func (s *Server) Stop() {
	s.mu.Lock()
	g := s.grpc
	s.mu.Unlock()
	g.Stop()
	s.served.Wait()
}

// Restart cuts all streams and listens again on the same address.
func (s *Server) Restart(tb testing.TB) {
	tb.Helper()
	s.Stop()
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		tb.Fatal(err)
	}
	s.listen(l)
}

// Addr is host:port.
func (s *Server) Addr() string { return s.addr }

// TLS is the client's configuration.
func (s *Server) TLS() (*tls.Config, error) { return &tls.Config{RootCAs: s.roots}, nil }

func (s *Server) makeCert() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "fakexds"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost", "istiod.istio-system.svc"},
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	s.roots = x509.NewCertPool()
	s.roots.AddCert(leaf)
	s.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return nil
}

// Set adds or changes a resource and pushes it.
func (s *Server) Set(name string, m proto.Message) {
	a, err := anypb.New(m)
	if err != nil {
		panic("BUG: fakexds: " + err.Error())
	}
	s.SetAny(a.GetTypeUrl(), name, a)
}

// SetAny is Set for a value that need not be what the type says.
func (s *Server) SetAny(typeURL, name string, value *anypb.Any) {
	s.Update(func(set func(typeURL, name string, value *anypb.Any), _ func(typeURL, name string)) {
		set(typeURL, name, value)
	})
}

// Remove removes a resource and pushes that.
func (s *Server) Remove(typeURL, name string) {
	s.Update(func(_ func(string, string, *anypb.Any), remove func(typeURL, name string)) { remove(typeURL, name) })
}

// Update makes several changes that are pushed together.
func (s *Server) Update(f func(set func(typeURL, name string, value *anypb.Any), remove func(typeURL, name string))) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(func(typeURL, name string, value *anypb.Any) {
		s.version++
		if s.resources[typeURL] == nil {
			s.resources[typeURL] = map[string]*discovery.Resource{}
		}
		s.resources[typeURL][name] = &discovery.Resource{Name: name, Version: fmt.Sprint(s.version), Resource: value}
	}, func(typeURL, name string) { delete(s.resources[typeURL], name) })
	for st := range s.streams {
		select {
		case st.wakec <- struct{}{}:
		default: // it will see this change with the one that woke it
		}
	}
}

// Say sends a response as it is on every stream: whatever a control plane could
// come to say.
func (s *Server) Say(ctx context.Context, resp *discovery.DeltaDiscoveryResponse) error {
	s.mu.Lock()
	streams := slices.Collect(maps.Keys(s.streams))
	s.mu.Unlock()
	for _, st := range streams {
		select {
		case st.rawc <- resp:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Requests returns all requests so far.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Responses returns all responses sent so far.
func (s *Server) Responses() []*discovery.DeltaDiscoveryResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.responses)
}

// Wait blocks until a request fulfils the condition and returns it.
func (s *Server) Wait(ctx context.Context, cond func(Request) bool) (Request, error) {
	for seen := 0; ; {
		s.mu.Lock()
		requests, changed := s.requests[seen:], s.changed
		s.mu.Unlock()
		for _, r := range requests {
			if cond(r) {
				return r, nil
			}
		}
		seen += len(requests)
		select {
		case <-changed:
		case <-ctx.Done():
			return Request{}, fmt.Errorf("wait for a request, %d seen: %w", seen, context.Cause(ctx))
		}
	}
}

// DeltaAggregatedResources serves one stream.
func (s *Server) DeltaAggregatedResources(g discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	header, _ := metadata.FromIncomingContext(g.Context())
	st := &stream{has: map[string]map[string]string{}, wakec: make(chan struct{}, 1), rawc: make(chan *discovery.DeltaDiscoveryResponse)}
	s.mu.Lock()
	s.streams[st] = true
	for _, r := range s.requests {
		st.number = max(st.number, r.Stream)
	}
	st.number++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.streams, st)
		s.mu.Unlock()
	}()
	requests := make(chan *discovery.DeltaDiscoveryRequest)
	go func() { // ends with the stream
		defer close(requests)
		for {
			r, err := g.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- r:
			case <-g.Context().Done():
				return
			}
		}
	}()
	for {
		select {
		case r, ok := <-requests:
			if !ok {
				return nil
			}
			if s.record(st, header, r) {
				if err := s.push(g, st, r.GetTypeUrl(), true); err != nil {
					return err
				}
			}
		case <-st.wakec:
			for _, t := range slices.Sorted(maps.Keys(st.has)) {
				if err := s.push(g, st, t, false); err != nil {
					return err
				}
			}
		case resp := <-st.rawc:
			if err := g.Send(resp); err != nil {
				return err
			}
		case <-g.Context().Done():
			return g.Context().Err()
		}
	}
}

// record keeps a request and reports whether it is a new subscription.
func (s *Server) record(st *stream, header metadata.MD, r *discovery.DeltaDiscoveryRequest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, Request{r, header, st.number})
	close(s.changed)
	s.changed = make(chan struct{})
	if st.has[r.GetTypeUrl()] != nil {
		return false
	}
	st.has[r.GetTypeUrl()] = map[string]string{}
	maps.Copy(st.has[r.GetTypeUrl()], r.GetInitialResourceVersions())
	return true
}

// push sends what the client does not have; the first response also when that
// is nothing, since clients wait for it.
func (s *Server) push(g discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, st *stream, typeURL string, always bool) error {
	s.mu.Lock()
	has := st.has[typeURL]
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}
	for _, name := range slices.Sorted(maps.Keys(s.resources[typeURL])) {
		if r := s.resources[typeURL][name]; has[name] != r.GetVersion() {
			resp.Resources = append(resp.Resources, r)
			has[name] = r.GetVersion()
		}
	}
	for _, name := range slices.Sorted(maps.Keys(has)) {
		if s.resources[typeURL][name] == nil {
			resp.RemovedResources = append(resp.RemovedResources, name)
			delete(has, name)
		}
	}
	resp.Nonce = fmt.Sprint(len(s.responses) + 1)
	send := always || len(resp.GetResources())+len(resp.GetRemovedResources()) > 0
	if send {
		s.responses = append(s.responses, resp)
	}
	s.mu.Unlock()
	if !send {
		return nil
	}
	return g.Send(resp)
}
