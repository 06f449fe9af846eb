package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/identity"
)

func exact(s string) *security.StringMatch {
	return &security.StringMatch{MatchType: &security.StringMatch_Exact{Exact: s}}
}
func prefix(s string) *security.StringMatch {
	return &security.StringMatch{MatchType: &security.StringMatch_Prefix{Prefix: s}}
}
func suffix(s string) *security.StringMatch {
	return &security.StringMatch{MatchType: &security.StringMatch_Suffix{Suffix: s}}
}
func presence() *security.StringMatch {
	return &security.StringMatch{MatchType: &security.StringMatch_Presence{Presence: &emptypb.Empty{}}}
}
func some(m ...*security.StringMatch) []*security.StringMatch { return m }

func cidr(s string) *security.Address {
	p := netip.MustParsePrefix(s)
	return &security.Address{Address: p.Addr().AsSlice(), Length: uint32(p.Bits())}
}

// rules builds rules of one clause with one match each.
func rules(ms ...*security.Match) (out []*security.Rule) {
	for _, m := range ms {
		out = append(out, &security.Rule{Clauses: []*security.Clause{{Matches: []*security.Match{m}}}})
	}
	return out
}

func auth(key string, scope security.Scope, action security.Action, r []*security.Rule) *security.Authorization {
	ns, name, _ := strings.Cut(key, "/")
	return &security.Authorization{Namespace: ns, Name: name, Scope: scope, Action: action, Rules: r}
}

func setOf(t testing.TB, as ...*security.Authorization) *Set {
	t.Helper()
	txn := Empty().Edit()
	for _, a := range as {
		for _, p := range txn.Put(a) {
			if p.Rejected {
				t.Fatal(p)
			}
		}
	}
	return txn.Commit()
}

var (
	web   = identity.MustParse("spiffe://cluster.local/ns/shop/sa/web")
	cart  = identity.MustParse("spiffe://cluster.local/ns/shop/sa/cart")
	other = identity.MustParse("spiffe://other.td/ns/away/sa/web")
)

func conn(peer identity.ID, src string, port uint16) Conn {
	return Conn{Peer: peer, Src: netip.AddrPortFrom(netip.MustParseAddr(src), 40000), Dst: netip.AddrPortFrom(netip.MustParseAddr("10.9.9.9"), port)}
}

const (
	global    = security.Scope_GLOBAL
	namespace = security.Scope_NAMESPACE
	selector  = security.Scope_WORKLOAD_SELECTOR
	allow     = security.Action_ALLOW
	deny      = security.Action_DENY
)

func TestAuthorize(t *testing.T) {
	empty := []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{{}}}}}}
	badCIDR := &security.Address{Address: []byte{1, 2, 3}, Length: 8}
	for _, tt := range []struct {
		name string
		set  []*security.Authorization
		refs []string
		conn Conn
		want bool
		why  string
	}{
		{"no policy", nil, nil, conn(web, "10.0.0.1", 80), true, "no ALLOW policy applies"},
		{"allow without rules", []*security.Authorization{auth("shop/none", namespace, allow, nil)}, nil,
			conn(web, "10.0.0.1", 80), false, "no ALLOW policy of namespace shop matched (1 policy: shop/none)"},
		{"deny without rules", []*security.Authorization{auth("shop/none", namespace, deny, nil)}, nil,
			conn(web, "10.0.0.1", 80), true, "no ALLOW policy applies"},
		{"rule without clauses", []*security.Authorization{auth("shop/all", namespace, deny, []*security.Rule{{}})}, nil,
			conn(web, "10.0.0.1", 80), false, "policy shop/all rule 1"},
		{"empty match never matches", []*security.Authorization{auth("shop/e", namespace, deny, empty)}, nil,
			conn(web, "10.0.0.1", 80), true, "no ALLOW policy applies"},
		{"clause without matches", []*security.Authorization{auth("shop/e", namespace, deny, []*security.Rule{{Clauses: []*security.Clause{{}}}})}, nil,
			conn(web, "10.0.0.1", 80), true, "no ALLOW policy applies"},
		{"second rule by principal", []*security.Authorization{auth("shop/p", namespace, allow,
			rules(&security.Match{Principals: some(exact("cluster.local/ns/shop/sa/cart"))}, &security.Match{Principals: some(exact("spiffe://cluster.local/ns/shop/sa/web"))}))}, nil,
			conn(web, "10.0.0.1", 80), true, "policy shop/p rule 2"},
		{"deny beats allow", []*security.Authorization{
			auth("shop/a", namespace, allow, []*security.Rule{{}}),
			auth("shop/z", namespace, deny, rules(&security.Match{DestinationPorts: []uint32{80}}))}, nil,
			conn(web, "10.0.0.1", 80), false, "policy shop/z rule 1"},
		{"the first of those that allow are named", []*security.Authorization{
			auth("shop/d", namespace, allow, nil), auth("root/z", global, allow, nil), auth("shop/c", selector, allow, nil),
			auth("shop/b", namespace, allow, nil), auth("away/a", namespace, allow, nil), auth("shop/a", selector, allow, nil)}, []string{"shop/c"},
			conn(web, "10.0.0.1", 80), false, "no ALLOW policy of namespace shop matched (4 policies: root/z, shop/b, shop/c and 1 more)"},
		{"lowest key is reported", []*security.Authorization{
			auth("shop/b", namespace, deny, []*security.Rule{{}}), auth("root/a", global, deny, []*security.Rule{{}}),
			auth("shop/a", selector, deny, []*security.Rule{{}})}, []string{"shop/a"},
			conn(web, "10.0.0.1", 80), false, "policy root/a rule 1"},
		{"namespace of another", []*security.Authorization{auth("away/a", namespace, deny, []*security.Rule{{}})}, nil,
			conn(web, "10.0.0.1", 80), true, "no ALLOW policy applies"},
		{"selector counts only when named", []*security.Authorization{auth("shop/s", selector, deny, []*security.Rule{{}})}, nil,
			conn(web, "10.0.0.1", 80), true, "no ALLOW policy applies"},
		{"unknown policy", nil, []string{"shop/z", "shop/gone"}, conn(web, "10.0.0.1", 80), false, "policy shop/gone not yet known"},
		{"strict refuses plaintext", []*security.Authorization{auth("ambit-system/istio_converted_static_strict", selector, deny,
			rules(&security.Match{NotPrincipals: some(presence())}))}, []string{"ambit-system/istio_converted_static_strict"},
			conn(identity.ID{}, "10.0.0.1", 80), false, "STRICT: plaintext from a client outside the mesh (policy ambit-system/istio_converted_static_strict)"},
		{"strict accepts an identity", []*security.Authorization{auth("ambit-system/istio_converted_static_strict", selector, deny,
			rules(&security.Match{NotPrincipals: some(presence())}))}, []string{"ambit-system/istio_converted_static_strict"},
			conn(web, "10.0.0.1", 80), true, "no ALLOW policy applies"},
		{"account of any trust domain", []*security.Authorization{auth("shop/p", namespace, allow,
			rules(&security.Match{ServiceAccounts: []*security.ServiceAccountMatch{{Namespace: "away", ServiceAccount: "web"}}}))}, nil,
			conn(other, "10.0.0.1", 80), true, "policy shop/p rule 1"},
		{"plaintext and namespace exclusion", []*security.Authorization{auth("shop/p", namespace, deny,
			rules(&security.Match{NotNamespaces: some(exact("shop"))}))}, nil,
			conn(identity.ID{}, "10.0.0.1", 80), false, "policy shop/p rule 1"},
		{"mapped source", []*security.Authorization{auth("shop/p", namespace, allow,
			rules(&security.Match{SourceIps: []*security.Address{cidr("10.0.0.0/8")}}))}, nil,
			conn(web, "::ffff:10.0.0.1", 80), true, "policy shop/p rule 1"},
		{"mapped range", []*security.Authorization{auth("shop/p", namespace, allow,
			rules(&security.Match{SourceIps: []*security.Address{cidr("::ffff:10.0.0.0/104")}}))}, nil,
			conn(web, "10.0.0.1", 80), true, "policy shop/p rule 1"},
		{"bad range in ALLOW matches nothing", []*security.Authorization{auth("shop/p", namespace, allow,
			rules(&security.Match{SourceIps: []*security.Address{badCIDR}, DestinationPorts: []uint32{80}}))}, nil,
			conn(web, "10.0.0.1", 80), false, "no ALLOW policy of namespace shop matched (1 policy: shop/p)"},
		{"bad excluded range in ALLOW matches nothing", []*security.Authorization{auth("shop/p", namespace, allow,
			rules(&security.Match{NotSourceIps: []*security.Address{badCIDR}, DestinationPorts: []uint32{80}}))}, nil,
			conn(web, "10.0.0.1", 80), false, "no ALLOW policy of namespace shop matched (1 policy: shop/p)"},
		{"bad range in DENY matches everything", []*security.Authorization{auth("shop/p", namespace, deny,
			rules(&security.Match{SourceIps: []*security.Address{cidr("192.0.2.0/24"), badCIDR}}))}, nil,
			conn(web, "10.0.0.1", 80), false, "policy shop/p rule 1"},
		{"bad excluded range in DENY excludes nothing", []*security.Authorization{auth("shop/p", namespace, deny,
			rules(&security.Match{NotSourceIps: []*security.Address{badCIDR}}))}, nil,
			conn(web, "10.0.0.1", 80), false, "policy shop/p rule 1"},
		{"unknown string match in DENY", []*security.Authorization{auth("shop/p", namespace, deny,
			rules(&security.Match{Principals: some(&security.StringMatch{})}))}, nil,
			conn(identity.ID{}, "10.0.0.1", 80), false, "policy shop/p rule 1"},
		{"port too large in DENY", []*security.Authorization{auth("shop/p", namespace, deny,
			rules(&security.Match{DestinationPorts: []uint32{65536 + 81}}))}, nil,
			conn(web, "10.0.0.1", 80), false, "policy shop/p rule 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := setOf(t, tt.set...).Authorize("shop", tt.refs, tt.conn)
			if v.Allowed != tt.want || v.Why() != tt.why {
				t.Errorf("allowed %v: %s; want %v: %s", v.Allowed, v.Why(), tt.want, tt.why)
			}
		})
	}
}

// Whose wish it was to refuse plaintext is in the sentence, as far as it is known.
func TestStrictNamesItsAuthor(t *testing.T) {
	for _, tt := range []struct{ policy, by, want string }{
		{"root/istio_converted_static_strict", "", "(policy root/istio_converted_static_strict)"},
		{"root/istio_converted_static_strict", "shop/strict", "(PeerAuthentication shop/strict, policy root/istio_converted_static_strict)"},
		{"shop/converted_peer_authentication_ports", "", "(PeerAuthentication shop/ports, policy shop/converted_peer_authentication_ports)"},
		{"shop/converted_peer_authentication_ports", "root/other", "(PeerAuthentication shop/ports, policy shop/converted_peer_authentication_ports)"},
	} {
		v := setOf(t, auth(tt.policy, selector, deny, rules(&security.Match{NotPrincipals: some(presence())}))).Authorize("shop", []string{tt.policy}, conn(identity.ID{}, "10.0.0.1", 80))
		v.StrictBy = tt.by
		if got, want := v.Why(), "STRICT: plaintext from a client outside the mesh "+tt.want; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestDryRunIsReportedAndNotEnforced(t *testing.T) {
	d := auth("shop/d", namespace, deny, rules(&security.Match{DestinationPorts: []uint32{80}}))
	a := auth("shop/a", namespace, allow, rules(&security.Match{Principals: some(suffix("/sa/cart"))}))
	d.DryRun, a.DryRun = true, true
	s := setOf(t, d, a)
	for _, tt := range []struct {
		c    Conn
		want string
	}{
		{conn(web, "10.0.0.1", 80), "dry-run policy shop/d rule 1 would deny"},
		{conn(cart, "10.0.0.1", 81), "dry-run policy shop/a rule 1 would allow"},
		{conn(web, "10.0.0.1", 81), "no ALLOW policy in dry run matched, they would deny"},
	} {
		if v := s.Authorize("shop", nil, tt.c); !v.Allowed || v.DryRun != tt.want {
			t.Errorf("allowed %v, dry run %q, want %q", v.Allowed, v.DryRun, tt.want)
		}
	}
}

func TestCompileProblems(t *testing.T) {
	_, err := Compile(&security.Authorization{Namespace: "a", Name: "b", Action: 7})
	if err == nil || !strings.Contains(err.Error(), "policy a/b: action: value 7") {
		t.Errorf("unknown action: %v", err)
	}
	_, err = Compile(&security.Authorization{Namespace: "a", Name: "b", Scope: 7})
	if err == nil || !strings.Contains(err.Error(), "policy a/b: scope: value 7") {
		t.Errorf("unknown scope: %v", err)
	}
	p, err := Compile(auth("a/b", namespace, allow, rules(
		&security.Match{DestinationPorts: []uint32{1}},
		&security.Match{NotDestinationIps: []*security.Address{{Address: []byte{10, 0, 0, 0}, Length: 33}}, Extensions: []*security.Extension{{Name: "x"}}})))
	if err != nil || len(p.Problems) != 2 {
		t.Fatalf("%v, %v", p.Problems, err)
	}
	if got, want := p.Problems[0].Error(), "policy a/b rule 2: not_destination_ips: prefix length 33 does not fit 10.0.0.0"; got != want {
		t.Errorf("problem %q, want %q", got, want)
	}
}

// naive decides by reading the wire messages one by one, as the facts say.
type naive struct {
	all map[string]*security.Authorization
}

func (n naive) authorize(ns string, refs []string, c Conn) Verdict {
	keys := map[string]bool{}
	for _, r := range refs {
		if n.all[r] == nil {
			return Verdict{why: unknownPolicy}
		}
		keys[r] = true
	}
	for key, a := range n.all {
		if a.GetScope() == global || a.GetScope() == namespace && a.GetNamespace() == ns {
			keys[key] = true
		}
	}
	first := func(action security.Action, dry bool) (string, int, int) {
		count := 0
		best, rule := "", 0
		for key := range keys {
			a := n.all[key]
			if a.GetAction() != action || a.GetDryRun() != dry {
				continue
			}
			count++
			for i, r := range a.GetRules() {
				if naiveRule(r, action, c) && (best == "" || key < best) {
					best, rule = key, i+1
					break
				}
			}
		}
		return best, rule, count
	}
	if key, rule, _ := first(deny, false); key != "" {
		return Verdict{Policy: key, Rule: rule}
	}
	key, rule, count := first(allow, false)
	v := Verdict{Allowed: count == 0 || key != "", Policy: key, Rule: rule, allows: count}
	if !v.Allowed {
		var sorted []string
		for key := range keys {
			if a := n.all[key]; a.GetAction() == allow && !a.GetDryRun() {
				sorted = append(sorted, key)
			}
		}
		slices.Sort(sorted)
		copy(v.names[:], sorted)
	}
	return v
}

func naiveRule(r *security.Rule, action security.Action, c Conn) bool {
	for _, cl := range r.GetClauses() {
		ok := false
		for _, m := range cl.GetMatches() {
			if proto.Size(m) > 0 && naiveMatch(m, action, c) {
				ok = true
			}
		}
		if !ok {
			return false
		}
	}
	return true
}

// naiveTerm: values say true, false, or that they are not understood.
func naiveTerm[T any](pos, neg []T, action security.Action, has func(T) (is, known bool)) bool {
	any := func(list []T, unknown bool) bool {
		for _, v := range list {
			if is, known := has(v); known && is || !known && unknown {
				return true
			}
		}
		return false
	}
	return (len(pos) == 0 || any(pos, action == deny)) && !any(neg, action == allow)
}

func naiveMatch(m *security.Match, action security.Action, c Conn) bool {
	str := func(s string, has bool, strip bool) func(*security.StringMatch) (bool, bool) {
		return func(sm *security.StringMatch) (bool, bool) {
			bare := func(v string) string {
				if strip {
					return strings.TrimPrefix(v, "spiffe://")
				}
				return v
			}
			switch v := sm.GetMatchType().(type) {
			case *security.StringMatch_Exact:
				return has && s == bare(v.Exact), true
			case *security.StringMatch_Prefix:
				return has && strings.HasPrefix(s, bare(v.Prefix)), true
			case *security.StringMatch_Suffix:
				return has && strings.HasSuffix(s, v.Suffix), true
			case *security.StringMatch_Presence:
				return has && s != "", true
			}
			return false, false
		}
	}
	in := func(a netip.Addr) func(*security.Address) (bool, bool) {
		a = a.Unmap()
		return func(in *security.Address) (bool, bool) {
			p, err := decodePrefix(in)
			return err == nil && p.Contains(a), err == nil
		}
	}
	peer := !c.Peer.IsZero()
	return naiveTerm(m.Principals, m.NotPrincipals, action, str(c.Peer.Principal(), peer, true)) &&
		naiveTerm(m.Namespaces, m.NotNamespaces, action, str(c.Peer.Namespace(), true, false)) &&
		naiveTerm(m.SourceIps, m.NotSourceIps, action, in(c.Src.Addr())) &&
		naiveTerm(m.DestinationIps, m.NotDestinationIps, action, in(c.Dst.Addr())) &&
		naiveTerm(m.DestinationPorts, m.NotDestinationPorts, action, func(p uint32) (bool, bool) { return p == uint32(c.Dst.Port()), p <= 65535 }) &&
		naiveTerm(m.ServiceAccounts, m.NotServiceAccounts, action, func(sa *security.ServiceAccountMatch) (bool, bool) {
			return peer && sa.GetNamespace() == c.Peer.Namespace() && sa.GetServiceAccount() == c.Peer.ServiceAccount(), true
		}) &&
		(len(m.Extensions) == 0 || action == deny)
}

// chooser draws from a small world in which rules and connections meet often.
type chooser struct{ next func(n int) int }

func (c chooser) str(of ...string) *security.StringMatch {
	s := of[c.next(len(of))]
	switch c.next(12) {
	case 0, 1:
		return prefix(s[:c.next(len(s)+1)])
	case 2, 3:
		return suffix(s[c.next(len(s)+1):])
	case 4:
		return presence()
	case 5:
		return &security.StringMatch{}
	}
	return exact(s)
}

func upTo[T any](c chooser, one func() T) (out []T) {
	n := c.next(4)
	if c.next(20) == 0 {
		n = few + 3
	}
	for range n {
		out = append(out, one())
	}
	return out
}

func (c chooser) match() *security.Match {
	principals := func() *security.StringMatch {
		return c.str(web.Principal(), cart.Principal(), other.Principal(), "spiffe://"+web.Principal())
	}
	namespaces := func() *security.StringMatch { return c.str("shop", "away", "shopping", "") }
	ips := func() *security.Address {
		all := []*security.Address{cidr("10.0.0.0/8"), cidr("10.0.0.1/32"), cidr("10.0.0.0/31"), cidr("0.0.0.0/0"), cidr("fd00::/64"), cidr("::ffff:10.0.0.2/128"),
			{Address: []byte{1}, Length: 3}, {Address: []byte{10, 0, 0, 0}, Length: 99}, cidr("::/0"), cidr("10.9.9.0/24")}
		return all[c.next(len(all))]
	}
	ports := func() uint32 { return []uint32{80, 81, 82, 0, 65536 + 80}[c.next(5)] }
	sas := func() *security.ServiceAccountMatch {
		return &security.ServiceAccountMatch{Namespace: []string{"shop", "away", ""}[c.next(3)], ServiceAccount: []string{"web", "cart", ""}[c.next(3)]}
	}
	m := &security.Match{}
	for range c.next(4) {
		switch c.next(12) {
		case 0:
			m.Principals = upTo(c, principals)
		case 1:
			m.NotPrincipals = upTo(c, principals)
		case 2:
			m.Namespaces = upTo(c, namespaces)
		case 3:
			m.NotNamespaces = upTo(c, namespaces)
		case 4:
			m.SourceIps = upTo(c, ips)
		case 5:
			m.NotSourceIps = upTo(c, ips)
		case 6:
			m.DestinationIps = upTo(c, ips)
		case 7:
			m.NotDestinationIps = upTo(c, ips)
		case 8:
			m.DestinationPorts = upTo(c, ports)
		case 9:
			m.NotDestinationPorts = upTo(c, ports)
		case 10:
			m.ServiceAccounts = upTo(c, sas)
		case 11:
			m.NotServiceAccounts = upTo(c, sas)
		}
	}
	return m
}

func (c chooser) authorization(i int) *security.Authorization {
	a := &security.Authorization{
		Namespace: []string{"shop", "away"}[c.next(2)], Name: fmt.Sprint("p", i),
		Scope: security.Scope(c.next(3)), Action: security.Action(c.next(2)), DryRun: c.next(8) == 0,
	}
	for range upTo(c, func() int { return 0 }) {
		r := &security.Rule{}
		for range c.next(4) {
			cl := &security.Clause{}
			for range c.next(3) + c.next(2) {
				cl.Matches = append(cl.Matches, c.match())
			}
			r.Clauses = append(r.Clauses, cl)
		}
		a.Rules = append(a.Rules, r)
	}
	return a
}

func (c chooser) conn() Conn {
	peers := []identity.ID{{}, web, cart, other}
	srcs := []string{"10.0.0.1", "10.0.0.2", "::ffff:10.0.0.1", "fd00::1", "192.0.2.1"}
	return conn(peers[c.next(4)], srcs[c.next(5)], []uint16{80, 81, 83, 0}[c.next(4)])
}

// compare runs a random history of policies and compares each decision.
func compare(t *testing.T, c chooser, steps int) {
	set, model := Empty(), naive{map[string]*security.Authorization{}}
	for range steps {
		txn := set.Edit()
		for range 1 + c.next(6) {
			a := c.authorization(c.next(12 + many))
			key := a.GetNamespace() + "/" + a.GetName()
			if c.next(4) == 0 {
				txn.Remove(key)
				delete(model.all, key)
			} else {
				txn.Put(a)
				model.all[key] = a
			}
		}
		set = txn.Commit()
		var refs []string
		for key := range model.all {
			refs = append(refs, key)
		}
		slices.Sort(refs)
		switch c.next(4) {
		case 0:
			refs = nil
		case 1:
			refs = refs[:min(len(refs), c.next(4))]
		}
		if c.next(10) == 0 {
			refs = append(refs, "shop/unknown")
		}
		if len(refs) >= many && c.next(2) == 0 {
			for range payback + 1 { // until the list is compiled
				set.Authorize("shop", refs, Conn{})
			}
		}
		for range 10 {
			cn := c.conn()
			got, want := set.Authorize("shop", refs, cn), model.authorize("shop", refs, cn)
			if got.Allowed != want.Allowed || got.Rule != want.Rule || want.why != unknownPolicy && got.Policy != want.Policy || got.allows != want.allows || got.names != want.names {
				t.Fatalf("%+v with %d refs: %+v %q, want %+v", cn, len(refs), got, got.Why(), want)
			}
		}
	}
}

func TestAuthorizeAgainstNaive(t *testing.T) {
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 1))
		compare(t, chooser{r.IntN}, 40)
	}
}

func FuzzAuthorize(f *testing.F) {
	f.Add([]byte("a small history of policies and connections"))
	f.Add(slices.Repeat([]byte{0, 7, 255, 3, 12, 99}, 100))
	f.Fuzz(func(t *testing.T, data []byte) {
		i := 0
		next := func(n int) int {
			if i >= len(data) {
				return 0
			}
			i++
			return int(data[i-1]) % n
		}
		compare(t, chooser{next}, 3)
	})
}

// FuzzCompile reads policies as they come from the network.
func FuzzCompile(f *testing.F) {
	r := rand.New(rand.NewPCG(5, 6))
	for i := range 10 {
		b, err := proto.Marshal(chooser{r.IntN}.authorization(i))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var a security.Authorization
		if proto.Unmarshal(b, &a) != nil {
			return
		}
		txn := Empty().Edit()
		for _, p := range txn.Put(&a) {
			if p.Error() == "" {
				t.Fatal("problem without a sentence")
			}
			if p.Rejected {
				return
			}
		}
		key := a.GetNamespace() + "/" + a.GetName()
		set, model := txn.Commit(), naive{map[string]*security.Authorization{key: &a}}
		for _, peer := range []identity.ID{{}, web, other} {
			c := conn(peer, "10.0.0.1", 80)
			got, want := set.Authorize("shop", []string{key}, c), model.authorize("shop", []string{key}, c)
			if got.Allowed != want.Allowed || got.Rule != want.Rule {
				t.Fatalf("%v: %+v, want %+v", &a, got, want)
			}
		}
	})
}

// large is n policies of ten rules each, none of which matches; with named it
// is a list of names instead of a namespace.
func large(tb testing.TB, n int, named bool) (*Set, []string) {
	txn := Empty().Edit()
	var refs []string
	for i := range n {
		scope, action := namespace, allow
		if named {
			scope = selector
		}
		if i%2 == 0 {
			action = deny
		}
		var ms []*security.Match
		for j := range 10 {
			m := &security.Match{DestinationPorts: []uint32{uint32(8000 + j)}}
			switch j % 5 {
			case 0:
				m.Principals = some(exact(fmt.Sprintf("cluster.local/ns/ns-%d/sa/sa-%d", i, j)))
			case 1:
				m.Namespaces = some(exact(fmt.Sprintf("ns-%d", i)))
			case 2:
				m.SourceIps = []*security.Address{{Address: []byte{172, byte(16 + j), byte(i >> 8), byte(i)}, Length: 32}}
			case 3:
				m.ServiceAccounts = []*security.ServiceAccountMatch{{Namespace: fmt.Sprintf("ns-%d", i), ServiceAccount: "x"}}
			case 4:
				m.Principals = some(suffix(fmt.Sprintf("/sa/sa-%d-%d", i, j)))
			}
			ms = append(ms, m)
		}
		key := fmt.Sprintf("shop/p%05d", i)
		txn.Put(auth(key, scope, action, rules(ms...)))
		if named {
			refs = append(refs, key)
		}
	}
	txn.Put(auth("shop/zz", namespace, allow, rules(&security.Match{Principals: some(exact(web.Principal()))})))
	return txn.Commit(), refs
}

func TestAuthorizeDoesNotAllocate(t *testing.T) {
	for _, n := range []int{3, 100} {
		for _, named := range []bool{false, true} {
			s, refs := large(t, n, named)
			for range payback + 1 { // until a long list is compiled
				s.Authorize("shop", refs, conn(web, "10.0.0.1", 8000))
			}
			for _, c := range []Conn{conn(web, "10.0.0.1", 8000), conn(identity.ID{}, "fd00::1", 1), conn(cart, "172.16.0.0", 8004)} {
				if got := testing.AllocsPerRun(100, func() { s.Authorize("shop", refs, c) }); got != 0 {
					t.Errorf("%d policies, named %v: %v allocations", n, named, got)
				}
			}
		}
	}
}

// A long list of named policies is compiled when that pays, not at the first
// connection: churn of policies or of lists must not make every connection pay.
func TestLongListsAreCompiledWhenItPays(t *testing.T) {
	s, refs := large(t, many, true)
	c := conn(web, "10.0.0.1", 8000)
	want := s.Authorize("shop", refs, c)
	compiledLists := func(s *Set) (n int) {
		for _, e := range s.memo.m {
			if e.compiled.Load() != nil {
				n++
			}
		}
		return n
	}
	for i := range 3 * payback {
		if got := s.Authorize("shop", refs, c); got != want {
			t.Fatalf("decision %d is %+v, want %+v", i, got, want)
		}
		if n := compiledLists(s); n > 0 && i < payback-1 || n == 0 && i > payback {
			t.Fatalf("after decision %d, %d lists are compiled", i, n)
		}
	}
	// Each change of a policy starts afresh, and so does each list.
	for i := range 10 {
		txn := s.Edit()
		txn.Put(auth(fmt.Sprintf("other/p%d", i), namespace, allow, nil))
		next := txn.Commit()
		for range payback / 2 {
			next.Authorize("shop", refs, c)
		}
		if n := compiledLists(next); n != 0 {
			t.Fatalf("churn of policies compiled %d lists", n)
		}
		s = next
	}
	for range 3 * maxMemo {
		s.Authorize("shop", slices.Clone(refs), c)
	}
	if n := len(s.memo.m); n > maxMemo || compiledLists(s) > 0 {
		t.Errorf("churn of lists: %d are kept, %d compiled", n, compiledLists(s))
	}
}

func TestCompiledListsAreBounded(t *testing.T) {
	_, refs := large(t, 5, true)
	var m memo
	for i := range 5 {
		key := memoKey{"shop", &refs[i], 1}
		e := &memoEntry{}
		m.add(key, e)
		m.count(key, e, maxMemoRules/2)
		if m.rules > maxMemoRules || m.m[key] != e {
			t.Fatalf("list %d: %d rules are kept", i, m.rules)
		}
	}
}

func BenchmarkAuthorize10kPoliciesx10Rules(b *testing.B) {
	for _, bb := range []struct {
		name  string
		n     int
		named bool
	}{{"namespace/10", 10, false}, {"namespace/10k", 10000, false}, {"named/10", 10, true}, {"named/10k", 10000, true}} {
		b.Run(bb.name, func(b *testing.B) {
			s, refs := large(b, bb.n, bb.named)
			c := conn(web, "172.16.0.1", 8002)
			for range payback + 1 {
				s.Authorize("shop", refs, c)
			}
			b.ReportAllocs()
			for b.Loop() {
				if !s.Authorize("shop", refs, c).Allowed && bb.n > 1 {
					b.Fatal("denied")
				}
			}
		})
	}
}

func BenchmarkChangeOneOf10kPolicies(b *testing.B) {
	s, _ := large(b, 10000, false)
	a := auth("shop/p00007", namespace, deny, rules(&security.Match{Principals: some(exact("cluster.local/ns/a/sa/b"))}))
	b.ReportAllocs()
	for b.Loop() {
		txn := s.Edit()
		txn.Put(a)
		txn.Commit()
	}
}
