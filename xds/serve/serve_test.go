package serve

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ca"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
	authority "github.com/ambit-mesh/ambit/xds/ca"
	"github.com/ambit-mesh/ambit/xds/delta"
	"github.com/ambit-mesh/ambit/xds/identity"
)

func TestMain(m *testing.M) { leak.Main(m) }

// deadline is only reached by a test that fails.
const deadline = 60 * time.Second

type placement map[string]string // node → identity

func (p placement) RunsOn(node string, id identity.ID) bool { return p[node] == id.String() }

// pods knows those of callerA, callerB and an app.
type pods struct{}

func (pods) Pod(_, name string) (uid, node string, ok bool) {
	switch name {
	case "zt-a":
		return "ua", "node-a", true
	case "zt-b":
		return "ub", "node-b", true
	case "p":
		return "u", "node-b", true
	}
	return "", "", false
}

const (
	onA = "spiffe://cluster.local/ns/default/sa/a"
	onB = "spiffe://cluster.local/ns/default/sa/b"
)

var (
	callerA = authority.Caller{Namespace: "ambit-system", ServiceAccount: "ztunnel", PodName: "zt-a", PodUID: "ua", Node: "node-a"}
	callerB = authority.Caller{Namespace: "ambit-system", ServiceAccount: "ztunnel", PodName: "zt-b", PodUID: "ub", Node: "node-b"}
)

// testServer is a whole server on loopback.
type testServer struct {
	t      *testing.T
	ctx    context.Context
	store  *delta.Store
	server *Server
	tokens *authority.Tokens
	ca     *authority.Authority
	addr   string
}

func newTestServer(t *testing.T) *testServer {
	t.Helper()
	dir := t.TempDir()
	a, err := authority.Open(authority.Config{TrustDomain: "cluster.local", StateDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := authority.OpenTokens(dir, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := a.ServerTLS([]string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	s := &testServer{t: t, store: delta.NewStore(api.AuthorizationType, api.AddressType), tokens: tokens, ca: a}
	s.server, err = New(Config{
		Store: s.store, Reviewer: tokens, Signer: a, TLS: cert.Config(),
		Trust: a, TrustDomains: func() []string { return []string{"cluster.local", "old.example"} },
		Rule: &authority.NodeRule{TrustDomain: "cluster.local", Accounts: authority.DefaultNodeAccounts, Placement: placement{"node-a": onA, "node-b": onB}, Pods: pods{}},
		Log:  slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	served := make(chan error, 1)
	go func() { served <- s.server.Serve(ln) }()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	s.ctx = ctx
	t.Cleanup(func() {
		cancel()
		s.server.Shutdown(ctx)
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *testServer) token(c authority.Caller, audience string, ttl time.Duration) string {
	s.t.Helper()
	token, err := s.tokens.Mint(c, audience, ttl)
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

func (s *testServer) dial() *grpc.ClientConn {
	s.t.Helper()
	creds := credentials.NewTLS(&tls.Config{RootCAs: s.ca.RootPool(), ServerName: "127.0.0.1"})
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

func (s *testServer) as(token string) context.Context {
	return metadata.AppendToOutgoingContext(s.ctx, "authorization", "Bearer "+token)
}

func (s *testServer) apply(ups ...delta.Upsert) {
	s.t.Helper()
	if _, err := s.store.Apply(ups, nil); err != nil {
		s.t.Fatal(err)
	}
	s.server.Push()
}

func up(typ, name, content string) delta.Upsert {
	return delta.Upsert{Type: typ, Name: name, Message: wrapperspb.String(content)}
}

// testProxy is a client of the discovery API.
type testProxy struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]
	known  map[string]string
}

func (s *testServer) connect(c authority.Caller) *testProxy {
	s.t.Helper()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(s.dial()).DeltaAggregatedResources(s.as(s.token(c, "", time.Hour)))
	if err != nil {
		s.t.Fatal(err)
	}
	return &testProxy{s.t, stream, map[string]string{}}
}

func (p *testProxy) send(req *discovery.DeltaDiscoveryRequest) {
	p.t.Helper()
	if err := p.stream.Send(req); err != nil {
		p.t.Fatal(err)
	}
}

func (p *testProxy) subscribe(typ string) {
	p.t.Helper()
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typ, Node: &discovery.Node{Id: "ztunnel~10.0.0.1~zt.ambit-system~x"}, InitialResourceVersions: p.known})
}

func (p *testProxy) recv() *discovery.DeltaDiscoveryResponse {
	p.t.Helper()
	r, err := p.stream.Recv()
	if err != nil {
		p.t.Fatal(err)
	}
	return r
}

// want receives one response, acknowledges it and compares its names.
func (p *testProxy) want(names ...string) {
	p.t.Helper()
	r := p.recv()
	var got []string
	for _, res := range r.Resources {
		got = append(got, res.Name)
		p.known[res.Name] = res.Version
	}
	for _, n := range r.RemovedResources {
		got = append(got, "-"+n)
		delete(p.known, n)
	}
	if diff := cmp.Diff(names, got); diff != "" {
		p.t.Fatalf("response (-want +got):\n%s", diff)
	}
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
}

func (p *testProxy) wantEnd(code codes.Code, text string) {
	p.t.Helper()
	for {
		_, err := p.stream.Recv()
		if err == nil {
			continue
		}
		if status.Code(err) != code || !strings.Contains(err.Error(), text) {
			p.t.Fatalf("stream ended with %v, want %s and %q", err, code, text)
		}
		return
	}
}

// until waits for a state of the server that has no event to wait for.
func (s *testServer) until(what string, f func() bool) {
	s.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-s.ctx.Done():
			s.t.Fatal("did not happen: " + what)
		case <-tick.C:
		}
	}
}

func TestNoCallWithoutAToken(t *testing.T) {
	s := newTestServer(t)
	foreign, err := authority.OpenTokens(t.TempDir(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := foreign.Mint(callerA, "", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]context.Context{
		"none":     s.ctx,
		"empty":    s.as(""),
		"garbage":  s.as("x.y.z"),
		"forged":   s.as(forged),
		"audience": s.as(s.token(callerA, "other", time.Hour)),
		"basic":    metadata.AppendToOutgoingContext(s.ctx, "authorization", "Basic "+s.token(callerA, "", time.Hour)),
	}
	conn := s.dial()
	for name, ctx := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := ca.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &ca.IstioCertificateRequest{})
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("certificate: %v, want Unauthenticated", err)
			}
			stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
			if err == nil {
				_, err = stream.Recv()
			}
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("discovery: %v, want Unauthenticated", err)
			}
		})
	}
}

// gRPC reads up to 24 MiB of a unary request before an interceptor runs; without
// a token not one byte of it may be waited for.
func TestNoRequestIsReadWithoutAToken(t *testing.T) {
	s := newTestServer(t)
	conn := s.dial()
	for _, method := range []string{ca.IstioCertificateService_CreateCertificate_FullMethodName, discovery.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName} {
		stream, err := conn.NewStream(s.ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.RecvMsg(&ca.IstioCertificateResponse{}); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v, want Unauthenticated before the request was sent", method, err)
		}
	}
}

func TestANodeGetsOnlyItsOwnPodsIdentities(t *testing.T) {
	s := newTestServer(t)
	client := ca.NewIstioCertificateServiceClient(s.dial())
	tests := []struct {
		name   string
		caller authority.Caller
		id     any
		code   codes.Code
		want   string // identity in the leaf
	}{
		{"A asks for its pod", callerA, onA, codes.OK, onA},
		{"B asks for its pod", callerB, onB, codes.OK, onB},
		{"A asks for B's pod", callerA, onB, codes.PermissionDenied, ""},
		{"B asks for A's pod", callerB, onA, codes.PermissionDenied, ""},
		{"A asks for itself", callerA, nil, codes.OK, "spiffe://cluster.local/ns/ambit-system/sa/ztunnel"},
		{"an app asks for another", authority.Caller{Namespace: "default", ServiceAccount: "a", PodName: "p", PodUID: "u", Node: "node-b"}, onB, codes.PermissionDenied, ""},
		{"a pod that is gone asks for itself", authority.Caller{Namespace: "default", ServiceAccount: "a", PodName: "gone", PodUID: "u", Node: "node-b"}, nil, codes.PermissionDenied, ""},
		{"not a string", callerA, 7.0, codes.InvalidArgument, ""},
		{"not an identity", callerA, "a/b", codes.InvalidArgument, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := &ca.IstioCertificateRequest{Csr: testCSR(t), ValidityDuration: 3600}
			if tt.id != nil {
				m, err := structpb.NewStruct(map[string]any{impersonatedKey: tt.id})
				if err != nil {
					t.Fatal(err)
				}
				req.Metadata = m
			}
			resp, err := client.CreateCertificate(s.as(s.token(tt.caller, "", time.Hour)), req)
			if status.Code(err) != tt.code {
				t.Fatalf("got %v, want %s", err, tt.code)
			}
			if tt.code != codes.OK {
				return
			}
			block, _ := pem.Decode([]byte(resp.CertChain[0]))
			leaf, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(leaf.URIs); got != "["+tt.want+"]" {
				t.Errorf("identity %s, want %s", got, tt.want)
			}
			if last := resp.CertChain[len(resp.CertChain)-1]; last != s.ca.Roots() {
				t.Error("the chain does not end with the roots")
			}
		})
	}
	_, err := client.CreateCertificate(s.as(s.token(callerA, "", time.Hour)), &ca.IstioCertificateRequest{Csr: "x"})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("broken request: %v, want InvalidArgument", err)
	}
}

func testCSR(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func TestProxyFollowsTheStoreAndResumes(t *testing.T) {
	s := newTestServer(t)
	s.apply(up(api.AddressType, "w1", "1"), up(api.AddressType, "w2", "1"))
	p := s.connect(callerA)
	p.subscribe(api.AddressType)
	p.want("w1", "w2")
	s.apply(up(api.AddressType, "w1", "2"), up(api.AddressType, "w2", "1"))
	p.want("w1")
	s.until("acknowledged", func() bool { return s.server.Proxies()[0].Synced })
	got := s.server.Proxies()[0]
	if got.Node == "" || got.OnNode != "node-a" || got.Types[0].Acked != s.store.Seq() {
		t.Errorf("status %+v", got)
	}
	if err := p.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.stream.Recv(); err != io.EOF {
		t.Fatalf("after half-close: %v, want EOF", err)
	}
	s.until("forgotten", func() bool { return len(s.server.Proxies()) == 0 })

	s.apply(up(api.AddressType, "w3", "1"))
	again := s.connect(callerA)
	again.known = maps.Clone(p.known)
	again.subscribe(api.AddressType)
	again.want("w3")
}

func TestNackIsShown(t *testing.T) {
	s := newTestServer(t)
	s.apply(up(api.AddressType, "bad", "1"))
	p := s.connect(callerA)
	p.subscribe(api.AddressType)
	r := p.recv()
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce, ErrorDetail: &discovery.Status{Message: "bad: why"}})
	s.until("shown", func() bool {
		pr := s.server.Proxies()
		return len(pr) == 1 && pr[0].Types[0].LastNack == "bad: why" && pr[0].NackTime != nil
	})
}

func TestAProxyThatNeverAnswersDelaysNobody(t *testing.T) {
	s := newTestServer(t)
	slow, quick := s.connect(callerB), s.connect(callerA)
	for _, p := range []*testProxy{slow, quick} {
		p.subscribe(api.AddressType)
	}
	first := slow.recv()
	quick.want()
	for i := range 3 { // the rest of the slow one's window
		s.apply(up(api.AddressType, "w", fmt.Sprint("a", i)))
		quick.want("w")
		slow.recv()
	}
	for i := range 50 {
		s.apply(up(api.AddressType, "w", fmt.Sprint("b", i)))
		quick.want("w")
	}
	slow.send(&discovery.DeltaDiscoveryRequest{TypeUrl: first.TypeUrl, ResponseNonce: first.Nonce})
	last := slow.recv()
	if got, want := last.Resources[0].Version, quick.known["w"]; got != want {
		t.Errorf("after it answered it got version %s, want the latest, %s, and nothing between", got, want)
	}
}

func TestAProxyMustBeWhereItsTokenIs(t *testing.T) {
	for key, value := range map[string]string{"NODE_NAME": "node-b", "NAMESPACE": "kube-system"} {
		t.Run(key, func(t *testing.T) {
			s := newTestServer(t)
			m, err := structpb.NewStruct(map[string]any{key: value})
			if err != nil {
				t.Fatal(err)
			}
			p := s.connect(callerA)
			p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: api.AddressType, Node: &discovery.Node{Id: "x", Metadata: m}})
			p.wantEnd(codes.PermissionDenied, "token of its own")
		})
	}
}

func TestStreamsPerCallerAreBounded(t *testing.T) {
	s := newTestServer(t)
	for range streamsPerCaller {
		p := s.connect(callerA)
		p.subscribe(api.AddressType)
		p.want()
	}
	s.connect(callerA).wantEnd(codes.ResourceExhausted, "streams open already")
	p := s.connect(callerB) // others are not concerned
	p.subscribe(api.AddressType)
	p.want()
}

func TestBadRequestEndsTheStream(t *testing.T) {
	s := newTestServer(t)
	p := s.connect(callerA)
	p.send(&discovery.DeltaDiscoveryRequest{})
	p.wantEnd(codes.InvalidArgument, "no type_url")
}

func TestShutdownTellsProxiesToReconnect(t *testing.T) {
	s := newTestServer(t)
	p := s.connect(callerA)
	p.subscribe(api.AddressType)
	p.want()
	s.server.Shutdown(s.ctx)
	p.wantEnd(codes.Unavailable, "shutting down")
}

func TestGarbageOnThePort(t *testing.T) {
	s := newTestServer(t)
	for _, b := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x00\x05hello", strings.Repeat("\x00", 4096)} {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte(b)); err != nil {
			t.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Now().Add(deadline)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("the connection with %.10q stays open", b)
		}
		c.Close()
	}
	p := s.connect(callerA)
	p.subscribe(api.AddressType)
	p.want()
}

func TestALargeFirstResponseIsWhole(t *testing.T) {
	s := newTestServer(t)
	ups := make([]delta.Upsert, 2*largeResponse)
	for i := range ups {
		ups[i] = up(api.AddressType, fmt.Sprint(i), strings.Repeat("x", 500))
	}
	s.apply(ups...)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(s.dial()).DeltaAggregatedResources(
		s.as(s.token(callerA, "", time.Hour)), grpc.MaxCallRecvMsgSize(200<<20))
	if err != nil {
		t.Fatal(err)
	}
	p := &testProxy{t, stream, nil}
	p.subscribe(api.AddressType)
	if got := len(p.recv().Resources); got != len(ups) {
		t.Errorf("the first response has %d resources of %d: a proxy would be ready too early", got, len(ups))
	}
}
