package cert

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// VerifyError says why a peer's certificate was refused.
type VerifyError struct {
	Peer   string // the URI SAN as presented, "" when there is none
	Reason string
	Err    error
}

func (e *VerifyError) Error() string {
	s := "peer certificate refused: " + e.Reason
	if e.Peer != "" {
		s = "peer certificate of " + e.Peer + " refused: " + e.Reason
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *VerifyError) Unwrap() error { return e.Err }

// Verify is the one place where a peer's certificate is judged. It runs in
// tls.Config.VerifyConnection, so on every handshake, resumed ones included.
//
//   - exactly one URI SAN, a SPIFFE ID of a workload (SPIFFE X509-SVID §2: an
//     SVID "MUST contain exactly one URI SAN");
//   - a chain to a root of that ID's own trust domain, and of no other;
//   - valid now, and the extended key usage allows the role;
//   - none of its certificates is on its issuer's revocation list;
//   - accept agrees to the identity.
func (t *Trust) Verify(cs tls.ConnectionState, usage x509.ExtKeyUsage, now time.Time, accept func(identity.ID) error) (identity.ID, error) {
	if len(cs.PeerCertificates) == 0 {
		return identity.ID{}, &VerifyError{Reason: "no certificate"}
	}
	leaf := cs.PeerCertificates[0]
	id, err := LeafIdentity(leaf)
	if err != nil {
		return identity.ID{}, err
	}
	refuse := func(reason string, err error) (identity.ID, error) {
		return identity.ID{}, &VerifyError{Peer: id.String(), Reason: reason, Err: err}
	}
	roots := t.anchors(id.TrustDomain())
	if roots == nil {
		return refuse("no roots are known for trust domain "+id.TrustDomain(), nil)
	}
	if now.Before(leaf.NotBefore) {
		return refuse("not valid before "+leaf.NotBefore.UTC().Format(time.RFC3339)+" (is a clock wrong?)", nil)
	}
	if now.After(leaf.NotAfter) {
		return refuse("expired at "+leaf.NotAfter.UTC().Format(time.RFC3339), nil)
	}
	if err := roots.verify(cs.PeerCertificates, usage, now); err != nil {
		return refuse("not trusted", err)
	}
	if r := t.find(cs.PeerCertificates, id); r != nil {
		return refuse("revoked", r)
	}
	if err := accept(id); err != nil {
		return refuse("wrong identity", err)
	}
	return id, nil
}

// verifyChain checks that certs, a leaf and what it needs, lead to a root.
func verifyChain(certs []*x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, now time.Time) error {
	_, err := buildChain(certs, roots, usage, now)
	return err
}

// buildChain is verifyChain, and says which way leads to a root.
func buildChain(certs []*x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, now time.Time) ([]*x509.Certificate, error) {
	inter := x509.NewCertPool()
	for _, c := range certs[1:] {
		inter.AddCert(c)
	}
	chains, err := certs[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: inter, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return nil, err
	}
	return chains[0], nil
}

// LeafIdentity is the SPIFFE ID in a certificate's single URI SAN.
func LeafIdentity(leaf *x509.Certificate) (identity.ID, error) {
	switch len(leaf.URIs) {
	case 1:
	case 0:
		return identity.ID{}, &VerifyError{Reason: "it has no URI SAN, so no identity"}
	default:
		// A certificate that is several identities at once is none.
		return identity.ID{}, &VerifyError{Reason: fmt.Sprintf("it has %d URI SANs, one is allowed", len(leaf.URIs))}
	}
	uri := leaf.URIs[0].String()
	id, err := identity.Parse(uri)
	if err != nil {
		return identity.ID{}, &VerifyError{Peer: uri, Reason: "not a workload identity", Err: err}
	}
	return id, nil
}

// oneOf accepts exactly the expected identities.
func oneOf(expected []identity.ID) func(identity.ID) error {
	return func(id identity.ID) error {
		if slices.Contains(expected, id) {
			return nil
		}
		if len(expected) == 0 {
			return errors.New("no identity is expected here")
		}
		return fmt.Errorf("expected %s", joinIDs(expected))
	}
}

// oneOf accepts the expected identities, also under another name of the local
// trust domain.
func (m *Manager) oneOf(local identity.ID, expected []identity.ID) func(identity.ID) error {
	exactly := oneOf(expected)
	return func(id identity.ID) error {
		err := exactly(id)
		if err == nil {
			return nil
		}
		ours := m.domains(local.TrustDomain())
		if len(ours) > 1 && slices.Contains(ours, id.TrustDomain()) && slices.ContainsFunc(expected, func(e identity.ID) bool {
			return e.Namespace() == id.Namespace() && e.ServiceAccount() == id.ServiceAccount() && slices.Contains(ours, e.TrustDomain())
		}) {
			return nil
		}
		return err
	}
}

// inDomains accepts every identity of the local trust domain or its aliases.
func inDomains(domains []string) func(identity.ID) error {
	return func(id identity.ID) error {
		if slices.Contains(domains, id.TrustDomain()) {
			return nil
		}
		return fmt.Errorf("trust domain %q is not ours (%v)", id.TrustDomain(), domains)
	}
}
