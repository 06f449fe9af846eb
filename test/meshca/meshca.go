// Package meshca is a real certificate authority for the tests of other
// packages: roots, intermediates and leaves for identities, good and bad ones.
//
//	ca := meshca.New(t, "cluster.local")
//	cert := ca.Leaf(t, identity.MustParse("spiffe://cluster.local/ns/a/sa/b"))
//	late := ca.Leaf(t, id, meshca.Expired())
//
// Nothing touches the disk and keys are P-256, so that a leaf costs some 50 µs.
// A CA may be used by several goroutines. For tests of the certificate API use
// xds/ca itself.
package meshca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// CA signs leaves for one trust domain.
type CA struct {
	// immutable after New
	TrustDomain string
	Cert        *x509.Certificate
	Key         *ecdsa.PrivateKey
	root        *x509.Certificate
	chain       []*x509.Certificate // Cert and its issuers below the root; empty for a root
}

// New makes a self-signed root.
func New(tb testing.TB, trustDomain string) *CA {
	tb.Helper()
	c := &CA{TrustDomain: trustDomain, Key: newKey(tb)}
	tmpl := c.caTemplate(tb, "root of "+trustDomain)
	c.Cert = sign(tb, tmpl, tmpl, &c.Key.PublicKey, c.Key)
	c.root = c.Cert
	return c
}

// Intermediate makes a CA below this one; its leaves carry it in their chain.
func (c *CA) Intermediate(tb testing.TB) *CA {
	tb.Helper()
	i := &CA{TrustDomain: c.TrustDomain, Key: newKey(tb), root: c.root}
	i.Cert = sign(tb, i.caTemplate(tb, "intermediate of "+c.TrustDomain), c.Cert, &i.Key.PublicKey, c.Key)
	i.chain = append([]*x509.Certificate{i.Cert}, c.chain...)
	return i
}

func (c *CA) caTemplate(tb testing.TB, name string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial(tb), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(365 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true,
	}
}

// Root is the certificate that peers trust.
func (c *CA) Root() *x509.Certificate { return c.root }

// RootPEM is Root as PEM.
func (c *CA) RootPEM() []byte { return EncodePEM(c.root) }

// Pool trusts Root; the caller owns it.
func (c *CA) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c.root)
	return p
}

// Option bends a leaf.
type Option func(*x509.Certificate)

// Expired makes a leaf whose life ended a minute ago.
func Expired() Option {
	return func(t *x509.Certificate) {
		t.NotBefore, t.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute)
	}
}

// NotYetValid makes a leaf whose life begins in an hour.
func NotYetValid() Option {
	return func(t *x509.Certificate) {
		t.NotBefore, t.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
	}
}

// Lifetime makes a leaf that begins now and lives for d.
func Lifetime(d time.Duration) Option {
	return func(t *x509.Certificate) { t.NotBefore, t.NotAfter = time.Now(), time.Now().Add(d) }
}

// URIs replaces the URI names: several, none, or not SPIFFE IDs.
func URIs(uris ...string) Option {
	return func(t *x509.Certificate) {
		t.URIs = nil
		for _, u := range uris {
			parsed, err := url.Parse(u)
			if err != nil {
				panic("BUG: " + err.Error())
			}
			t.URIs = append(t.URIs, parsed)
		}
	}
}

// Names adds DNS names and IP addresses, for servers that are known by them.
func Names(names ...string) Option {
	return func(t *x509.Certificate) {
		for _, n := range names {
			if ip := net.ParseIP(n); ip != nil {
				t.IPAddresses = append(t.IPAddresses, ip)
			} else {
				t.DNSNames = append(t.DNSNames, n)
			}
		}
	}
}

// Usages replaces the extended key usages.
func Usages(u ...x509.ExtKeyUsage) Option {
	return func(t *x509.Certificate) { t.ExtKeyUsage = u }
}

// Leaf makes a key and its certificate for id, valid for a day unless an
// option says otherwise. The zero ID makes a leaf without URI. The trust
// domain of id is not checked: signing for a foreign one is a case to test.
func (c *CA) Leaf(tb testing.TB, id identity.ID, opts ...Option) tls.Certificate {
	tb.Helper()
	key := newKey(tb)
	leaf := c.Sign(tb, &key.PublicKey, id, opts...)
	out := tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	for _, i := range c.chain {
		out.Certificate = append(out.Certificate, i.Raw)
	}
	return out
}

// Sign certifies a key that the caller holds.
func (c *CA) Sign(tb testing.TB, pub *ecdsa.PublicKey, id identity.ID, opts ...Option) *x509.Certificate {
	tb.Helper()
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serial(tb), NotBefore: now.Add(-2 * time.Minute), NotAfter: now.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if !id.IsZero() {
		tmpl.URIs = []*url.URL{id.URL()}
	}
	for _, o := range opts {
		o(tmpl)
	}
	return sign(tb, tmpl, c.Cert, pub, c.Key)
}

// ChainPEM is a leaf in the form of the certificate API's cert_chain: leaf,
// each intermediate, and last the root.
func (c *CA) ChainPEM(leaf *x509.Certificate) []string {
	out := []string{string(EncodePEM(leaf))}
	for _, i := range c.chain {
		out = append(out, string(EncodePEM(i)))
	}
	return append(out, string(c.RootPEM()))
}

// CRL is this CA's revocation list, in DER.
func (c *CA) CRL(tb testing.TB, revoked ...*x509.Certificate) []byte {
	tb.Helper()
	now := time.Now()
	list := &x509.RevocationList{Number: serial(tb), ThisUpdate: now.Add(-time.Minute), NextUpdate: now.Add(24 * time.Hour)}
	for _, r := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: r.SerialNumber, RevocationTime: now.Add(-time.Minute)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, c.Cert, c.Key)
	if err != nil {
		tb.Fatalf("sign revocation list: %v", err)
	}
	return der
}

// EncodePEM writes certificates one after the other.
func EncodePEM(certs ...*x509.Certificate) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}

// KeyPEM writes a private key as PKCS#8.
func KeyPEM(tb testing.TB, key any) []byte {
	tb.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatalf("encode key: %v", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatalf("generate key: %v", err)
	}
	return key
}

func serial(tb testing.TB) *big.Int {
	tb.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		tb.Fatalf("choose serial: %v", err)
	}
	return n.Add(n, big.NewInt(1))
}

func sign(tb testing.TB, tmpl, parent *x509.Certificate, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		tb.Fatalf("sign certificate: %v", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatalf("parse own certificate: %v", err)
	}
	return cert
}
