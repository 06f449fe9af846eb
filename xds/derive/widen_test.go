package derive

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/xds/crd"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/policy"
)

// meaning evaluates a policy as written, taking every layer 7 term for http.
type meaning struct {
	peer identity.ID
	src  netip.Addr
	port string
	http bool
}

func wildcard(pattern, v string) bool {
	if v == "" { // no identity: nothing matches, not even "*"
		return false
	}
	head, tail, wild := strings.Cut(pattern, "*")
	return !wild && v == pattern || wild && len(v) >= len(pattern)-1 && strings.HasPrefix(v, head) && strings.HasSuffix(v, tail)
}

func (m meaning) lists(in, notIn []string, is func(string) bool) bool {
	return (len(in) == 0 || slices.ContainsFunc(in, is)) && !slices.ContainsFunc(notIn, is)
}

func (m meaning) source(s *crd.Source) bool {
	like := func(v string) func(string) bool { return func(p string) bool { return wildcard(p, v) } }
	return m.lists(s.Principals, s.NotPrincipals, like(m.peer.Principal())) &&
		m.lists(s.Namespaces, s.NotNamespaces, like(m.peer.Namespace())) &&
		m.lists(s.TrustDomains, s.NotTrustDomains, like(m.peer.TrustDomain())) &&
		m.lists(s.IPBlocks, s.NotIPBlocks, func(b string) bool { return netip.MustParsePrefix(b).Contains(m.src) }) &&
		(len(s.RequestPrincipals) == 0 || m.http)
}

func (m meaning) operation(o *crd.Operation) bool {
	return m.lists(o.Ports, o.NotPorts, func(p string) bool { return p == m.port }) &&
		(len(o.Methods) == 0 || m.http) && (len(o.NotMethods) == 0 || m.http)
}

func (m meaning) rule(r *crd.Rule) bool {
	return (len(r.From) == 0 || slices.ContainsFunc(r.From, func(f *crd.From) bool { return m.source(f.Source) })) &&
		(len(r.To) == 0 || slices.ContainsFunc(r.To, func(o *crd.To) bool { return m.operation(o.Operation) })) &&
		!slices.ContainsFunc(r.When, func(c *crd.Condition) bool {
			return !m.lists(c.Values, c.NotValues, func(td string) bool { return wildcard(td, m.peer.TrustDomain()) })
		})
}

func (m meaning) matches(p *crd.AuthorizationPolicy) bool {
	return slices.ContainsFunc(p.Spec.Rules, m.rule)
}

// TestTranslationNeverWidens compares random policies, as written and as proxies
// decide them: what is allowed must be allowed whatever layer 7 says, what could
// be denied must be denied, and without layer 7 terms both are the same.
func TestTranslationNeverWidens(t *testing.T) {
	peers := []identity.ID{{}}
	for _, td := range []string{"cluster.local", "a.example", "b.example"} {
		for _, ns := range []string{"x", "y"} {
			peers = append(peers, identity.MustParse("spiffe://"+td+"/ns/"+ns+"/sa/s"))
		}
	}
	set := &settings{trustDomain: "cluster.local", trustDomains: []string{"cluster.local"}, roots: []string{"root"}}
	rnd := rand.New(rand.NewPCG(1, 2))
	some := func(values ...string) []string {
		if rnd.IntN(3) > 0 {
			return nil
		}
		return values[rnd.IntN(len(values)):][:1]
	}
	domains := []string{"cluster.local", "a.example", "*.example", "a*", "*", "a.*e"}
	principals := []string{"*", "*/sa/s", "a.example/*", "cluster.local/ns/x/sa/s"}
	layer7 := 0
	for n := range 4000 {
		p := &crd.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p"}}
		p.Spec.Action = []crd.Action{crd.ActionAllow, crd.ActionDeny}[n%2]
		for range 1 + rnd.IntN(2) {
			r := &crd.Rule{}
			for range rnd.IntN(3) {
				r.From = append(r.From, &crd.From{Source: &crd.Source{
					Principals: some(principals...), NotPrincipals: some(principals...), RequestPrincipals: some("", "", "u"),
					Namespaces: some("x", "y*", "*"), NotNamespaces: some("x"), TrustDomains: some(domains...), NotTrustDomains: some(domains...),
					IPBlocks: some("10.0.0.0/8", "10.0.0.1/32"), NotIPBlocks: some("10.0.0.1/32"),
				}})
				if s := r.From[len(r.From)-1].Source; len(s.RequestPrincipals) > 0 && s.RequestPrincipals[0] == "" {
					s.RequestPrincipals = nil
				}
			}
			for range rnd.IntN(3) {
				r.To = append(r.To, &crd.To{Operation: &crd.Operation{Ports: some("80", "81"), NotPorts: some("80"), Methods: some("GET")}})
			}
			if rnd.IntN(3) == 0 {
				r.When = append(r.When, &crd.Condition{Key: crd.KeySourceTrustDomain, Values: some(domains...), NotValues: some(domains...)})
			}
			p.Spec.Rules = append(p.Spec.Rules, r)
		}
		if len(p.Validate()) > 0 {
			continue // such a policy never gets here
		}
		v := authorize(p, set)
		exact := len(v.notes) == 0
		if !exact {
			layer7++
		}
		txn := policy.Empty().Edit()
		if problems := txn.Put(v.authz); len(problems) > 0 {
			t.Fatalf("problems %v of %v", problems, v.authz)
		}
		decide := txn.Commit()
		for _, peer := range peers {
			for _, src := range []string{"10.0.0.1", "10.0.0.2", "192.0.2.1"} {
				for _, port := range []uint16{80, 81} {
					m := meaning{peer: peer, src: netip.MustParseAddr(src), port: map[uint16]string{80: "80", 81: "81"}[port]}
					verdict := decide.Authorize("n", nil, policy.Conn{Peer: peer, Src: netip.AddrPortFrom(m.src, 1), Dst: netip.AddrPortFrom(netip.MustParseAddr("10.9.9.9"), port)})
					matched := verdict.Allowed == (p.Spec.Action == crd.ActionAllow)
					never, ever := m.matches(p), meaning{m.peer, m.src, m.port, true}.matches(p)
					switch {
					case exact && matched != ever,
						p.Spec.Action == crd.ActionAllow && matched && !never,
						p.Spec.Action == crd.ActionDeny && !matched && ever:
						t.Fatalf("%s %s from %v:%d: matched %v, as written %v to %v\n%v\n%v", p.Spec.Action, peer, src, port, matched, never, ever, v.authz, v.notes)
					}
				}
			}
		}
	}
	if layer7 < 100 {
		t.Errorf("only %d policies needed layer 7", layer7)
	}
}
