package dns

import (
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// Anybody may write a ServiceEntry. It must not take names of other namespaces'
// services away, neither by their name nor by what a search domain makes of it.
func TestNamesOfOthersCannotBeTaken(t *testing.T) {
	const evil = "240.240.6.6"
	real := service("shop/web.shop.svc.cluster.local", "10.96.0.1")
	for _, c := range []struct {
		host, client, asked string
		want                string
	}{
		// What a resolver with ndots:5 asks first.
		{"*.cluster.local", "bank", "web.shop.svc.cluster.local.bank.svc.cluster.local", "10.96.0.1"},
		{"*.svc.cluster.local", "bank", "web.shop.bank.svc.cluster.local", "10.96.0.1"},
		{"*.local", "bank", "web.shop.svc.cluster.local", "10.96.0.1"},
		{"*.bank.svc.cluster.local", "bank", "web.shop.bank.svc.cluster.local", "10.96.0.1"},
		{"web.shop.svc.cluster.local.bank.svc.cluster.local", "bank", "web.shop.svc.cluster.local.bank.svc.cluster.local", "10.96.0.1"},
		{"web.shop.bank.svc.cluster.local", "bank", "web.shop.bank.svc.cluster.local", "10.96.0.1"},
		// Names outside the cluster, with a search domain.
		{"*.cluster.local", "bank", "api.example.com.bank.svc.cluster.local", ""},
		{"*.svc.cluster.local", "bank", "api.example.com.svc.cluster.local", ""},
		{"*.cluster.local", "bank", "api.example.com.cluster.local", ""},
		{"*.local", "bank", "api.example.com.cluster.local", ""},
		// Services and pods that are not there, or not yet.
		{"late.shop.svc.cluster.local", "bank", "late.shop.svc.cluster.local", ""},
		{"web-0.web.shop.svc.cluster.local", "bank", "web-0.web.shop.svc.cluster.local", ""},
		{"svc.cluster.local", "bank", "svc.cluster.local", evil}, // no name of anybody
		// Its own names, for others and for itself; what is not under the domain.
		{"vm.evil.svc.cluster.local", "bank", "vm.evil", evil},
		{"*.evil.svc.cluster.local", "bank", "vm.evil.svc.cluster.local", evil},
		{"*.svc.cluster.local", "bank", "vm.evil.svc.cluster.local", evil},
		{"*.cluster.local", "evil", "late.shop.svc.cluster.local", evil},
		{"db.cluster.local", "bank", "db.cluster.local", evil},
		{"*.example.com", "bank", "api.example.com", evil},
	} {
		got := NewResolver(ResolverConfig{}).say(snapshot(real, service("evil/"+c.host, evil)), c.client, "", c.asked, dnsmessage.TypeA, 1)
		fields := strings.Fields(got)
		if got != "foreign" && c.want == "" || c.want != "" && fields[len(fields)-1] != c.want {
			t.Errorf("%s of namespace evil, %s asked by %s: %q, want %q", c.host, c.asked, c.client, got, c.want)
		}
	}
}
