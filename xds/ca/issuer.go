package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
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

// rootLifetime is Istio's: long, because a root is rotated by command.
const rootLifetime = 10 * 365 * 24 * time.Hour

// issuer is what signs leaves: a root, or an intermediate and the chain to it.
type issuer struct {
	cert  *x509.Certificate
	key   crypto.Signer
	chain []*x509.Certificate // intermediates from cert upward, without roots; empty when cert is a root
	roots []*x509.Certificate
	// keyLost says that the key is only in memory any more.
	keyLost error
}

// newRoot makes a self-signed P-256 root.
func newRoot(trustDomain string, now time.Time) (*issuer, error) {
	return newRootNamed(trustDomain, "Ambit root", now)
}

func newRootNamed(trustDomain, name string, now time.Time) (*issuer, error) {
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
		Subject:               pkix.Name{Organization: []string{trustDomain}, CommonName: name},
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
func loadIssuer(dir string, readKey func(path string) ([]byte, error), before *issuer, now time.Time) (*issuer, error) {
	certs, err := readCerts(dir, certFile)
	if err != nil {
		return nil, err
	}
	i := &issuer{cert: certs[0]}
	if i.key, err = loadKey(dir, i.cert, readKey); err != nil {
		if before == nil || !errors.Is(err, fs.ErrNotExist) || !before.cert.Equal(i.cert) {
			return nil, err
		}
		i.key, i.keyLost = before.key, err
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

// loadKey finds a certificate's key: ca-key.pem, or the file that a rotation
// named after the key. So the one certificate file says which key signs, and to
// change it is one step.
func loadKey(dir string, cert *x509.Certificate, readKey func(path string) ([]byte, error)) (crypto.Signer, error) {
	var wrong error
	for _, path := range []string{filepath.Join(dir, keyFile), filepath.Join(dir, keyFileOf(cert))} {
		data, err := readKey(path)
		if err != nil {
			if wrong == nil || !errors.Is(err, fs.ErrNotExist) {
				wrong = fmt.Errorf("CA key: %w", err)
			}
			continue
		}
		key, err := parseKey(data)
		if err != nil {
			return nil, fmt.Errorf("CA key %s %w", path, err)
		}
		if belongs(key, cert) {
			return key, nil
		}
		wrong = fmt.Errorf("CA key %s does not belong to %s: give the key that the certificate was made with", path, certFile)
	}
	return nil, wrong
}

// keyFileOf names the key file of a certificate that a rotation made.
func keyFileOf(cert *x509.Certificate) string {
	return "key-" + Fingerprint(cert) + ".pem"
}

// Fingerprint is how certificates are named to people: the start of the SHA-256.
func Fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:8])
}

func belongs(key crypto.Signer, cert *x509.Certificate) bool {
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && pub.Equal(cert.PublicKey)
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
	switch {
	case !i.cert.IsCA || !i.cert.BasicConstraintsValid:
		return fmt.Errorf("CA certificate %s is not a CA (basicConstraints CA:FALSE): give the certificate that may sign others", path)
	case i.cert.KeyUsage != 0 && i.cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("CA certificate %s may not sign certificates: its keyUsage lacks keyCertSign", path)
	case now.After(i.cert.NotAfter):
		return fmt.Errorf("CA certificate %s expired at %s: renew it", path, i.cert.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(i.cert.NotBefore):
		return fmt.Errorf("CA certificate %s is not valid before %s: check this machine's clock", path, i.cert.NotBefore.UTC().Format(time.RFC3339))
	}
	opts := x509.VerifyOptions{
		Roots: pool(i.roots), Intermediates: pool(i.chain), CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	chains, err := i.cert.Verify(opts)
	if err != nil {
		return fmt.Errorf("CA certificate %s does not lead to a root of %s: %w (%s)", path, RootFile, err, i.hint(now))
	}
	for _, chain := range chains {
		if err = pathLength(chain); err == nil {
			return nil
		}
	}
	return fmt.Errorf("CA certificate %s: %w", path, err)
}

// hint says what to do about a chain that does not verify.
func (i *issuer) hint(now time.Time) string {
	for _, c := range slices.Concat(i.chain, i.roots) {
		switch {
		case now.After(c.NotAfter):
			return fmt.Sprintf("%s expired at %s: renew it", c.Subject, c.NotAfter.UTC().Format(time.RFC3339))
		case !bytes.Equal(c.RawSubject, i.cert.RawIssuer):
		case !c.IsCA:
			return fmt.Sprintf("%s is not a CA", c.Subject)
		case i.cert.CheckSignatureFrom(c) != nil:
			return fmt.Sprintf("%s has the issuer's name, %s, but did not sign it: give the certificate that did", Fingerprint(c), c.Subject)
		}
	}
	return "put every intermediate into " + chainFile
}

// pathLength checks a chain as it is with a leaf below it: x509 saw it end here.
func pathLength(chain []*x509.Certificate) error {
	for below, c := range chain {
		if (c.MaxPathLen > 0 || c.MaxPathLenZero) && c.MaxPathLen < below {
			return fmt.Errorf("%s allows %d CAs below it (pathlen), the chain has %d: use one that allows more", c.Subject, c.MaxPathLen, below)
		}
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
