package ca

import (
	"crypto/x509"
	"fmt"
	"time"
)

// Info describes the CA for status pages.
type Info struct {
	Subject    string     `json:"subject"`
	SelfSigned bool       `json:"self_signed"`
	NotAfter   time.Time  `json:"not_after"` // of the weakest link above a leaf
	MaxLeaf    string     `json:"max_leaf_lifetime"`
	Generation uint64     `json:"generation"`
	Certs      []CertInfo `json:"certificates"`
	Warnings   []string   `json:"warnings,omitempty"`
}

// CertInfo describes a CA certificate.
type CertInfo struct {
	Role        string    `json:"role"` // signing, intermediate, root
	Fingerprint string    `json:"fingerprint"`
	Subject     string    `json:"subject"`
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
}

func describe(role string, c *x509.Certificate) CertInfo {
	return CertInfo{Role: role, Fingerprint: Fingerprint(c), Subject: c.Subject.String(), NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC()}
}

// Info describes the CA.
func (a *Authority) Info() Info {
	st := a.inForce()
	i := Info{
		Subject:    st.issuer.cert.Subject.String(),
		SelfSigned: a.cfg.PluggedDir == "",
		NotAfter:   st.issuer.notAfter().UTC(),
		MaxLeaf:    a.cfg.MaxTTL.String(),
		Generation: st.generation,
		Certs:      st.issuer.certs(),
	}
	i.Warnings = warnings(i.Certs, a.cfg.Now())
	if err := a.Problem(); err != nil {
		i.Warnings = append(i.Warnings, "CA files are not in force as they are: "+err.Error())
	}
	return i
}

// certs lists what signs, then what leads to the roots, then the roots.
func (i *issuer) certs() []CertInfo {
	out := []CertInfo{describe("signing", i.cert)}
	for _, c := range i.chain {
		if !c.Equal(i.cert) {
			out = append(out, describe("intermediate", c))
		}
	}
	for _, c := range i.roots {
		out = append(out, describe("root", c))
	}
	return out
}

// warnings names what has less than a quarter of its life left: the time in
// which a rotation is no emergency yet.
func warnings(certs []CertInfo, now time.Time) []string {
	var out []string
	seen := map[string]bool{}
	for _, c := range certs {
		left := c.NotAfter.Sub(now)
		if seen[c.Fingerprint] || left >= c.NotAfter.Sub(c.NotBefore)/4 {
			continue
		}
		seen[c.Fingerprint] = true
		what := fmt.Sprintf("%s %s (%s) expires at %s, in %s", c.Role, c.Fingerprint, c.Subject, c.NotAfter.Format(time.RFC3339), left.Round(time.Minute))
		if left <= 0 {
			what = fmt.Sprintf("%s %s (%s) expired at %s", c.Role, c.Fingerprint, c.Subject, c.NotAfter.Format(time.RFC3339))
		}
		out = append(out, what+": rotate it")
	}
	return out
}
