package cert

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/api/ca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// caServer is the certificate API over real TLS and gRPC.
type caServer struct {
	ca.UnimplementedIstioCertificateServiceServer
	t    *testing.T
	ca   *meshca.CA
	addr string

	mu   sync.Mutex
	err  error
	md   metadata.MD
	asks []*ca.IstioCertificateRequest
}

func newCAServer(t *testing.T, names ...string) *caServer {
	s := &caServer{t: t, ca: meshca.New(t, "cluster.local")}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	leaf := s.ca.Leaf(t, identity.ID{}, meshca.Names(names...))
	srv := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&leaf)))
	ca.RegisterIstioCertificateServiceServer(srv, s)
	donec := make(chan error, 1)
	go func() { donec <- srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-donec })
	s.addr = ln.Addr().String()
	return s
}

func (s *caServer) CreateCertificate(ctx context.Context, r *ca.IstioCertificateRequest) (*ca.IstioCertificateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.md, _ = metadata.FromIncomingContext(ctx)
	s.asks = append(s.asks, r)
	if s.err != nil {
		return nil, s.err
	}
	id, err := identity.Parse(r.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	b, _ := pem.Decode([]byte(r.GetCsr()))
	csr, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil || csr.CheckSignature() != nil {
		return nil, status.Error(codes.InvalidArgument, "CSR")
	}
	life := time.Duration(r.GetValidityDuration()) * time.Second
	return &ca.IstioCertificateResponse{CertChain: s.ca.ChainPEM(s.ca.Sign(s.t, csr.PublicKey.(*ecdsa.PublicKey), id, meshca.Lifetime(life)))}, nil
}

func (s *caServer) fail(err error) { s.mu.Lock(); defer s.mu.Unlock(); s.err = err }

func (s *caServer) client(cfg CAConfig) *Client {
	s.t.Helper()
	cfg.Target = s.addr
	if cfg.TLS == nil {
		cfg.TLS = func() (*tls.Config, error) {
			return &tls.Config{RootCAs: s.ca.Pool(), ServerName: "ca.test", MinVersion: tls.VersionTLS13}, nil
		}
	}
	if cfg.Token == nil {
		cfg.Token = func() (string, error) { return "node-token", nil }
	}
	c, err := NewClient(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() }) // only ever asked
	return c
}

func sign(t *testing.T, c *Client, sa string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	_, csr, err := request(id(sa))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Sign(ctx, id(sa), csr, time.Hour)
	return err
}

// TestManagerOverTheRealAPI: from Get to a certificate, over TLS and gRPC.
func TestManagerOverTheRealAPI(t *testing.T) {
	s := newCAServer(t, "ca.test")
	tokens := 0
	m := New(Config{TTL: 90 * time.Minute, Authority: s.client(CAConfig{ClusterID: "c1", Headers: map[string]string{"x-tenant": "t1"},
		Token: func() (string, error) { tokens++; return fmt.Sprintf("token-%d", tokens), nil }})})
	ctx, stop := context.WithCancel(t.Context())
	donec := make(chan error, 1)
	go func() { donec <- m.Run(ctx) }()
	defer func() { stop(); <-donec }()
	for i, sa := range []string{"a", "b"} {
		gctx, cancel := context.WithTimeout(ctx, 60*time.Second)
		c, err := m.Get(gctx, id(sa))
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := LeafIdentity(c.Leaf); err != nil || got != id(sa) {
			t.Errorf("certificate of %v, %v", got, err)
		}
		s.mu.Lock()
		if got := s.asks[i].GetValidityDuration(); got != 90*60 {
			t.Errorf("asked for %d s", got)
		}
		// The token is read at each request: it is rotated on disk.
		if got := s.md.Get("authorization"); len(got) != 1 || got[0] != fmt.Sprintf("Bearer token-%d", i+1) {
			t.Errorf("authorization %q", got)
		}
		if s.md.Get("clusterid")[0] != "c1" || s.md.Get("x-tenant")[0] != "t1" {
			t.Errorf("metadata %v", s.md)
		}
		s.mu.Unlock()
	}
}

func TestCAErrorsSayWhatToDoAndKeepTheToken(t *testing.T) {
	s := newCAServer(t, "ca.test")
	for _, c := range []struct {
		err  error
		want string
	}{
		{status.Error(codes.Unauthenticated, "token expired"), "valid token of this node's ztunnel"},
		{status.Error(codes.PermissionDenied, "no such pod here"), "pod with this service account on this node"},
		{status.Error(codes.Unavailable, "going away"), "is the control plane up"},
		{status.Error(codes.Internal, "disk full"), "disk full"},
	} {
		s.fail(c.err)
		err := sign(t, s.client(CAConfig{}), "a")
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), s.addr) {
			t.Errorf("error %v does not name %s and say %q", err, s.addr, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "node-token") {
			t.Errorf("error carries the token: %v", err)
		}
	}
	missing := errors.New("token file is not there")
	if err := sign(t, s.client(CAConfig{Token: func() (string, error) { return "", missing }}), "a"); !errors.Is(err, missing) {
		t.Errorf("without a token: %v", err)
	}
}

// TestCAServerMustProveItself: no CSR and no token goes to a server that the
// roots do not vouch for, or that has another name.
func TestCAServerMustProveItself(t *testing.T) {
	s := newCAServer(t, "ca.test")
	stranger := meshca.New(t, "cluster.local")
	for name, cfg := range map[string]*tls.Config{
		"another root": {RootCAs: stranger.Pool(), ServerName: "ca.test"},
		"another name": {RootCAs: s.ca.Pool(), ServerName: "istiod.test"},
	} {
		err := sign(t, s.client(CAConfig{TLS: func() (*tls.Config, error) { return cfg, nil }}), "a")
		if err == nil || !strings.Contains(err.Error(), "CA_ROOT_CA") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s.mu.Lock(); len(s.asks) != 0 {
		t.Errorf("%d requests reached it", len(s.asks))
	}
	s.mu.Unlock()
}

// TestRootsAreReadForEachConnection: a root file that comes late, or rotates,
// counts without a restart.
func TestRootsAreReadForEachConnection(t *testing.T) {
	s := newCAServer(t, "ca.test")
	var mu sync.Mutex
	var roots *x509.CertPool
	c := s.client(CAConfig{TLS: func() (*tls.Config, error) {
		mu.Lock()
		defer mu.Unlock()
		if roots == nil {
			return nil, errors.New("root file is not there yet")
		}
		return &tls.Config{RootCAs: roots, ServerName: "ca.test"}, nil
	}})
	if err := sign(t, c, "a"); err == nil || !strings.Contains(err.Error(), "root file is not there yet") {
		t.Fatalf("without roots: %v", err)
	}
	mu.Lock()
	roots = s.ca.Pool()
	mu.Unlock()
	c.conn.ResetConnectBackoff()
	for deadline := time.Now().Add(10 * time.Second); ; {
		err := sign(t, c, "a")
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// A proxy of one workload has that workload's token: it stands in for nobody,
// and says so by leaving the metadata out.
func TestDirectRequestsImpersonateNobody(t *testing.T) {
	s := newCAServer(t, "ca.test")
	_ = sign(t, s.client(CAConfig{Direct: true}), "a") // this server knows impersonation only, and refuses
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.asks) != 1 || s.asks[0].GetMetadata() != nil || s.asks[0].GetCsr() == "" {
		t.Errorf("asked %v", s.asks)
	}
}
