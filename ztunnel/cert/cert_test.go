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
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

func id(sa string) identity.ID {
	return identity.MustParse("spiffe://cluster.local/ns/default/sa/" + sa)
}

// fakeCA signs what it is asked, unless told otherwise, and remembers the order.
type fakeCA struct {
	t  testing.TB
	ca *meshca.CA

	mu    sync.Mutex
	asked []string
	err   error
	bend  func(*ecdsa.PublicKey, identity.ID) []string
	gate  chan struct{}
	busy  int
	most  int
	life  time.Duration
}

func (f *fakeCA) Sign(ctx context.Context, id identity.ID, csrPEM string, _ time.Duration) ([]string, error) {
	f.mu.Lock()
	f.asked = append(f.asked, id.ServiceAccount())
	f.busy++
	f.most = max(f.most, f.busy)
	err, bend, gate, ca, life := f.err, f.bend, f.gate, f.ca, f.life
	f.mu.Unlock()
	defer func() { f.mu.Lock(); f.busy--; f.mu.Unlock() }()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err != nil {
		return nil, err
	}
	b, _ := pem.Decode([]byte(csrPEM))
	csr, perr := x509.ParseCertificateRequest(b.Bytes)
	if perr != nil {
		return nil, perr
	}
	if len(csr.URIs) != 1 || csr.URIs[0].String() != id.String() || len(csr.Subject.Names) != 0 || !csr.Extensions[0].Critical {
		return nil, fmt.Errorf("CSR is not as the API asks: %v %v", csr.URIs, csr.Subject)
	}
	pub := csr.PublicKey.(*ecdsa.PublicKey)
	if bend != nil {
		return bend(pub, id), nil
	}
	return ca.ChainPEM(ca.Sign(f.t, pub, id, meshca.Lifetime(life))), nil
}

func (f *fakeCA) requests() int { f.mu.Lock(); defer f.mu.Unlock(); return len(f.asked) }

// run gives f a manager in a bubble of fake time.
func run(t *testing.T, f func(t *testing.T, m *Manager, ca *fakeCA)) {
	synctest.Test(t, func(t *testing.T) {
		ca := &fakeCA{t: t, ca: meshca.New(t, "cluster.local"), life: 24 * time.Hour}
		m := New(Config{Authority: ca})
		ctx, stop := context.WithCancel(context.Background())
		donec := make(chan error)
		go func() { donec <- m.Run(ctx) }()
		f(t, m, ca)
		stop()
		<-donec
	})
}

// TestIssuedBetweenLookAndWait: Get finds nothing, the certificate comes, and
// only then Get begins to wait. It must not wait for the renewal.
func TestIssuedBetweenLookAndWait(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, _ *fakeCA) {
		want, err := m.Get(t.Context(), id("a"))
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		got, err := m.wait(t.Context(), id("a")) // what Get does after its look
		if waited := time.Since(begun); err != nil || got != want || waited != 0 {
			t.Errorf("waited %v for a certificate that was there: %v", waited, err)
		}
	})
}

func TestIssueRenewForget(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		m.Retain([]identity.ID{id("a")})
		c, err := m.Get(t.Context(), id("a"))
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, err := m.Get(t.Context(), id("a")); err != nil || ca.requests() != 1 {
			t.Fatalf("second use: %v, %d requests", err, ca.requests())
		}
		time.Sleep(9 * time.Hour)
		synctest.Wait()
		if ca.requests() != 1 {
			t.Error("renewed before 40 % of the lifetime")
		}
		time.Sleep(3*time.Hour + time.Minute)
		synctest.Wait()
		renewed, err := m.Get(t.Context(), id("a"))
		if err != nil || renewed == c || renewed.TLS.PrivateKey.(*ecdsa.PrivateKey).Equal(c.TLS.PrivateKey) {
			t.Errorf("at half-life: %v, want another certificate with another key", err)
		}
		m.Retain(nil)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if n := len(m.Status()); n != 0 {
			t.Errorf("%d identities kept after the grace", n)
		}
	})
}

func TestFailureBacksOffAndKeepsAValidCertificate(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		ca.err = errors.New("CA is away")
		_, err := m.Get(t.Context(), id("a"))
		if u, ok := errors.AsType[*UnavailableError](err); !ok || u.Since.IsZero() || !strings.Contains(err.Error(), "CA is away") {
			t.Fatalf("error %v does not say since when and why", err)
		}
		m.Retain([]identity.ID{id("a")})
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := ca.requests(); n < 20 || n > 45 {
			t.Errorf("%d attempts in an hour, want about one in 150 s", n)
		}
		ca.mu.Lock()
		ca.err = nil
		ca.mu.Unlock()
		m.Nudge()
		if _, err := m.Get(t.Context(), id("a")); err != nil {
			t.Fatalf("after the CA came back: %v", err)
		}
		ca.mu.Lock()
		ca.err = errors.New("away again")
		ca.mu.Unlock()
		time.Sleep(20 * time.Hour)
		if _, err := m.Get(t.Context(), id("a")); err != nil {
			t.Errorf("a valid certificate was given up: %v", err)
		}
		time.Sleep(5 * time.Hour)
		if _, err := m.Get(t.Context(), id("a")); err == nil {
			t.Error("an expired certificate was handed out")
		}
	})
}

func TestWaitingConnectionsComeFirstAndEightAtOnce(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		ca.gate = make(chan struct{})
		var ids []identity.ID
		for i := range 30 {
			ids = append(ids, id(fmt.Sprintf("warm-%d", i)))
		}
		m.Retain(ids)
		synctest.Wait()
		gotc := make(chan error)
		go func() { _, err := m.Get(context.Background(), id("waiting")); gotc <- err }()
		synctest.Wait()
		ca.gate <- struct{}{}
		synctest.Wait()
		if last := ca.asked[len(ca.asked)-1]; last != "waiting" {
			t.Errorf("the freed slot went to %s", last)
		}
		close(ca.gate)
		if err := <-gotc; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if ca.most != 8 {
			t.Errorf("%d requests at once, want 8", ca.most)
		}
	})
}

func TestCallerWaitsNoLongerThanItsContext(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		ca.gate = make(chan struct{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := m.Get(ctx, id("a")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		close(ca.gate)
	})
}

func TestAnswersThatAreNotOurs(t *testing.T) {
	other := meshca.New(t, "cluster.local")
	key := meshca.New(t, "x").Key
	for _, c := range []struct {
		name, why string
		bend      func(ca *meshca.CA, pub *ecdsa.PublicKey, asked identity.ID) []string
	}{
		{"another identity", "not asked for", func(ca *meshca.CA, pub *ecdsa.PublicKey, _ identity.ID) []string {
			return ca.ChainPEM(ca.Sign(t, pub, id("admin")))
		}},
		{"another key", "another key", func(ca *meshca.CA, _ *ecdsa.PublicKey, i identity.ID) []string {
			return ca.ChainPEM(ca.Sign(t, &key.PublicKey, i))
		}},
		{"no root", "leaf and its roots", func(ca *meshca.CA, pub *ecdsa.PublicKey, i identity.ID) []string {
			return ca.ChainPEM(ca.Sign(t, pub, i))[:1]
		}},
		{"another root", "does not chain", func(ca *meshca.CA, pub *ecdsa.PublicKey, i identity.ID) []string {
			return []string{ca.ChainPEM(ca.Sign(t, pub, i))[0], string(other.RootPEM())}
		}},
		{"garbage", "no PEM certificate", func(*meshca.CA, *ecdsa.PublicKey, identity.ID) []string { return []string{"x", "y"} }},
		{"nothing", "0 certificates", func(*meshca.CA, *ecdsa.PublicKey, identity.ID) []string { return nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
				ca.bend = func(pub *ecdsa.PublicKey, i identity.ID) []string { return c.bend(ca.ca, pub, i) }
				if _, err := m.Get(t.Context(), id("a")); err == nil || !strings.Contains(err.Error(), c.why) {
					t.Errorf("got %v, want %q", err, c.why)
				}
			})
		})
	}
}

// TestNewRootsCountAtOnce: a root learnt with one identity's certificate is
// trusted by connections of all others, and answers may arrive out of order.
func TestNewRootsCountAtOnce(t *testing.T) {
	old, next := meshca.New(t, "cluster.local"), meshca.New(t, "cluster.local")
	trust := NewTrust()
	changes, removals := 0, 0
	trust.OnChange(func(removed bool) {
		changes++
		if removed {
			removals++
		}
	})
	leaf := func(ca *meshca.CA) tls.ConnectionState {
		return tls.ConnectionState{PeerCertificates: []*x509.Certificate{ca.Leaf(t, id("p")).Leaf}}
	}
	judge := func(ca *meshca.CA) error {
		_, err := trust.Verify(leaf(ca), x509.ExtKeyUsageServerAuth, time.Now(), oneOf([]identity.ID{id("p")}))
		return err
	}
	set := func(seq uint64, cas ...*meshca.CA) {
		var roots []*x509.Certificate
		for _, c := range cas {
			roots = append(roots, c.Root())
		}
		if err := trust.Set("cluster.local", roots, seq); err != nil {
			t.Fatal(err)
		}
	}
	set(1, old)
	if judge(old) != nil || judge(next) == nil {
		t.Fatal("first root")
	}
	set(3, old, next)
	set(2, old) // the late answer to an earlier request
	if judge(old) != nil || judge(next) != nil {
		t.Error("during rotation both count")
	}
	set(4, next)
	set(5, next)
	if judge(old) == nil || judge(next) != nil || changes != 3 || removals != 1 {
		t.Errorf("after rotation only the new one counts (%d changes)", changes)
	}
}

func TestHandshake(t *testing.T) {
	ca := &fakeCA{t: t, ca: meshca.New(t, "cluster.local"), life: time.Hour}
	m := New(Config{Authority: ca})
	ctx, stop := context.WithCancel(t.Context())
	donec := make(chan error, 1)
	go func() { donec <- m.Run(ctx) }()
	defer func() { stop(); <-donec }()
	shake := func(client *tls.Config) (tls.ConnectionState, error) {
		cc, sc := net.Pipe()
		defer cc.Close()
		defer sc.Close()
		server := tls.Server(sc, m.ServerConfig(id("server")))
		errc := make(chan error, 1)
		go func() { errc <- server.HandshakeContext(t.Context()) }()
		c := tls.Client(cc, client)
		err := c.HandshakeContext(t.Context())
		if err != nil {
			_ = cc.Close()
		}
		return c.ConnectionState(), errors.Join(err, <-errc)
	}
	cs, err := shake(m.ClientConfig(id("client"), []identity.ID{id("server"), id("spare")}))
	if err != nil {
		t.Fatal(err)
	}
	if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "h2" || cs.DidResume || cs.ServerName != "" || cs.CurveID != tls.X25519MLKEM768 {
		t.Errorf("negotiated %+v", cs)
	}
	if _, err := shake(m.ClientConfig(id("client"), []identity.ID{id("impostor")})); err == nil || !strings.Contains(err.Error(), "expected spiffe://cluster.local/ns/default/sa/impostor") {
		t.Errorf("unexpected server identity: %v", err)
	}
	if a, b := m.ClientConfig(id("c"), []identity.ID{id("x"), id("y")}), m.ClientConfig(id("c"), []identity.ID{id("y"), id("x")}); a != b {
		t.Error("the order of expected peers made two configurations")
	}
	weak := m.ClientConfig(id("client"), []identity.ID{id("server")}).Clone()
	weak.MinVersion, weak.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if _, err := shake(weak); err == nil {
		t.Error("TLS 1.2 was accepted")
	}
}
