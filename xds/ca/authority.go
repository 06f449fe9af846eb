package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
)

const (
	// MaxTTL is the longest life of a workload's certificate, and what a
	// request that names none gets.
	MaxTTL = 24 * time.Hour
	// minTTL keeps a mistaken unit (hours sent as seconds) from making
	// certificates that expire while they travel.
	minTTL = time.Minute
	// clockSkew is how far behind a peer's clock may be.
	clockSkew = 2 * time.Minute
	// maxCSR bounds what the parser sees. A P-256 request has some 500 bytes.
	maxCSR = 16 << 10
)

// Config tells where an Authority's keys are. The zero values of Now and
// MaxTTL mean time.Now and MaxTTL.
type Config struct {
	// TrustDomain names a self-signed root. Which trust domain a leaf may be of
	// is decided by NodeRule, with the mesh configuration of the moment.
	TrustDomain string
	// StateDir keeps the self-signed root, made when absent, and the public
	// root bundle. It is not used by OpenWith keys in PluggedDir, except for
	// the bundle.
	StateDir string
	// PluggedDir, when set, holds ca-cert.pem, ca-key.pem, cert-chain.pem and
	// root-cert.pem of an existing CA.
	PluggedDir string
	MaxTTL     time.Duration
	Now        func() time.Time
}

// Authority signs certificates. What it signs with is replaced as a whole when
// the files change (see Run); each request uses one state from end to end.
type Authority struct {
	cfg   Config
	state atomic.Pointer[state]

	mu      sync.Mutex
	changec chan struct{} // closed at the next change; guarded by mu
	problem error         // why the files are not in force as they are; guarded by mu
}

// state is what the files said when they were last good. Immutable.
type state struct {
	issuer     *issuer
	roots      string // PEM bundle, the last element of every chain
	revoked    []byte // PEM revocation lists
	generation uint64
	files      string // stamps of the files it was read from
}

func (a *Authority) inForce() *state { return a.state.Load() }

// Open loads the CA, or makes a self-signed one on first use.
func Open(c Config) (*Authority, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.MaxTTL <= 0 || c.MaxTTL > MaxTTL {
		c.MaxTTL = MaxTTL
	}
	if _, err := identity.New(c.TrustDomain, "ns", "sa"); err != nil {
		return nil, fmt.Errorf("trust domain %q is not valid: %w", c.TrustDomain, err)
	}
	if err := makeStateDir(c.StateDir); err != nil {
		return nil, err
	}
	unlock, err := lockDir(c.StateDir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	files := c.stamps()
	iss, err := c.open(nil)
	if err != nil {
		return nil, err
	}
	a := &Authority{cfg: c, changec: make(chan struct{})}
	st, err := c.complete(iss, files)
	if err != nil {
		return nil, err
	}
	a.state.Store(st)
	return a, nil
}

// open loads what signs. A key that is missing is taken from before, if that
// had the same certificate: a running CA outlives the loss of its key file.
func (c Config) open(before *issuer) (*issuer, error) {
	if c.PluggedDir != "" {
		iss, err := loadIssuer(c.PluggedDir, os.ReadFile, nil, c.Now()) // a mounted Secret is readable by default
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w (--ca-dir needs %s, %s, %s and %s)", err, certFile, keyFile, chainFile, RootFile)
		}
		return iss, err
	}
	iss, err := loadIssuer(c.StateDir, readKey, before, c.Now())
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return iss, err
	}
	if _, exists := os.Stat(filepath.Join(c.StateDir, certFile)); exists == nil || before != nil {
		return nil, fmt.Errorf("%w (`ambitd ca restore` puts a saved key back; without one, `ambitd ca rotate` and `ambitd ca promote` begin another root, or remove %s)",
			err, filepath.Join(c.StateDir, certFile))
	}
	if iss, err = newRoot(c.TrustDomain, c.Now()); err != nil {
		return nil, err
	}
	return iss, iss.save(c.StateDir)
}

// Roots is the PEM bundle that peers verify against.
func (a *Authority) Roots() string { return a.inForce().roots }

// RootPool is Roots as a pool; the caller owns it.
func (a *Authority) RootPool() *x509.CertPool { return pool(a.inForce().issuer.roots) }

// Sign answers a PEM certificate request with a chain for id: the leaf, each
// intermediate, and last the root bundle. Only the request's key counts; it
// must be P-256 and the request signed with it. A ttl of 0 asks for the
// longest life. Errors are *InvalidError, or this CA's own trouble.
func (a *Authority) Sign(csrPEM []byte, id identity.ID, ttl time.Duration) ([]string, error) {
	pub, err := parseCSR(csrPEM)
	if err != nil {
		return nil, err
	}
	if id.IsZero() {
		return nil, &InvalidError{"no identity to sign for"}
	}
	st := a.inForce()
	cert, err := a.sign(st.issuer, pub, ttl, func(c *x509.Certificate) error {
		ext, err := uriSAN(id)
		c.ExtraExtensions = append(c.ExtraExtensions, ext)
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		return err
	})
	if err != nil {
		return nil, err
	}
	chain := []string{string(encodeCerts(cert))}
	for _, c := range st.issuer.chain {
		chain = append(chain, string(encodeCerts(c)))
	}
	return append(chain, st.roots), nil
}

// sign makes a leaf from the template that shape completes.
func (a *Authority) sign(by *issuer, pub *ecdsa.PublicKey, ttl time.Duration, shape func(*x509.Certificate) error) (*x509.Certificate, error) {
	now := a.cfg.Now()
	end := now.Add(a.lifetime(ttl))
	if last := by.notAfter(); end.After(last) {
		end = last
	}
	if !end.After(now) {
		return nil, fmt.Errorf("the CA certificate expired at %s: renew it", by.notAfter().UTC().Format(time.RFC3339))
	}
	begin := now.Add(-clockSkew)
	if begin.Before(by.cert.NotBefore) {
		begin = by.cert.NotBefore
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, NotBefore: begin, NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	if err := shape(tmpl); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.cert, pub, by.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return cert, nil
}

func (a *Authority) lifetime(ttl time.Duration) time.Duration {
	if ttl <= 0 || ttl > a.cfg.MaxTTL {
		return a.cfg.MaxTTL
	}
	return max(ttl, minTTL)
}

// parseCSR checks a request and returns its key.
func parseCSR(csrPEM []byte) (*ecdsa.PublicKey, error) {
	if len(csrPEM) > maxCSR {
		return nil, &InvalidError{fmt.Sprintf("certificate request has %d bytes, at most %d are read", len(csrPEM), maxCSR)}
	}
	block, rest := pem.Decode(csrPEM)
	if block == nil || block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" {
		return nil, &InvalidError{"certificate request is not a PEM block of type CERTIFICATE REQUEST"}
	}
	if len(strings.TrimSpace(string(rest))) > 0 {
		return nil, &InvalidError{"certificate request is followed by other data: send one PEM block"}
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, &InvalidError{"certificate request cannot be parsed: " + err.Error()}
	}
	pub, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, &InvalidError{fmt.Sprintf("certificate request has a %s key: use ECDSA P-256", keyName(csr))}
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, &InvalidError{"certificate request is not signed by its own key: " + err.Error()}
	}
	return pub, nil
}

func keyName(csr *x509.CertificateRequest) string {
	if pub, ok := csr.PublicKey.(*ecdsa.PublicKey); ok {
		return "ECDSA " + pub.Curve.Params().Name
	}
	return csr.PublicKeyAlgorithm.String()
}

// uriSAN is the subjectAltName with the one URI. It is critical because the
// subject is empty (RFC 5280 §4.2.1.6), which crypto/x509 does by itself only
// for names it encodes; done here it does not depend on that.
func uriSAN(id identity.ID) (ext pkix.Extension, err error) {
	const tagURI = 6 // GeneralName [6] uniformResourceIdentifier
	value, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: tagURI, Bytes: []byte(id.String())}})
	if err != nil {
		return ext, fmt.Errorf("encode subjectAltName: %w", err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: value}, nil
}

// ServerCertificate makes a certificate for ambitd's own TLS port, valid for
// these DNS names and IP addresses.
func (a *Authority) ServerCertificate(names []string) (*tls.Certificate, error) {
	return a.serverCertificate(a.inForce().issuer, names)
}

func (a *Authority) serverCertificate(by *issuer, names []string) (*tls.Certificate, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	cert, err := a.sign(by, &key.PublicKey, a.cfg.MaxTTL, func(c *x509.Certificate) error {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		for _, n := range slices.Compact(slices.Sorted(slices.Values(names))) {
			if ip := net.ParseIP(n); ip != nil {
				c.IPAddresses = append(c.IPAddresses, ip)
			} else {
				c.DNSNames = append(c.DNSNames, n)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("server certificate: %w", err)
	}
	out := &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
	for _, c := range by.chain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out, nil
}
