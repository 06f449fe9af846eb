package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// The file names of an Istio `cacerts` secret, which the state directory
// shares.
const (
	certFile  = "ca-cert.pem"
	keyFile   = "ca-key.pem"
	chainFile = "cert-chain.pem"
	// RootFile is the public root bundle, which proxies read as XDS_ROOT_CA
	// and CA_ROOT_CA.
	RootFile = "root-cert.pem"
)

// rootLifetime is Istio's: long, because nothing rotates it by itself yet.
const rootLifetime = 10 * 365 * 24 * time.Hour

// issuer is what signs leaves: a root, or an intermediate and the chain to it.
type issuer struct {
	cert  *x509.Certificate
	key   crypto.Signer
	chain []*x509.Certificate // intermediates from cert upward, without roots; empty when cert is a root
	roots []*x509.Certificate
}

// newRoot makes a self-signed P-256 root.
func newRoot(trustDomain string, now time.Time) (*issuer, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{trustDomain}, CommonName: "Ambit root"},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(rootLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign root: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign root: %w", err)
	}
	return &issuer{cert: cert, key: key, roots: []*x509.Certificate{cert}}, nil
}

// newSerial returns 127 random bits: unique without a counter on disk, and
// positive in at most 20 octets (RFC 5280 §4.1.2.2).
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("choose a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

// save writes the key first: a certificate without its key would be taken for
// a broken directory, a key without certificate is overwritten.
func (i *issuer) save(dir string) error {
	key, err := encodeKey(i.key)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, keyFile), key, 0o600); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, chainFile), encodeCerts(i.cert), 0o644); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, RootFile), encodeCerts(i.roots...), 0o644); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, certFile), encodeCerts(i.cert), 0o644)
}

// loadIssuer reads and checks the four files of a directory. Every problem
// names the file and what to do. fs.ErrNotExist is reported for a missing
// ca-cert.pem.
func loadIssuer(dir string, readKey func(path string) ([]byte, error), now time.Time) (*issuer, error) {
	certs, err := readCerts(dir, certFile)
	if err != nil {
		return nil, err
	}
	i := &issuer{cert: certs[0]}
	keyPath := filepath.Join(dir, keyFile)
	data, err := readKey(keyPath)
	if err != nil {
		return nil, fmt.Errorf("CA key: %w", err)
	}
	if i.key, err = parseKey(data); err != nil {
		return nil, fmt.Errorf("CA key %s %w", keyPath, err)
	}
	if i.roots, err = readCerts(dir, RootFile); err != nil {
		return nil, err
	}
	chain, err := readCerts(dir, chainFile)
	switch {
	case errors.Is(err, fs.ErrNotExist): // a root that signs leaves itself
	case err != nil:
		return nil, err
	}
	i.chain = i.intermediates(append(certs, chain...))
	return i, i.check(dir, now)
}

func readCerts(dir, name string) ([]*x509.Certificate, error) {
	path := filepath.Join(dir, name)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	certs, err := parseCerts(data)
	if err != nil {
		return nil, fmt.Errorf("CA certificate %s %w", path, err)
	}
	return certs, nil
}

// intermediates keeps what a peer needs between leaf and root: the issuer
// unless it is a root itself, then the rest of the chain, each once. People
// put the leaf CA first, last, or the root in as well.
func (i *issuer) intermediates(certs []*x509.Certificate) []*x509.Certificate {
	var chain []*x509.Certificate
	for _, c := range certs {
		if contains(i.roots, c) || contains(chain, c) {
			continue
		}
		chain = append(chain, c)
	}
	return chain
}

func contains(certs []*x509.Certificate, c *x509.Certificate) bool {
	for _, o := range certs {
		if o.Equal(c) {
			return true
		}
	}
	return false
}

func (i *issuer) check(dir string, now time.Time) error {
	path := filepath.Join(dir, certFile)
	type equaler interface{ Equal(crypto.PublicKey) bool }
	pub, ok := i.key.Public().(equaler)
	switch {
	case !i.cert.IsCA || !i.cert.BasicConstraintsValid:
		return fmt.Errorf("CA certificate %s is not a CA (basicConstraints CA:FALSE): give the certificate that may sign others", path)
	case i.cert.KeyUsage != 0 && i.cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("CA certificate %s may not sign certificates: its keyUsage lacks keyCertSign", path)
	case !ok || !pub.Equal(i.cert.PublicKey):
		return fmt.Errorf("CA key %s does not belong to %s: give the key that the certificate was made with", filepath.Join(dir, keyFile), certFile)
	case now.After(i.cert.NotAfter):
		return fmt.Errorf("CA certificate %s expired at %s: renew it", path, i.cert.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(i.cert.NotBefore):
		return fmt.Errorf("CA certificate %s is not valid before %s: check this machine's clock", path, i.cert.NotBefore.UTC().Format(time.RFC3339))
	}
	opts := x509.VerifyOptions{
		Roots: pool(i.roots), Intermediates: pool(i.chain), CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	if _, err := i.cert.Verify(opts); err != nil {
		return fmt.Errorf("CA certificate %s does not lead to a root of %s: %w (put every intermediate into %s)", path, RootFile, err, chainFile)
	}
	return nil
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

// notAfter is the end of the weakest link of the issuer's own chain: a leaf
// must not outlive it, or peers would see a valid leaf under an expired CA.
func (i *issuer) notAfter() time.Time {
	end := i.cert.NotAfter
	for _, c := range i.chain {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	// The chain that verified at start may lead to any of several roots; the
	// longest-lived decides.
	var root time.Time
	for _, c := range i.roots {
		if c.NotAfter.After(root) {
			root = c.NotAfter
		}
	}
	if root.Before(end) {
		end = root
	}
	return end
}
