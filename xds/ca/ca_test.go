package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ambit-mesh/ambit/xds/identity"
)

const domain = "cluster.local"

var bookinfo = identity.MustParse("spiffe://cluster.local/ns/default/sa/bookinfo")

func testAuthority(t testing.TB) *Authority {
	t.Helper()
	a, err := Open(Config{TrustDomain: domain, StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func testKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func testCSR(t testing.TB, key crypto.Signer, uris ...string) []byte {
	t.Helper()
	tmpl := &x509.CertificateRequest{}
	for _, u := range uris {
		parsed, err := url.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = append(tmpl.URIs, parsed)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func testLeaf(t testing.TB, chain []string) *x509.Certificate {
	t.Helper()
	certs, err := parseCerts([]byte(chain[0]))
	if err != nil || len(certs) != 1 {
		t.Fatalf("first element of the chain: %d certificates, %v", len(certs), err)
	}
	return certs[0]
}

func TestSignMakesAnSVID(t *testing.T) {
	a := testAuthority(t)
	key := testKey(t)
	chain, err := a.Sign(testCSR(t, key, "spiffe://evil/ns/kube-system/sa/root"), bookinfo, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 2 || chain[1] != a.Roots() {
		t.Fatalf("chain of %d, want leaf and root bundle", len(chain))
	}
	leaf := testLeaf(t, chain)
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != bookinfo.String() {
		t.Errorf("URIs %v, want only %s: the request's own names must not count", leaf.URIs, bookinfo)
	}
	if !leaf.PublicKey.(*ecdsa.PublicKey).Equal(key.Public()) {
		t.Error("the leaf has another key than the request")
	}
	if len(leaf.Subject.Names) != 0 || leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("subject %q, CA %v, key usage %v", leaf.Subject, leaf.IsCA, leaf.KeyUsage)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: a.RootPool(), KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Errorf("verify for usage %v: %v", usage, err)
		}
	}
	san := asn1.ObjectIdentifier{2, 5, 29, 17}
	for _, e := range leaf.Extensions {
		if e.Id.Equal(san) && !e.Critical {
			t.Error("subjectAltName is not critical, though the subject is empty")
		}
	}
	again, err := a.Sign(testCSR(t, key), bookinfo, 0)
	if err != nil {
		t.Fatal(err)
	}
	if testLeaf(t, again).SerialNumber.Cmp(leaf.SerialNumber) == 0 {
		t.Error("two leaves with one serial number")
	}
}

func TestLeafLifetime(t *testing.T) {
	tests := []struct {
		name       string
		asked      time.Duration
		issuerLife time.Duration
		want       time.Duration
	}{
		{"none asked", 0, rootLifetime, MaxTTL},
		{"negative", -time.Hour, rootLifetime, MaxTTL},
		{"an hour", time.Hour, rootLifetime, time.Hour},
		{"a year", 365 * 24 * time.Hour, rootLifetime, MaxTTL},
		{"a second", time.Second, rootLifetime, minTTL},
		{"beyond the issuer", 0, 3 * time.Hour, 3 * time.Hour},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
			dir := t.TempDir()
			a, err := Open(Config{TrustDomain: domain, StateDir: dir, Now: func() time.Time { return now }})
			if err != nil {
				t.Fatal(err)
			}
			// As if time had passed until only issuerLife is left.
			now = a.inForce().issuer.cert.NotAfter.Add(-tt.issuerLife)
			if tt.issuerLife == rootLifetime {
				now = a.inForce().issuer.cert.NotBefore.Add(clockSkew)
			}
			chain, err := a.Sign(testCSR(t, testKey(t)), bookinfo, tt.asked)
			if err != nil {
				t.Fatal(err)
			}
			leaf := testLeaf(t, chain)
			if got := leaf.NotAfter.Sub(now); got != tt.want {
				t.Errorf("valid for %v, want %v", got, tt.want)
			}
			if got := now.Sub(leaf.NotBefore); got != clockSkew {
				t.Errorf("backdated by %v, want %v", got, clockSkew)
			}
		})
	}
}

func TestAnExpiredIssuerSignsNothing(t *testing.T) {
	now := time.Now()
	a, err := Open(Config{TrustDomain: domain, StateDir: t.TempDir(), Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(rootLifetime + time.Hour)
	if _, err := a.Sign(testCSR(t, testKey(t)), bookinfo, 0); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Fatalf("got %v, want an error that says the CA expired", err)
	}
}

func TestRequestsThatAreRefused(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := testCSR(t, testKey(t))
	block, _ := pem.Decode(good)
	forged := append([]byte(nil), block.Bytes...)
	forged[len(forged)-1] ^= 1 // the signature is last
	tests := []struct {
		name string
		csr  []byte
		want string
	}{
		{"empty", nil, "PEM block"},
		{"not PEM", []byte("hello"), "PEM block"},
		{"a certificate", encodeCerts(testAuthority(t).inForce().issuer.cert), "PEM block"},
		{"garbage inside", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte{1, 2, 3}}), "parsed"},
		{"two blocks", append(append([]byte(nil), good...), good...), "one PEM block"},
		{"too long", make([]byte, maxCSR+1), "at most"},
		{"RSA", testCSR(t, rsaKey), "RSA key: use ECDSA P-256"},
		{"P-384", testCSR(t, p384), "P-384 key: use ECDSA P-256"},
		{"Ed25519", testCSR(t, ed), "Ed25519 key: use ECDSA P-256"},
		{"signature of another key", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: forged}), "signed by its own key"},
	}
	a := testAuthority(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := a.Sign(tt.csr, bookinfo, 0)
			if _, ok := errors.AsType[*InvalidError](err); !ok || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want an *InvalidError with %q", err, tt.want)
			}
		})
	}
	if _, err := a.Sign(good, identity.ID{}, 0); err == nil {
		t.Error("signed for no identity")
	}
}

func TestRootIsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	open := func() *Authority {
		a, err := Open(Config{TrustDomain: domain, StateDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a, b := open(), open()
	if a.Roots() != b.Roots() {
		t.Error("a second start made another root")
	}
	onDisk, err := os.ReadFile(filepath.Join(dir, RootFile))
	if err != nil || string(onDisk) != a.Roots() {
		t.Errorf("%s differs from the root in use (%v)", RootFile, err)
	}
	info, err := os.Stat(filepath.Join(dir, keyFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: mode %v, %v", info.Mode(), err)
	}
	if left := time.Until(a.inForce().issuer.cert.NotAfter); left < 9*365*24*time.Hour {
		t.Errorf("root lives for %v", left)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 4 {
		t.Errorf("%d files in the state directory (%v), want 4: nothing unfinished may stay", len(entries), err)
	}
}

// Two ambitd start over one empty directory: they must end up with one root, and
// its key, and agree on tokens.
func TestStartsAtOnceAgreeOnTheKeys(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	const n = 8
	authorities, tokens := make([]*Authority, n), make([]*Tokens, n)
	var g errgroup.Group
	for i := range n {
		g.Go(func() (err error) {
			if authorities[i], err = Open(Config{TrustDomain: domain, StateDir: dir}); err == nil {
				tokens[i], err = OpenTokens(dir, nil, nil)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	token, err := tokens[0].Mint(Caller{Namespace: "n", ServiceAccount: "s"}, "", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if authorities[i].Roots() != authorities[0].Roots() {
			t.Fatalf("start %d has another root", i)
		}
		if _, err := tokens[i].Review(t.Context(), token); err != nil {
			t.Fatalf("start %d does not take the token: %v", i, err)
		}
	}
	if _, err := Open(Config{TrustDomain: domain, StateDir: dir}); err != nil {
		t.Errorf("what they left: %v", err)
	}
}

func TestKeysThatEveryoneCanReadAreRefused(t *testing.T) {
	dir := t.TempDir()
	open := func() error {
		_, err := Open(Config{TrustDomain: domain, StateDir: dir})
		if err == nil {
			_, err = OpenTokens(dir, nil, nil)
		}
		return err
	}
	if err := open(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{keyFile, tokenKeyFile} {
		path := filepath.Join(dir, name)
		for mode, want := range map[os.FileMode]bool{0o604: false, 0o660: true, 0o600: true} {
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			err := open()
			if (err == nil) != want || err != nil && !strings.Contains(err.Error(), "chmod 600") {
				t.Errorf("%s with mode %o: %v", name, mode, err)
			}
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// pluggedIn writes a root, an intermediate and its key as a `cacerts` secret.
func pluggedIn(t *testing.T, now time.Time, shape func(c *x509.Certificate)) (dir string, inter *issuer) {
	t.Helper()
	root, err := newRoot("corp.example", now)
	if err != nil {
		t.Fatal(err)
	}
	key := testKey(t)
	serial, err := newSerial()
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "Intermediate"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	if shape != nil {
		shape(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, root.cert, key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	keyPEM, err := encodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, certFile, encodeCerts(cert))
	write(t, dir, keyFile, keyPEM)
	write(t, dir, chainFile, encodeCerts(cert, root.cert)) // people put the root in as well
	write(t, dir, RootFile, encodeCerts(root.cert))
	return dir, &issuer{cert: cert, key: key, roots: root.roots}
}

func write(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestPluggedInIntermediate(t *testing.T) {
	dir, inter := pluggedIn(t, time.Now(), nil)
	state := t.TempDir()
	a, err := Open(Config{TrustDomain: domain, StateDir: state, PluggedDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.Sign(testCSR(t, testKey(t)), bookinfo, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 3 || chain[1] != string(encodeCerts(inter.cert)) || chain[2] != string(encodeCerts(inter.roots...)) {
		t.Fatalf("chain of %d, want leaf, intermediate, root", len(chain))
	}
	opts := x509.VerifyOptions{Roots: pool(inter.roots), Intermediates: pool([]*x509.Certificate{inter.cert}), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if _, err := testLeaf(t, chain).Verify(opts); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(state, keyFile)); err == nil {
		t.Error("a root of its own was made beside the plugged-in one")
	}
	if got, err := os.ReadFile(filepath.Join(state, RootFile)); err != nil || string(got) != a.Roots() {
		t.Errorf("the bundle in the state directory is not the plugged-in root (%v)", err)
	}
	cert, err := a.ServerCertificate([]string{"localhost", "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	opts.DNSName, opts.KeyUsages = "localhost", nil
	if _, err := cert.Leaf.Verify(opts); err != nil || len(cert.Certificate) != 2 {
		t.Errorf("server certificate: %v, chain of %d", err, len(cert.Certificate))
	}
}

func TestPluggedInMistakesAreNamed(t *testing.T) {
	now := time.Now()
	otherRoot, err := newRoot("other.example", now)
	if err != nil {
		t.Fatal(err)
	}
	otherKey, err := encodeKey(testKey(t))
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		shape func(*x509.Certificate)
		spoil func(t *testing.T, dir string)
		want  string
	}{
		{"no directory", nil, func(t *testing.T, dir string) { os.RemoveAll(dir) }, "--ca-dir needs"},
		{"no key", nil, func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, keyFile)) }, "--ca-dir needs"},
		{"key of another certificate", nil, func(t *testing.T, dir string) { write(t, dir, keyFile, otherKey) }, "does not belong to"},
		{"encrypted key", nil, func(t *testing.T, dir string) {
			write(t, dir, keyFile, pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{1}}))
		}, "is encrypted"},
		{"certificate for key", nil, func(t *testing.T, dir string) { write(t, dir, keyFile, encodeCerts(otherRoot.cert)) }, "no PEM private key"},
		{"garbage", nil, func(t *testing.T, dir string) { write(t, dir, certFile, []byte("x")) }, "no PEM certificate"},
		{"another root", nil, func(t *testing.T, dir string) { write(t, dir, RootFile, encodeCerts(otherRoot.cert)) }, "does not lead to a root"},
		{"expired", func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }, nil, "expired at"},
		{"not yet valid", func(c *x509.Certificate) { c.NotBefore = now.Add(time.Hour) }, nil, "not valid before"},
		{"not a CA", func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature }, nil, "is not a CA"},
		{"may not sign", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, nil, "keyCertSign"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir, _ := pluggedIn(t, now, tt.shape)
			if tt.spoil != nil {
				tt.spoil(t, dir)
			}
			_, err := Open(Config{TrustDomain: domain, StateDir: t.TempDir(), PluggedDir: dir})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestAHalfLostStateIsNotReplaced(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(Config{TrustDomain: domain, StateDir: dir}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, keyFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{TrustDomain: domain, StateDir: dir}); err == nil || !strings.Contains(err.Error(), "ambitd ca restore") {
		t.Fatalf("got %v: a lost key must not make a mesh's root change silently", err)
	}
}

func TestServerCertificateIsRenewedInTime(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		a, err := Open(Config{TrustDomain: domain, StateDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		s, err := a.ServerTLS([]string{"localhost", "::1"})
		if err != nil {
			t.Fatal(err)
		}
		get := func() *x509.Certificate {
			c, err := s.Config().GetCertificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			return c.Leaf
		}
		first := get()
		time.Sleep(11 * time.Hour)
		if get() != first {
			t.Error("renewed in the first half of its life")
		}
		time.Sleep(2 * time.Hour)
		second := get()
		if second == first || !second.NotAfter.After(first.NotAfter) {
			t.Error("not renewed in the second half of its life")
		}
		if err := second.VerifyHostname("::1"); err != nil {
			t.Error(err)
		}
	})
}

// placement maps node → identities.
type placement map[string][]identity.ID

func (p placement) RunsOn(node string, id identity.ID) bool {
	for _, i := range p[node] {
		if i == id {
			return true
		}
	}
	return false
}

type pods map[string][2]string

func (p pods) Pod(ns, name string) (uid, node string, ok bool) {
	v, ok := p[ns+"/"+name]
	return v[0], v[1], ok
}

func TestNodeRule(t *testing.T) {
	onA := identity.MustParse("spiffe://cluster.local/ns/default/sa/a")
	onB := identity.MustParse("spiffe://cluster.local/ns/default/sa/b")
	rule := &NodeRule{
		TrustDomain: domain, Accounts: DefaultNodeAccounts,
		Placement: placement{"node-a": {onA}, "node-b": {onB}},
		Pods: pods{
			"ambit-system/zt-a": {"uid-a", "node-a"}, "ambit-system/zt-b": {"uid-now", "node-b"},
			"istio-system/z": {"u", "node-a"}, "default/p": {"u", "node-a"}, "default/ztunnel": {"u", "node-a"},
			"ambit-system/p": {"u", "node-a"},
		},
	}
	ztA := Caller{"ambit-system", "ztunnel", "zt-a", "uid-a", "node-a"}
	tests := []struct {
		name        string
		caller      Caller
		impersonate string
		want        string // identity, or a part of the refusal
	}{
		{"a pod of its node", ztA, onA.String(), onA.String()},
		{"a pod of another node", ztA, onB.String(), "no running pod with service account default/b is on node node-a"},
		{"Istio's ztunnel", Caller{"istio-system", "ztunnel", "z", "u", "node-a"}, onA.String(), onA.String()},
		{"its own identity", ztA, "", "spiffe://cluster.local/ns/ambit-system/sa/ztunnel"},
		{"an ordinary pod, itself", Caller{Namespace: "default", ServiceAccount: "b"}, "", onB.String()},
		{"an ordinary pod, another", Caller{"default", "b", "p", "u", "node-a"}, onA.String(), "not a trusted node account"},
		{"the same name in another namespace", Caller{"default", "ztunnel", "p", "u", "node-a"}, onA.String(), "not a trusted node account"},
		{"token without node", Caller{"ambit-system", "ztunnel", "p", "u", ""}, onA.String(), "not bound"},
		{"token without pod", Caller{"ambit-system", "ztunnel", "", "", "node-a"}, onA.String(), "not bound"},
		{"token without uid", Caller{"ambit-system", "ztunnel", "p", "", "node-a"}, onA.String(), "now has uid u"},
		{"foreign trust domain", ztA, "spiffe://other/ns/default/sa/a", "trust domain of this mesh"},
		{"not an identity", ztA, "https://example.com", "ImpersonatedIdentity"},
		{"pod that exists", Caller{"ambit-system", "ztunnel", "zt-b", "uid-now", "node-b"}, onB.String(), onB.String()},
		{"token of the pod before", Caller{"ambit-system", "ztunnel", "zt-b", "uid-old", "node-b"}, onB.String(), "was replaced"},
		{"token of the pod before, for itself", Caller{"ambit-system", "ztunnel", "zt-b", "uid-old", "node-b"}, "", "was replaced"},
		{"pod that is gone", Caller{"ambit-system", "ztunnel", "zt-gone", "u", "node-a"}, onA.String(), "zt-gone, which does not run"},
		{"pod that is gone, for itself", Caller{"default", "b", "gone", "u", "node-b"}, "", "which does not run"},
		{"token of another node", Caller{"ambit-system", "ztunnel", "zt-b", "uid-now", "node-a"}, onA.String(), "runs on node node-b"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id, err := rule.Identity(tt.caller, tt.impersonate)
			if strings.HasPrefix(tt.want, "spiffe://") {
				if err != nil || id.String() != tt.want {
					t.Fatalf("got %q, %v, want %q", id, err, tt.want)
				}
				return
			}
			if err == nil || !id.IsZero() || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %q, %v, want a refusal with %q", id, err, tt.want)
			}
		})
	}
}

func FuzzCSR(f *testing.F) {
	f.Add(testCSR(f, testKey(f), "spiffe://a/ns/b/sa/c"))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		pub, err := parseCSR(data)
		if err == nil && pub.Curve != elliptic.P256() {
			t.Fatalf("accepted curve %s", pub.Curve.Params().Name)
		}
		if err != nil {
			if _, ok := errors.AsType[*InvalidError](err); !ok {
				t.Fatalf("%T: %v", err, err)
			}
		}
	})
}

func BenchmarkSign(b *testing.B) {
	a := testAuthority(b)
	csr := testCSR(b, testKey(b))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.Sign(csr, bookinfo, 0); err != nil {
			b.Fatal(err)
		}
	}
}
