package cert

import (
	"context"
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
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// Authority signs. The answer is the certificate API's: the leaf, then
// intermediates, one PEM block each, and last the roots.
type Authority interface {
	Sign(ctx context.Context, id identity.ID, csrPEM string, ttl time.Duration) ([]string, error)
}

// Certificate is one issued identity. Immutable.
type Certificate struct {
	ID    identity.ID
	TLS   tls.Certificate
	Leaf  *x509.Certificate
	Chain []*x509.Certificate // intermediates
	Roots []*x509.Certificate
}

// Valid reports whether the certificate can be shown at this time.
func (c *Certificate) Valid(now time.Time) bool {
	return c != nil && !now.Before(c.Leaf.NotBefore) && now.Before(c.Leaf.NotAfter)
}

// renewFloor is the least time between two certificates of one identity,
// however short their lives: a CA that answers with ends in the past half of
// their life must not be asked in a loop.
const renewFloor = time.Second

// renewAt is half-life less up to a tenth of the lifetime (jitter in [0,1)),
// so that a node's identities, issued together, are not renewed together. Life
// counts from when the certificate was received: CAs backdate NotBefore to
// allow for clocks that differ, and of a short life that may be the most.
func (c *Certificate) renewAt(received time.Time, jitter float64) time.Time {
	begins := received
	if c.Leaf.NotBefore.After(received) {
		begins = c.Leaf.NotBefore
	}
	life := c.Leaf.NotAfter.Sub(begins)
	at := begins.Add(life/2 - time.Duration(jitter*float64(life)/10))
	if soonest := received.Add(renewFloor); at.Before(soonest) {
		return soonest
	}
	return at
}

// oidSubjectAltName is RFC 5280 §4.2.1.6.
var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// request makes a fresh P-256 key and its CSR: no subject, so the subject
// alternative name must be critical (RFC 5280 §4.1.2.6), with one URI.
// crypto/x509 marks it so for certificates only, hence the hand-made extension.
func request(id identity.ID) (*ecdsa.PrivateKey, string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, "", fmt.Errorf("make key: %w", err)
	}
	// GeneralNames ::= SEQUENCE OF [6] IA5String uniformResourceIdentifier
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(id.String())}})
	if err != nil {
		return nil, "", fmt.Errorf("encode subject alternative name: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		ExtraExtensions:    []pkix.Extension{{Id: oidSubjectAltName, Critical: true, Value: san}},
	}, key)
	if err != nil {
		return nil, "", fmt.Errorf("make certificate request: %w", err)
	}
	return key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

// parse checks the CA's answer: it is for our key and our identity, valid now,
// and chains to the roots it brings.
func parse(id identity.ID, key *ecdsa.PrivateKey, chain []string, now time.Time) (*Certificate, error) {
	if len(chain) < 2 {
		return nil, fmt.Errorf("the CA answered %d certificates; a leaf and its roots are needed", len(chain))
	}
	c := &Certificate{ID: id}
	var err error
	if c.Roots, err = parsePEM(chain[len(chain)-1]); err != nil {
		return nil, fmt.Errorf("roots: %w", err)
	}
	var certs []*x509.Certificate
	for i, s := range chain[:len(chain)-1] {
		cs, err := parsePEM(s)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", i, err)
		}
		certs = append(certs, cs...)
	}
	c.Leaf, c.Chain = certs[0], certs[1:]
	got, err := LeafIdentity(c.Leaf)
	if err != nil {
		return nil, err
	}
	if got != id {
		return nil, fmt.Errorf("the CA answered an identity that was not asked for: %s", got)
	}
	pub, ok := c.Leaf.PublicKey.(*ecdsa.PublicKey)
	if !ok || !pub.Equal(&key.PublicKey) {
		return nil, errors.New("the CA answered a certificate for another key")
	}
	if now.Before(c.Leaf.NotBefore) {
		return nil, fmt.Errorf("the certificate is not valid before %s: the clocks of this node and the CA differ",
			c.Leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	if !now.Before(c.Leaf.NotAfter) {
		return nil, fmt.Errorf("the certificate expired at %s: the clocks of this node and the CA differ",
			c.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	roots, inter := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range c.Roots {
		roots.AddCert(r)
	}
	for _, i := range c.Chain {
		inter.AddCert(i)
	}
	if _, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: inter, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return nil, fmt.Errorf("the certificate does not chain to the roots that came with it: %w", err)
	}
	c.TLS = tls.Certificate{PrivateKey: key, Leaf: c.Leaf}
	for _, x := range certs {
		c.TLS.Certificate = append(c.TLS.Certificate, x.Raw)
	}
	return c, nil
}

func parsePEM(s string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := []byte(s); ; {
		var b *pem.Block
		b, rest = pem.Decode(rest)
		if b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("unexpected PEM block %q", b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("no PEM certificate")
	}
	return out, nil
}
