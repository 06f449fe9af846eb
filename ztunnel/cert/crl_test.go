package cert

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

func valueOf(m prometheus.Metric) float64 {
	var out dto.Metric
	if err := m.Write(&out); err != nil {
		return math.NaN()
	}
	return out.GetCounter().GetValue() + out.GetGauge().GetValue()
}

func crlPEM(ders ...[]byte) []byte {
	var b []byte
	for _, d := range ders {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: d})...)
	}
	return b
}

// oddCRL is a list with extensions that change its meaning.
func oddCRL(t testing.TB, ca *meshca.CA, change func(*x509.RevocationList)) []byte {
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(7), RevocationTime: time.Now()}}}
	change(l)
	der, err := x509.CreateRevocationList(rand.Reader, l, ca.Cert, ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestParseCRLs(t *testing.T) {
	root := meshca.New(t, "cluster.local")
	inter := root.Intermediate(t)
	a, b := root.CRL(t, inter.Cert), inter.CRL(t)
	for _, c := range []struct {
		name  string
		data  []byte
		lists int
		err   string
	}{
		{"PEM", crlPEM(a), 1, ""},
		{"two in PEM", crlPEM(a, b), 2, ""},
		{"PEM with text around", append([]byte("a list\n"), append(crlPEM(a), "\nend\n"...)...), 1, ""},
		{"DER", a, 1, ""},
		{"nothing", nil, 0, "parse revocation list"},
		{"garbage", []byte("garbage"), 0, "parse revocation list"},
		{"PEM without a block", []byte("-----BEGIN X509 CRL-----\n"), 0, "no revocation list"},
		{"a certificate", root.RootPEM(), 0, "unexpected PEM block"},
		{"a broken one behind a good one", crlPEM(a, b[:len(b)-9]), 0, "list 2"},
		{"delta", oddCRL(t, root, func(l *x509.RevocationList) {
			l.ExtraExtensions = []pkix.Extension{{Id: oidDeltaCRL, Critical: true, Value: []byte{2, 1, 1}}}
		}), 0, "is a delta"},
		{"indirect", oddCRL(t, root, func(l *x509.RevocationList) {
			l.RevokedCertificateEntries[0].ExtraExtensions = []pkix.Extension{{Id: oidCertificateIssuer, Critical: true, Value: []byte{0x30, 0}}}
		}), 0, "is indirect"},
	} {
		r, err := parseCRLs(c.data)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v, want %q", c.name, err, c.err)
			}
			continue
		}
		if err != nil || len(r.lists) != c.lists {
			t.Errorf("%s: %v, %v", c.name, r, err)
		}
	}
}

func FuzzParseCRLs(f *testing.F) {
	ca := meshca.New(f, "cluster.local")
	leaf := ca.Leaf(f, id("a")).Leaf
	f.Add(ca.CRL(f, leaf))
	f.Add(crlPEM(ca.CRL(f), ca.CRL(f, leaf)))
	f.Add([]byte("-----BEGIN X509 CRL-----"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseCRLs(data)
		if err != nil {
			return
		}
		r.find([]*x509.Certificate{leaf}, func() []*x509.Certificate { return []*x509.Certificate{ca.Root()} })
		r.expired(time.Now())
		_ = r.check([]*x509.Certificate{ca.Root()})
	})
}

func trusting(t *testing.T, cas ...*meshca.CA) *Trust {
	trust := NewTrust()
	var roots []*x509.Certificate
	for _, ca := range cas {
		roots = append(roots, ca.Root())
	}
	if err := trust.Set("cluster.local", roots, 1); err != nil {
		t.Fatal(err)
	}
	return trust
}

func stateWith(t *testing.T, c tls.Certificate) tls.ConnectionState {
	var cs tls.ConnectionState
	for _, der := range c.Certificate {
		x, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		cs.PeerCertificates = append(cs.PeerCertificates, x)
	}
	return cs
}

func TestWholeChainIsCheckedInBothDirections(t *testing.T) {
	root := meshca.New(t, "cluster.local")
	inter := root.Intermediate(t)
	twin := meshca.New(t, "cluster.local") // another key under the same name
	peer := inter.Leaf(t, id("p"))
	expired := oddCRL(t, inter, func(l *x509.RevocationList) {
		l.ThisUpdate, l.NextUpdate = time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour)
		l.RevokedCertificateEntries[0].SerialNumber = peer.Leaf.SerialNumber
	})
	for _, c := range []struct {
		name string
		crls []byte
		want string
	}{
		{"no list", nil, ""},
		{"lists that name others", crlPEM(root.CRL(t), inter.CRL(t, root.Cert)), ""},
		{"the leaf", crlPEM(inter.CRL(t, peer.Leaf)), "certificate " + peer.Leaf.SerialNumber.Text(16) + " of " + id("p").String() + " was revoked by CN=intermediate"},
		{"the intermediate", root.CRL(t, inter.Cert), "of CN=intermediate of cluster.local was revoked by CN=root"},
		{"the leaf, in an expired list", expired, "was revoked"},
		{"the intermediate, by another CA of the same name", twin.CRL(t, inter.Cert), ""},
		{"the leaf, by a CA that did not issue it", root.CRL(t, peer.Leaf), ""},
	} {
		trust := trusting(t, root, twin)
		if c.crls != nil {
			r, err := parseCRLs(c.crls)
			if err != nil {
				t.Fatal(c.name, err)
			}
			trust.revoked.Store(r)
		}
		for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
			_, err := trust.Verify(stateWith(t, peer), usage, time.Now(), oneOf([]identity.ID{id("p")}))
			switch {
			case c.want == "" && err != nil:
				t.Errorf("%s: %v", c.name, err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%s: %v, want %q", c.name, err, c.want)
			}
		}
	}
}

// TestRevocationCutsLiveTunnels: exactly those of the revoked certificate, once,
// with the reason; and no tunnel slips through between handshake and list.
func TestRevocationCutsLiveTunnels(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		if _, err := m.Get(t.Context(), id("self")); err != nil { // brings the roots
			t.Fatal(err)
		}
		bad, good, ended := ca.ca.Leaf(t, id("bad")), ca.ca.Leaf(t, id("good")), ca.ca.Leaf(t, id("bad"))
		cuts := map[string]error{}
		track := func(name string, side Side, c tls.Certificate) func() {
			cs := stateWith(t, c)
			return m.Track(side, &cs, func(err error) {
				if cuts[name] != nil {
					t.Errorf("%s was cut twice", name)
				}
				cuts[name] = err
			})
		}
		track("out", Source, bad)
		track("in", Destination, bad)
		doneGood := track("good", Destination, good)
		track("ended", Source, ended)()
		if err := m.setCRL(ca.ca.CRL(t, bad.Leaf, ended.Leaf), "test"); err != nil {
			t.Fatal(err)
		}
		track("late", Source, bad) // its handshake was judged by the lists before
		for _, name := range []string{"out", "in", "late"} {
			if r, ok := errors.AsType[*RevokedError](cuts[name]); !ok || r.Serial.Cmp(bad.Leaf.SerialNumber) != 0 {
				t.Errorf("%s: cut with %v", name, cuts[name])
			}
		}
		if len(cuts) != 3 {
			t.Errorf("cut: %v", cuts)
		}
		if err := m.setCRL(ca.ca.CRL(t, bad.Leaf), "again"); err != nil || len(cuts) != 3 {
			t.Errorf("again: %v, %v", err, cuts)
		}
		if s, d := valueOf(m.metrics.revoked.WithLabelValues("source")), valueOf(m.metrics.revoked.WithLabelValues("destination")); s != 2 || d != 1 {
			t.Errorf("counted %v and %v rejections", s, d)
		}
		doneGood()
		if n := len(m.live.tunnels); n != 0 {
			t.Errorf("%d tunnels are followed after their end", n)
		}
		m.Track(Source, &tls.ConnectionState{}, func(error) {})()
		if n := valueOf(m.metrics.untracked.WithLabelValues("source")); n != 1 {
			t.Errorf("%v untracked", n)
		}
	})
}

func TestOwnRevokedCertificateIsReplaced(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		m.Retain([]identity.ID{id("a"), id("b")})
		synctest.Wait()
		c, err := m.Get(t.Context(), id("a"))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.setCRL(ca.ca.CRL(t, c.Leaf), "test"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if now, err := m.Get(t.Context(), id("a")); err != nil || now == c || ca.requests() != 3 {
			t.Errorf("after its revocation: %v, %d requests", err, ca.requests())
		}
	})
}

// TestWithdrawnRoot: a root that goes while a peer's leaf under it lives takes
// the tunnel with it; one that goes later does not.
func TestWithdrawnRoot(t *testing.T) {
	run(t, func(t *testing.T, m *Manager, ca *fakeCA) {
		old, next := ca.ca, meshca.New(t, "cluster.local")
		ca.life = time.Hour
		m.Retain([]identity.ID{id("self")})
		synctest.Wait()
		cuts := map[string]error{}
		track := func(name string, c tls.Certificate) {
			cs := stateWith(t, c)
			m.Track(Source, &cs, func(err error) { cuts[name] = err })
		}
		track("ended", old.Leaf(t, id("x"), meshca.Lifetime(time.Minute)))
		track("old", old.Leaf(t, id("x")))
		track("next", next.Leaf(t, id("x")))
		if _, ok := errors.AsType[*DistrustedError](cuts["next"]); ok {
			t.Fatal("roots were judged anew though none was withdrawn")
		}
		time.Sleep(2 * time.Minute)
		ca.mu.Lock()
		ca.ca = next
		ca.mu.Unlock()
		m.mu.Lock()
		m.seq++
		seq := m.seq
		m.mu.Unlock()
		before := ca.requests()
		if err := m.trust.Set("cluster.local", []*x509.Certificate{next.Root()}, seq); err != nil {
			t.Fatal(err)
		}
		if _, ok := errors.AsType[*DistrustedError](cuts["old"]); !ok || len(cuts) != 1 {
			t.Errorf("cut: %v, want the one under the old root", cuts)
		}
		track("slipped through", old.Leaf(t, id("y")))
		if cuts["slipped through"] == nil {
			t.Error("a handshake under the old root that ended just after stays")
		}
		synctest.Wait()
		c, err := m.Get(t.Context(), id("self"))
		if err != nil || ca.requests() != before+1 || !c.stands(m.trust.pool("cluster.local"), time.Now()) {
			t.Errorf("our own certificate under the old root was not replaced at once: %v, %d requests", err, ca.requests()-before)
		}
	})
}

// TestCRLFile follows a file through what Kubernetes and people do to it.
func TestCRLFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "..data", "ca-crl.pem")
	var out logLines
	synctest.Test(t, func(t *testing.T) {
		root := meshca.New(t, "cluster.local")
		bad := root.Leaf(t, id("bad"))
		m := New(Config{Authority: &fakeCA{t: t, ca: root}, Logger: logTo(&out)})
		if err := m.trust.Set("cluster.local", []*x509.Certificate{root.Root()}, 1); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		donec := make(chan error)
		go func() { donec <- m.FollowCRL(ctx, path) }()
		version := 0
		// put replaces what a symbolic link above the file points to.
		put := func(data []byte) {
			t.Helper()
			version++
			next := filepath.Join(dir, fmt.Sprint("v", version))
			if err := errors.Join(os.Mkdir(next, 0o755), os.WriteFile(filepath.Join(next, "ca-crl.pem"), data, 0o644)); err != nil {
				t.Fatal(err)
			}
			stamp := time.Now().Add(time.Duration(version) * time.Hour)
			link := filepath.Join(dir, "..next")
			if err := errors.Join(os.Chtimes(filepath.Join(next, "ca-crl.pem"), stamp, stamp), os.Symlink(next, link), os.Rename(link, filepath.Join(dir, "..data"))); err != nil {
				t.Fatal(err)
			}
		}
		refused := func(want bool, when string) {
			t.Helper()
			time.Sleep(3 * pollInterval)
			synctest.Wait()
			_, err := m.trust.Verify(stateWith(t, bad), x509.ExtKeyUsageServerAuth, time.Now(), inDomains([]string{"cluster.local"}))
			if (err != nil) != want {
				t.Errorf("%s: %v", when, err)
			}
		}
		broken := func(want float64) {
			t.Helper()
			if got := valueOf(m.metrics.crlBroken); got != want {
				t.Errorf("ambit_ztunnel_crl_broken %v, want %v", got, want)
			}
		}
		refused(false, "no file")
		broken(0)
		put(crlPEM(root.CRL(t, bad.Leaf)))
		refused(true, "listed")
		put([]byte("half a fi"))
		refused(true, "a bad file: the last good list stays")
		broken(1)
		put(crlPEM(meshca.New(t, "cluster.local").CRL(t)))
		refused(true, "a list by an impostor: the last good one stays")
		broken(1)
		if err := os.Remove(filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		refused(true, "the file is gone: the last good list stays")
		put(root.CRL(t))
		refused(false, "an empty list takes everything back")
		broken(0)
		stop()
		<-donec
	})
	if n := out.count("revocation list not used"); n != 3 {
		t.Errorf("%d lines for 3 bad files", n)
	}
}

// write replaces a file; each version has a time of its own.
func write(t *testing.T, path string, data []byte, version int) {
	t.Helper()
	stamp := time.Unix(int64(1_000_000+version), 0)
	if err := errors.Join(os.WriteFile(path, data, 0o644), os.Chtimes(path, stamp, stamp)); err != nil {
		t.Fatal(err)
	}
}
