package app

import (
	"crypto/tls"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	trustapi "github.com/ambit-mesh/ambit/xds/api/trust"
	"github.com/ambit-mesh/ambit/xds/ca"
)

// TestStatusWarnsOfTheCA: what is in the last quarter of its life is told, and is
// a reason for the exit status.
func TestStatusWarnsOfTheCA(t *testing.T) {
	dir := t.TempDir()
	const life = 10 * 365 * 24 * time.Hour
	for _, tt := range []struct {
		age     time.Duration
		healthy bool
	}{{0, true}, {life*3/4 - time.Hour, true}, {life*3/4 + time.Hour, false}} {
		sub := dir + "/" + tt.age.String()
		if _, err := ca.Open(ca.Config{TrustDomain: "cluster.local", StateDir: sub, Now: func() time.Time { return time.Now().Add(-tt.age) }}); err != nil {
			t.Fatal(err)
		}
		a, err := ca.Open(ca.Config{TrustDomain: "cluster.local", StateDir: sub})
		if err != nil {
			t.Fatal(err)
		}
		s := Status{CA: a.Info()}
		var out strings.Builder
		if err := s.WriteText(&out, time.Now()); err != nil {
			t.Fatal(err)
		}
		if s.Healthy() != tt.healthy || strings.Contains(out.String(), "expires at") == tt.healthy {
			t.Errorf("age %v: healthy %v\n%s", tt.age, s.Healthy(), out.String())
		}
	}
}

// TestAliasesReachProxies: the mesh configuration's aliases are announced as
// they change.
func TestAliasesReachProxies(t *testing.T) {
	a := newTestAmbitd(t)
	a.write("pods.yaml", pod("p1", "a", "node-a", "10.0.0.1"))
	a.start()
	a.until("the source is read", func() bool { return a.status().Changes > 0 })
	b := a.bundle()
	if m, err := b.Recv(); err != nil || len(m.GetAliases()) > 0 {
		t.Fatalf("before there are any: %v, %v", m, err)
	}
	a.write("mesh.yaml", `
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: ambit-system}
data:
  mesh: |
    trustDomainAliases: [old.example]
`)
	a.until("the alias is pushed", func() bool {
		m, err := b.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return m.GetTrustDomain() == "cluster.local" && len(m.GetAliases()) == 1 && m.GetAliases()[0] == "old.example"
	})
	if s := a.status(); s.Followers != 1 {
		t.Errorf("%d followers", s.Followers)
	}
}

// bundle follows the trust bundle as a node proxy does.
func (a *testAmbitd) bundle() grpc.ServerStreamingClient[trustapi.Bundle] {
	a.t.Helper()
	tokens, err := ca.OpenTokens(a.state, nil, nil)
	if err != nil {
		a.t.Fatal(err)
	}
	authority, err := ca.Open(ca.Config{TrustDomain: "cluster.local", StateDir: a.state})
	if err != nil {
		a.t.Fatal(err)
	}
	token, err := tokens.Mint(ca.Caller{Namespace: "ambit-system", ServiceAccount: "ztunnel"}, "", time.Hour)
	if err != nil {
		a.t.Fatal(err)
	}
	conn, err := grpc.NewClient(*a.xds.Load(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: authority.RootPool(), ServerName: "localhost"})))
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { _ = conn.Close() })
	ctx := metadata.AppendToOutgoingContext(a.ctx, "authorization", "Bearer "+token)
	s, err := trustapi.NewTrustServiceClient(conn).Watch(ctx, &trustapi.WatchRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	return s
}
