package cert

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"
)

// maxCRL bounds a revocation list that is read. An entry has some 40 bytes.
const maxCRL = 64 << 20

// RevokedError says that a certificate of a peer's chain is on its issuer's
// revocation list.
type RevokedError struct {
	Serial  *big.Int
	Subject string // the URI of a leaf, the name of an intermediate
	Issuer  string
	At      time.Time
}

func (e *RevokedError) Error() string {
	return fmt.Sprintf("certificate %s of %s was revoked by %s at %s", e.Serial.Text(16), e.Subject, e.Issuer, e.At.UTC().Format(time.RFC3339))
}

// revocations are the lists in force, by the name of their issuer. Immutable.
//
// A list counts for the certificates of the key that signed it; a certificate
// without a list is good (status unknown is allowed), and so is what an expired
// list does not name: that a list is old must not stop a mesh. Both are the
// reference's choices.
type revocations struct {
	lists  map[string][]revocationList // by raw issuer name
	count  int
	digest [sha256.Size]byte // of what was read
}

type revocationList struct {
	*x509.RevocationList
	revoked map[string]time.Time // by serial number
}

var (
	oidDeltaCRL          = asn1.ObjectIdentifier{2, 5, 29, 27} // RFC 5280 §5.2.4
	oidCertificateIssuer = asn1.ObjectIdentifier{2, 5, 29, 29} // RFC 5280 §5.3.3
)

// parseCRLs reads revocation lists: PEM, any number, or one in DER.
func parseCRLs(data []byte) (*revocations, error) {
	if len(data) > maxCRL {
		return nil, fmt.Errorf("revocation lists have %d bytes, at most %d are read", len(data), maxCRL)
	}
	r := &revocations{lists: map[string][]revocationList{}, digest: sha256.Sum256(data)}
	if !bytes.Contains(data, []byte("-----BEGIN")) {
		return r, r.add(data)
	}
	n := 0
	for rest := data; ; n++ {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "X509 CRL" {
			return nil, fmt.Errorf("unexpected PEM block %q, want X509 CRL", b.Type)
		}
		if err := r.add(b.Bytes); err != nil {
			return nil, fmt.Errorf("list %d: %w", n+1, err)
		}
	}
	if n == 0 {
		return nil, errors.New("no revocation list (an empty one is a list without entries, not an empty file)")
	}
	return r, nil
}

func (r *revocations) add(der []byte) error {
	l, err := x509.ParseRevocationList(der)
	if err != nil {
		return fmt.Errorf("parse revocation list: %w", err)
	}
	// Both would be misread as what they are not: changes to another list, and
	// entries of other issuers.
	for _, e := range l.Extensions {
		if e.Id.Equal(oidDeltaCRL) {
			return fmt.Errorf("revocation list of %s is a delta: give the complete one", l.Issuer)
		}
	}
	list := revocationList{l, make(map[string]time.Time, len(l.RevokedCertificateEntries))}
	for _, e := range l.RevokedCertificateEntries {
		for _, x := range e.Extensions {
			if x.Id.Equal(oidCertificateIssuer) {
				return fmt.Errorf("revocation list of %s is indirect: give one list per issuer", l.Issuer)
			}
		}
		list.revoked[serialKey(e.SerialNumber)] = e.RevocationTime
	}
	key := string(l.RawIssuer)
	r.lists[key] = append(r.lists[key], list)
	r.count += len(list.revoked)
	return nil
}

func serialKey(n *big.Int) string { return n.String() }

// check verifies the lists whose issuers are known, so that a wrong file is
// found when it comes rather than when it is needed.
func (r *revocations) check(issuers []*x509.Certificate) error {
	for _, lists := range r.lists {
		for _, l := range lists {
			var wrong error
			for _, c := range issuers {
				if !bytes.Equal(c.RawSubject, l.RawIssuer) {
					continue
				}
				if wrong = l.CheckSignatureFrom(c); wrong == nil {
					break
				}
			}
			if wrong != nil {
				return fmt.Errorf("revocation list of %s is not signed by it: %w", l.Issuer, wrong)
			}
		}
	}
	return nil
}

// find looks for a revoked certificate among those that a peer showed. roots
// are asked for only when a serial number is listed.
func (r *revocations) find(shown []*x509.Certificate, roots func() []*x509.Certificate) *RevokedError {
	if r == nil {
		return nil
	}
	for _, c := range shown {
		for _, l := range r.lists[string(c.RawIssuer)] {
			at, listed := l.revoked[serialKey(c.SerialNumber)]
			if !listed || !l.isBy(c, slices.Concat(shown, roots())) {
				continue
			}
			return &RevokedError{Serial: c.SerialNumber, Subject: subjectOf(c), Issuer: l.Issuer.String(), At: at}
		}
	}
	return nil
}

// isBy reports whether one of the candidates signed both the certificate and
// the list. Names do not suffice: roots of a rotation may share theirs.
func (l revocationList) isBy(c *x509.Certificate, candidates []*x509.Certificate) bool {
	return slices.ContainsFunc(candidates, func(p *x509.Certificate) bool {
		return bytes.Equal(p.RawSubject, c.RawIssuer) && c.CheckSignatureFrom(p) == nil && l.CheckSignatureFrom(p) == nil
	})
}

func subjectOf(c *x509.Certificate) string {
	if len(c.URIs) == 1 {
		return c.URIs[0].String()
	}
	return c.Subject.String()
}

// expired lists the issuers whose lists are past their next update.
func (r *revocations) expired(now time.Time) []string {
	var out []string
	for _, lists := range r.lists {
		for _, l := range lists {
			if !l.NextUpdate.IsZero() && now.After(l.NextUpdate) {
				out = append(out, l.Issuer.String()+" since "+l.NextUpdate.UTC().Format(time.RFC3339))
			}
		}
	}
	slices.Sort(out)
	return out
}
