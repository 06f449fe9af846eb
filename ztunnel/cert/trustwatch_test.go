package cert

import (
	"context"
	"crypto/x509"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/api/trust"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// fakeTrust pushes what the test gives it.
type fakeTrust struct {
	bundles chan *trust.Bundle
	errs    chan error
	opened  atomic.Int64
}

func newFakeTrust() *fakeTrust {
	return &fakeTrust{bundles: make(chan *trust.Bundle), errs: make(chan error)}
}

func (f *fakeTrust) WatchTrust(ctx context.Context, got func(*trust.Bundle)) error {
	f.opened.Add(1)
	for {
		select {
		case b := <-f.bundles:
			got(b)
		case err := <-f.errs:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func bundle(generation uint64, signs *meshca.CA, others ...*meshca.CA) *trust.Bundle {
	b := &trust.Bundle{TrustDomain: "cluster.local", Generation: generation, Issuer: signs.Cert.SubjectKeyId, Roots: string(signs.RootPEM())}
	for _, o := range others {
		b.Roots += string(o.RootPEM())
	}
	return b
}

// follow runs FollowTrust beside the manager.
func following(t *testing.T, f func(t *testing.T, m *Manager, ca *fakeCA, w *fakeTrust)) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		w := newFakeTrust()
		ctx, stop := context.WithCancel(context.Background())
		donec := make(chan error)
		go func() { donec <- m.FollowTrust(ctx, w) }()
		f(t, m, ca, w)
		stop()
		<-donec
	})
}

func (m *Manager) rootsAre(t *testing.T, when string, want ...*meshca.CA) {
	t.Helper()
	synctest.Wait()
	got := m.trust.Roots("cluster.local")
	if len(got) != len(want) {
		t.Fatalf("%s: %d roots, want %d", when, len(got), len(want))
	}
	for _, w := range want {
		if !containsCert(got, w.Root()) {
			t.Errorf("%s: a root is missing", when)
		}
	}
}

func containsCert(certs []*x509.Certificate, c *x509.Certificate) bool {
	for _, o := range certs {
		if o.Equal(c) {
			return true
		}
	}
	return false
}

// TestPushedTrust: what is pushed counts at once; certificates of the CA before
// are replaced over the spread, not together and not twice.
func TestPushedTrust(t *testing.T) {
	following(t, func(t *testing.T, m *Manager, ca *fakeCA, w *fakeTrust) {
		old, next := ca.ca, meshca.New(t, "cluster.local")
		m.Retain([]identity.ID{id("a"), id("b"), id("c")})
		synctest.Wait()
		w.bundles <- bundle(1, old)
		m.rootsAre(t, "first", old)
		w.bundles <- bundle(2, old, next)
		m.rootsAre(t, "added", old, next)
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := ca.requests(); n != 3 {
			t.Errorf("%d requests: an added root is no reason to replace certificates", n)
		}
		ca.mu.Lock()
		ca.ca = next // and answers with its own root only, as a replica that is ahead
		ca.mu.Unlock()
		w.bundles <- bundle(3, next, old)
		synctest.Wait()
		if n := ca.requests(); n == 6 {
			t.Error("all certificates were replaced at once")
		}
		time.Sleep(m.cfg.ReplaceSpread)
		synctest.Wait()
		if n := ca.requests(); n != 6 {
			t.Errorf("%d requests, want one more for each certificate", n)
		}
		m.rootsAre(t, "promoted: a certificate's own roots do not replace what is pushed", old, next)
		w.bundles <- bundle(3, next, old) // the stream to another replica says the same
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := ca.requests(); n != 6 {
			t.Errorf("%d requests after the same bundle", n)
		}
		w.bundles <- bundle(4, next)
		m.rootsAre(t, "retired", next)
	})
}

func TestOlderBundleWaits(t *testing.T) {
	following(t, func(t *testing.T, m *Manager, ca *fakeCA, w *fakeTrust) {
		old, next := ca.ca, meshca.New(t, "cluster.local")
		w.bundles <- bundle(5, old, next)
		w.bundles <- bundle(4, old) // a replica that has not read its files yet
		time.Sleep(staleAfter / 2)
		m.rootsAre(t, "a moment later", old, next)
		w.bundles <- bundle(5, old, next)
		time.Sleep(2 * staleAfter)
		m.rootsAre(t, "once it has", old, next)
		w.bundles <- bundle(3, old) // the state was restored from a copy
		time.Sleep(2 * staleAfter)
		m.rootsAre(t, "when it stays so", old)
	})
}

func TestBadBundleIsLeftAlone(t *testing.T) {
	following(t, func(t *testing.T, m *Manager, ca *fakeCA, w *fakeTrust) {
		w.bundles <- bundle(1, ca.ca)
		w.bundles <- &trust.Bundle{TrustDomain: "cluster.local", Generation: 2, Roots: "nothing"}
		w.bundles <- &trust.Bundle{TrustDomain: "cluster.local", Generation: 3, Roots: string(ca.ca.RootPEM()), Revoked: "nothing"}
		m.rootsAre(t, "after bad bundles", ca.ca)
	})
}

// TestRevocationsOfTwoSources: a list that is pushed and one from a file stand
// beside each other, and each goes by itself.
func TestRevocationsOfTwoSources(t *testing.T) {
	following(t, func(t *testing.T, m *Manager, ca *fakeCA, w *fakeTrust) {
		x, y := ca.ca.Leaf(t, id("x")), ca.ca.Leaf(t, id("y"))
		judge := func(c string, leaf *x509.Certificate, want bool) {
			t.Helper()
			synctest.Wait()
			if got := m.trust.find([]*x509.Certificate{leaf}, id(c)) != nil; got != want {
				t.Errorf("%s revoked: %v, want %v", c, got, want)
			}
		}
		b := bundle(1, ca.ca)
		b.Revoked = string(crlPEM(ca.ca.CRL(t, x.Leaf)))
		w.bundles <- b
		if err := m.setCRL(ca.ca.CRL(t, y.Leaf), "file"); err != nil {
			t.Fatal(err)
		}
		judge("x", x.Leaf, true)
		judge("y", y.Leaf, true)
		w.bundles <- bundle(2, ca.ca)
		judge("x", x.Leaf, false)
		judge("y", y.Leaf, true)
	})
}

// TestControlPlaneWithoutPush: it is asked now and then, and roots come with
// certificates as the certificate API has it.
func TestControlPlaneWithoutPush(t *testing.T) {
	following(t, func(t *testing.T, m *Manager, ca *fakeCA, w *fakeTrust) {
		go func() {
			for range 6 {
				w.errs <- status.Error(codes.Unimplemented, "unknown service")
			}
		}()
		m.Retain([]identity.ID{id("a")})
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := w.opened.Load(); n < 4 || n > 13 {
			t.Errorf("asked %d times in an hour", n)
		}
		m.rootsAre(t, "by the certificate", ca.ca)
		next := meshca.New(t, "cluster.local")
		ca.mu.Lock()
		ca.ca = next
		ca.mu.Unlock()
		time.Sleep(12 * time.Hour)
		m.rootsAre(t, "by the renewal", next)
	})
}

// TestRestartOfThePushDoesNotHammer: a control plane that is away is asked with
// a growing pause.
func TestRestartOfThePushDoesNotHammer(t *testing.T) {
	following(t, func(t *testing.T, m *Manager, ca *fakeCA, w *fakeTrust) {
		stop := make(chan struct{})
		go func() {
			for {
				select {
				case w.errs <- status.Error(codes.Unavailable, "away"):
				case <-stop:
					return
				}
			}
		}()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := w.opened.Load(); n < 60 || n > 260 {
			t.Errorf("asked %d times in an hour, want about one in 30 s", n)
		}
		close(stop)
	})
}

// TestRootFileReplacesCertificates: under a control plane that does not push,
// a change of CA_ROOT_CA makes the node fetch certificates, and so roots, early.
func TestRootFileReplacesCertificates(t *testing.T) {
	path := t.TempDir() + "/root-cert.pem"
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		write(t, path, ca.ca.RootPEM(), 1)
		ctx, stop := context.WithCancel(context.Background())
		donec := make(chan error)
		go func() { donec <- m.FollowRootFile(ctx, path) }()
		m.Retain([]identity.ID{id("a"), id("b")})
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := ca.requests(); n != 2 {
			t.Fatalf("%d requests", n)
		}
		next := meshca.New(t, "cluster.local")
		ca.mu.Lock()
		ca.ca = next
		ca.mu.Unlock()
		write(t, path, next.RootPEM(), 2)
		time.Sleep(m.cfg.ReplaceSpread + 3*pollInterval)
		m.rootsAre(t, "after the file changed", next)
		if n := ca.requests(); n != 4 {
			t.Errorf("%d requests, want one more for each certificate", n)
		}
		stop()
		<-donec
	})
}
