package dns

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

// say writes an answer down: "foreign", or "ours" with what follows.
func (r *Resolver) say(s *mesh.Snapshot, ns, network, name string, t dnsmessage.Type, rnd uint64) string {
	c := r.Client(ns, network)
	var a answer
	r.resolve(s, &c, query{name: []byte(name), labels: 1 + strings.Count(name, "."), qtype: t, max: 4096, rnd: rnd}, &a)
	if !a.owned {
		return "foreign"
	}
	out := []string{"ours"}
	if a.cname != nil {
		out = append(out, "="+string(a.cname))
	}
	var rest []string
	for _, addr := range a.addrs {
		rest = append(rest, addr.String())
	}
	for _, t := range a.targets {
		host := t.host
		if host == "" {
			host = string(appendDashed(nil, t.addr)) + "." + t.svc
		}
		rest = append(rest, fmt.Sprintf("%s:%d", host, t.port))
	}
	slices.Sort(rest)
	return strings.Join(append(out, rest...), " ")
}

func TestResolve(t *testing.T) {
	const A, AAAA, SRV, ANY, TXT = dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeSRV, dnsmessage.TypeALL, dnsmessage.TypeTXT
	s := shop()
	for _, tc := range []struct {
		name  string
		qtype dnsmessage.Type
		want  string
	}{
		{"web.shop.svc.cluster.local", A, "ours 10.96.0.1"},
		{"web.shop.svc.cluster.local", AAAA, "ours fd00:96::1"},
		{"web.shop.svc.cluster.local", ANY, "ours 10.96.0.1 fd00:96::1"},
		{"web.shop.svc.cluster.local", TXT, "ours"},
		{"web.other.svc.cluster.local", AAAA, "ours"},
		{"v4.shop.svc.cluster.local", A, "ours 10.96.0.3"},
		{"v4.shop.svc.cluster.local", AAAA, "ours"},
		// Short names, by their number of labels.
		{"web", A, "ours 10.96.0.1"},
		{"web.other", A, "ours 10.96.0.2"},
		{"web.other.svc", A, "ours 10.96.0.2"},
		{"web.svc", A, "foreign"},
		{"db-0.db", A, "ours 10.1.0.1"},
		{"db-0.db.shop", A, "ours 10.1.0.1"},
		{"db-0.db.shop.svc", A, "ours 10.1.0.1"},
		{"web.shop.svc.cluster", A, "foreign"},
		// What a search list makes of a name.
		{"web.other.shop.svc.cluster.local", A, "ours =web.other 10.96.0.2"},
		{"web.other.svc.svc.cluster.local", A, "ours =web.other.svc 10.96.0.2"},
		{"api.example.com.shop.svc.cluster.local", A, "ours =api.example.com 240.240.0.1"},
		{"api.example.com.svc.cluster.local", A, "ours =api.example.com 240.240.0.1"},
		{"api.example.com.cluster.local", AAAA, "ours =api.example.com 2001:2::1"},
		{"x.wild.example.com.cluster.local", A, "ours 240.240.0.2"},
		{"api.example.com.other.svc.cluster.local", A, "foreign"}, // not this pod's list
		// Headless services and their pods.
		{"db.shop.svc.cluster.local", A, "ours 10.1.0.1 10.1.0.2"},
		{"db.shop.svc.cluster.local", AAAA, "ours fd00:1::1 fd00:1::2"},
		{"db", A, "ours 10.1.0.1 10.1.0.2"},
		{"late.shop.svc.cluster.local", A, "ours 10.1.1.1"},
		{"nobody.shop.svc.cluster.local", A, "ours"},
		{"db-0.db.shop.svc.cluster.local", A, "ours 10.1.0.1"},
		{"db-0.db.shop.svc.cluster.local", AAAA, "ours fd00:1::1"},
		{"db-2.db.shop.svc.cluster.local", A, "ours"},
		{"db-far.db.shop.svc.cluster.local", A, "ours"},
		{"late-0.late.shop.svc.cluster.local", A, "ours 10.1.1.1"},
		{"db-9.db.shop.svc.cluster.local", A, "foreign"},
		{"10-1-0-2.db.shop.svc.cluster.local", A, "ours 10.1.0.2"},
		{"fd00-0001-0000-0000-0000-0000-0000-0002.db.shop.svc.cluster.local", AAAA, "ours fd00:1::2"},
		{"10-1-0-2.web.shop.svc.cluster.local", A, "foreign"},
		{"10-9-9-9.db.shop.svc.cluster.local", A, "foreign"},
		{"10-1-0-x.db.shop.svc.cluster.local", A, "foreign"},
		// ServiceEntries.
		{"api.example.com", A, "ours 240.240.0.1"},
		{"x.wild.example.com", A, "ours 240.240.0.2"},
		{"y.x.wild.example.com", A, "ours 240.240.0.2"},
		{"y.sub.wild.example.com", A, "ours 240.240.0.3"},
		{"exact.wild.example.com", A, "ours 240.240.0.4"},
		{"wild.example.com", A, "foreign"},
		{"elsewhere.example.com", A, "ours"},
		{"novip.example.com", A, "foreign"},
		{"private.example.com", A, "foreign"},
		{"example.com", A, "foreign"},
		// Visibility holds for pods of the service too.
		{"hidden.other.svc.cluster.local", A, "foreign"},
		{"hidden-0.hidden.other.svc.cluster.local", A, "foreign"},
		{"10-1-2-1.hidden.other.svc.cluster.local", A, "foreign"},
		// SRV.
		{"_http._tcp.web.shop.svc.cluster.local", SRV, "ours web.shop.svc.cluster.local:80"},
		{"_http._tcp.web", SRV, "ours web.shop.svc.cluster.local:80"},
		{"_http._tcp.web.shop.shop.svc.cluster.local", SRV, "ours =_http._tcp.web.shop web.shop.svc.cluster.local:80"},
		{"_pg._tcp.db.shop.svc.cluster.local", SRV, "ours 10-1-0-2.db.shop.svc.cluster.local:13432 db-0.db.shop.svc.cluster.local:13432"},
		{"_none._tcp.web.shop.svc.cluster.local", SRV, "ours"},
		{"_http._udp.web.shop.svc.cluster.local", SRV, "foreign"},
		{"_http._tcp.web.other.svc.cluster.local", SRV, "foreign"}, // its ports have no names
		{"_http._tcp", SRV, "foreign"},
		{"web.shop.svc.cluster.local", SRV, "foreign"},
		{"_http._tcp.web.shop.svc.cluster.local", A, "foreign"},
	} {
		if got := NewResolver(ResolverConfig{}).say(s, "shop", "", tc.name, tc.qtype, 1); got != tc.want {
			t.Errorf("%s %s: %s, want %s", tc.name, typeName(tc.qtype), got, tc.want)
		}
	}
}

func TestResolvePicksByNamespace(t *testing.T) {
	s := shop()
	for _, tc := range []struct{ ns, network, preferred, name, want string }{
		{"one", "", "", "many.example.com", "ours 240.240.1.1"},
		{"three", "", "", "many.example.com", "ours 240.240.1.3"},
		{"shop", "", "", "many.example.com", "ours 240.240.1.2"}, // canonical
		{"shop", "", "three", "many.example.com", "ours 240.240.1.2"},
		{"shop", "", "", "pick.example.com", "ours 240.240.2.1"}, // first seen
		{"shop", "", "three", "pick.example.com", "ours 240.240.2.3"},
		{"two", "", "three", "pick.example.com", "ours 240.240.2.2"},
		{"other", "", "", "private.example.com", "ours 240.240.0.6"},
		{"other", "", "", "hidden-0.hidden.other.svc.cluster.local", "ours 10.1.2.1"},
		{"other", "", "", "web", "ours 10.96.0.2"},
		{"shop", "far", "", "elsewhere.example.com", "ours 240.240.0.5"},
		{"shop", "far", "", "db.shop.svc.cluster.local", "ours 10.1.0.9"},
		{"shop", "far", "", "web.shop.svc.cluster.local", "ours"},
	} {
		if got := NewResolver(ResolverConfig{Preferred: tc.preferred}).say(s, tc.ns, tc.network, tc.name, dnsmessage.TypeA, 1); got != tc.want {
			t.Errorf("%s asked from namespace %q network %q: %s, want %s", tc.name, tc.ns, tc.network, got, tc.want)
		}
	}
}

func TestResolveOtherDomainAndNoIPv6(t *testing.T) {
	s := snapshot(service("shop/web.shop.svc.corp.example", "10.96.0.1", "fd00::1"), service("shop/db.shop.svc.corp.example"), service("shop/x.shop.svc.cluster.local"))
	r := NewResolver(ResolverConfig{Domain: "Corp.Example.", NoIPv6: true})
	for _, tc := range []struct {
		name  string
		qtype dnsmessage.Type
		want  string
	}{
		{"web", dnsmessage.TypeA, "ours 10.96.0.1"},
		{"web.shop.svc.corp.example", dnsmessage.TypeAAAA, "ours"},
		{"db", dnsmessage.TypeA, "ours"},
		{"x.shop.svc.cluster.local", dnsmessage.TypeA, "foreign"},
	} {
		if got := r.say(s, "shop", "", tc.name, tc.qtype, 1); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
}

// TestResolveSpreads: every endpoint comes first at some time, also in answers
// that have no room for all.
func TestResolveSpreads(t *testing.T) {
	things := []any{service("shop/db.shop.svc.cluster.local"), service("shop/m.example.com", "240.240.0.1", "240.240.0.2", "240.240.0.3")}
	for i := range 100 {
		things = append(things, endpoint("shop", fmt.Sprint("db-", i), fmt.Sprint("10.0.0.", i), "", "db.shop.svc.cluster.local"))
	}
	s, r := snapshot(things...), NewResolver(ResolverConfig{})
	c := r.Client("shop", "")
	for name, n := range map[string]int{"db": 100, "m.example.com": 3} {
		first := map[string]bool{}
		var a answer
		for range 2000 {
			r.resolve(s, &c, query{name: []byte(name), labels: 1 + strings.Count(name, "."), qtype: dnsmessage.TypeA, max: 10, rnd: rand.Uint64()}, &a)
			if want := min(n, 10); len(a.addrs) != want {
				t.Fatalf("%s: %d addresses, want %d", name, len(a.addrs), want)
			}
			first[a.addrs[0].String()] = true
		}
		if len(first) != n {
			t.Errorf("%s: %d of %d addresses came first in 2000 answers", name, len(first), n)
		}
	}
}

func BenchmarkResolve(b *testing.B) {
	things := []any{service("ns/*.example.com", "240.240.0.1")}
	for i := range 10000 {
		things = append(things, service(fmt.Sprintf("ns/s%d.ns.svc.cluster.local", i), "10.96.0.1"))
	}
	s, r := snapshot(things...), NewResolver(ResolverConfig{})
	c := r.Client("ns", "")
	for _, name := range []string{"s7.ns.svc.cluster.local", "s7", "www.foreign.org.ns.svc.cluster.local", "www.foreign.org"} {
		b.Run(name, func(b *testing.B) {
			q := query{name: []byte(name), labels: 1 + strings.Count(name, "."), qtype: dnsmessage.TypeA, max: 30, rnd: 1}
			var a answer
			b.ReportAllocs()
			for b.Loop() {
				r.resolve(s, &c, q, &a)
			}
		})
	}
}
