package flow

import (
	"testing"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

func TestPrincipalLabels(t *testing.T) {
	a, b := identity.MustParse("spiffe://td/ns/shop/sa/a"), identity.MustParse("spiffe://td/ns/shop/sa/b")
	server := &mesh.Workload{Traits: &mesh.Traits{Identity: b}}
	tests := []struct {
		name          string
		r             Record
		src, dst, sec string
	}{
		{"tunnel: both proven", Record{Transport: HBONE, SrcID: a, DstID: b, Dst: server}, a.String(), b.String(), "mutual_tls"},
		{"plain: the destination's own, the source unknown", Record{Transport: Plaintext, Dst: server}, "", b.String(), unknown},
		{"destination unknown", Record{Transport: Passthrough}, "", "", unknown},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := labelsOf(&tt.r, FlagNone)
			if l.srcPrincipal != tt.src || l.dstPrincipal != tt.dst || l.security != tt.sec {
				t.Errorf("got %q, %q, %q", l.srcPrincipal, l.dstPrincipal, l.security)
			}
		})
	}
}
