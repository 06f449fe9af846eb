package meshca

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
)

func TestLeavesVerifyAsTheyShould(t *testing.T) {
	ca, other := New(t, "cluster.local"), New(t, "cluster.local")
	inter := ca.Intermediate(t).Intermediate(t)
	id := identity.MustParse("spiffe://cluster.local/ns/a/sa/b")
	tests := []struct {
		name string
		ca   *CA
		opts []Option
		good bool
	}{
		{"plain", ca, nil, true},
		{"below intermediates", inter, nil, true},
		{"expired", ca, []Option{Expired()}, false},
		{"not yet valid", ca, []Option{NotYetValid()}, false},
		{"another root", other, nil, false},
		{"server only", ca, []Option{Usages(x509.ExtKeyUsageServerAuth)}, false},
		{"short", ca, []Option{Lifetime(time.Hour)}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cert := tt.ca.Leaf(t, id, tt.opts...)
			chain := x509.NewCertPool()
			for _, der := range cert.Certificate[1:] {
				c, err := x509.ParseCertificate(der)
				if err != nil {
					t.Fatal(err)
				}
				chain.AddCert(c)
			}
			_, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: ca.Pool(), Intermediates: chain, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
			if (err == nil) != tt.good {
				t.Errorf("verify: %v", err)
			}
			if len(cert.Leaf.URIs) != 1 || cert.Leaf.URIs[0].String() != id.String() {
				t.Errorf("URIs %v", cert.Leaf.URIs)
			}
			if n := len(tt.ca.ChainPEM(cert.Leaf)); n != len(cert.Certificate)+1 {
				t.Errorf("chain of %d for %d certificates", n, len(cert.Certificate))
			}
		})
	}
	two := ca.Leaf(t, identity.ID{}, URIs("spiffe://a/ns/b/sa/c", "spiffe://a/ns/b/sa/d"), Names("localhost", "::1"))
	if len(two.Leaf.URIs) != 2 || two.Leaf.VerifyHostname("::1") != nil || two.Leaf.VerifyHostname("localhost") != nil {
		t.Errorf("URIs %v, names %v %v", two.Leaf.URIs, two.Leaf.DNSNames, two.Leaf.IPAddresses)
	}
}
