package derive

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/crd"
)

const dryRunAnnotation = "istio.io/dry-run"

// ConditionAccepted says whether node proxies enforce a policy.
const ConditionAccepted = "ZtunnelAccepted"

// Reasons of conditions.
const (
	ReasonAccepted    = "Accepted"
	ReasonUnsupported = "UnsupportedValue"
	ReasonConflict    = "Conflict"
	ReasonAtWaypoint  = "EnforcedByWaypoint"
)

// verdict is a policy as node proxies get it, or why they do not.
type verdict struct {
	authz  *security.Authorization // nil: not sent
	reason string
	notes  []string // what differs from what was written, and how
}

// unsupported says that a part is not in force as written.
func (v *verdict) unsupported() {
	if v.reason == ReasonAccepted {
		v.reason = ReasonUnsupported
	}
}

// authorize translates an AuthorizationPolicy for layer 4.
//
// A rule is clauses ANDed (from, to, each when); a clause is matches ORed; the
// fields of a match are ANDed. What layer 4 cannot decide never widens a policy:
// in ALLOW the rule is dropped, in DENY the term is, and an alternative that
// loses all its terms matches everything.
func authorize(p *crd.AuthorizationPolicy, set *settings) verdict {
	action := p.Spec.Action
	switch {
	case action == crd.ActionAudit || action == crd.ActionCustom:
		return verdict{reason: ReasonUnsupported, notes: []string{fmt.Sprintf("action %s is not enforced at layer 4 and was not sent", action)}}
	case p.Spec.TargetRef != nil || len(p.Spec.TargetRefs) > 0:
		return verdict{reason: ReasonAtWaypoint, notes: []string{"targetRefs bind the policy to a waypoint: node proxies do not enforce it and this build configures no waypoints"}}
	}
	t := &translation{ns: p.Namespace, set: set, deny: action == crd.ActionDeny}
	a := &security.Authorization{Name: p.Name, Namespace: p.Namespace, Scope: scopeOf(p, set)}
	if t.deny {
		a.Action = security.Action_DENY
	}
	var extra []*security.Rule
	for i, r := range p.Spec.Rules {
		t.rule = i + 1
		rules := t.translate(r)
		a.Rules = append(a.Rules, rules[0])
		extra = append(extra, rules[1:]...)
	}
	// Alternatives that need a rule of their own come last, so that "rule 2" in a
	// log is the second rule of the file.
	a.Rules = append(a.Rules, extra...)
	v := verdict{authz: a, reason: ReasonAccepted, notes: t.notes}
	if len(t.notes) > 0 {
		v.unsupported()
	}
	if val, ok := p.Annotations[dryRunAnnotation]; ok {
		dry, err := strconv.ParseBool(val)
		a.DryRun = dry
		if err != nil {
			v.unsupported()
			v.notes = append(v.notes, fmt.Sprintf("annotation %s: %q is not true or false, the policy is enforced", dryRunAnnotation, val))
		}
	}
	return v
}

func scopeOf(p *crd.AuthorizationPolicy, set *settings) security.Scope {
	switch {
	case len(p.Spec.Selector.Labels()) > 0:
		return security.Scope_WORKLOAD_SELECTOR
	case set.isRoot(p.Namespace):
		return security.Scope_GLOBAL
	}
	return security.Scope_NAMESPACE
}

// translation is the state of translating one policy.
type translation struct {
	ns    string
	set   *settings
	deny  bool
	rule  int // 1-based, for notes
	notes []string
}

// never is what remains of a dropped rule: it matches nothing, in any reader of
// the format, and keeps the numbers of the rules after it.
func never() *security.Rule {
	any := []*security.StringMatch{present()}
	return &security.Rule{Clauses: []*security.Clause{{Matches: []*security.Match{{Principals: any, NotPrincipals: any}}}}}
}

// term is one match under construction with what layer 4 cannot decide in it.
type term struct {
	match *security.Match
	// and restricts further where one match cannot: both must hold.
	and    *security.Match
	cannot []string // field names
}

func (t *translation) translate(r *crd.Rule) []*security.Rule {
	var sources, operations []term
	for _, f := range r.From {
		sources = append(sources, t.source(f.Source))
	}
	for _, o := range r.To {
		operations = append(operations, operation(o.Operation))
	}
	var conditions []term
	for _, c := range r.When {
		conditions = append(conditions, t.condition(c))
	}
	cannot := unsupported(sources, operations, conditions)
	if len(cannot) > 0 && !t.deny {
		t.note("rule %d needs layer 7 (%s): it was dropped, so less is allowed than written", t.rule, strings.Join(cannot, ", "))
		return []*security.Rule{never()}
	}
	var common []*security.Clause
	common = appendClause(common, operations)
	for _, c := range conditions {
		common = appendClause(common, []term{c})
	}
	rules := split(sources, common)
	if len(cannot) > 0 {
		effect := "more is denied than written"
		if slices.ContainsFunc(rules, func(r *security.Rule) bool { return len(r.Clauses) == 0 }) {
			effect = "every connection is denied"
		}
		t.note("rule %d: layer 4 cannot decide %s: left out, so %s", t.rule, strings.Join(cannot, ", "), effect)
	}
	return rules
}

func (t *translation) note(format string, args ...any) {
	t.notes = append(t.notes, fmt.Sprintf(format, args...))
}

func unsupported(groups ...[]term) []string {
	var all []string
	for _, g := range groups {
		for _, tm := range g {
			all = append(all, tm.cannot...)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// split puts the sources in front of the other clauses. A source that needs two
// matches to hold at once gets a rule of its own, as rules are ORed.
func split(sources []term, common []*security.Clause) []*security.Rule {
	simple := slices.DeleteFunc(slices.Clone(sources), func(s term) bool { return s.and != nil })
	var rules []*security.Rule
	if len(simple) > 0 || len(sources) == 0 {
		rules = append(rules, &security.Rule{Clauses: append(appendClause(nil, simple), common...)})
	}
	for _, s := range sources {
		if s.and == nil {
			continue
		}
		clauses := appendClause(appendClause(nil, []term{{match: s.match}}), []term{{match: s.and}})
		rules = append(rules, &security.Rule{Clauses: append(clauses, common...)})
	}
	return rules
}

// appendClause adds alternatives as a clause. If one of them has no field left
// the clause holds always, so it is left out: readers of the format skip an empty
// match, and the clause would silently narrow to the others or match nothing.
func appendClause(clauses []*security.Clause, alternatives []term) []*security.Clause {
	if len(alternatives) == 0 {
		return clauses
	}
	c := &security.Clause{}
	for _, a := range alternatives {
		if emptyMatch(a.match) {
			return clauses
		}
		c.Matches = append(c.Matches, a.match)
	}
	return append(clauses, c)
}

func emptyMatch(m *security.Match) bool {
	return len(m.Namespaces)+len(m.NotNamespaces)+len(m.Principals)+len(m.NotPrincipals)+
		len(m.SourceIps)+len(m.NotSourceIps)+len(m.DestinationIps)+len(m.NotDestinationIps)+
		len(m.DestinationPorts)+len(m.NotDestinationPorts)+len(m.ServiceAccounts)+len(m.NotServiceAccounts) == 0
}

func (t *translation) source(s *crd.Source) term {
	m := &security.Match{
		Namespaces: matchAll(s.Namespaces), NotNamespaces: matchAll(s.NotNamespaces),
		Principals: t.principals(s.Principals), NotPrincipals: t.principals(s.NotPrincipals),
		ServiceAccounts: t.serviceAccounts(s.ServiceAccounts), NotServiceAccounts: t.serviceAccounts(s.NotServiceAccounts),
		SourceIps: blocks(s.IPBlocks), NotSourceIps: blocks(s.NotIPBlocks),
	}
	tm := term{match: m}
	tm.trustDomains(s.TrustDomains, s.NotTrustDomains, "trustDomains", "notTrustDomains")
	tm.http("requestPrincipals", s.RequestPrincipals)
	tm.http("notRequestPrincipals", s.NotRequestPrincipals)
	tm.http("remoteIpBlocks", s.RemoteIPBlocks)
	tm.http("notRemoteIpBlocks", s.NotRemoteIPBlocks)
	return tm
}

// http notes a field that only layer 7 can decide.
func (tm *term) http(name string, values []string) {
	if len(values) > 0 {
		tm.cannot = append(tm.cannot, name)
	}
}

// trustDomains adds the trust domain as the head of the principal.
func (tm *term) trustDomains(in, notIn []string, name, notName string) {
	if heads, ok := principalHeads(in); !ok {
		tm.cannot = append(tm.cannot, name)
	} else if len(heads) > 0 {
		if len(tm.match.Principals) > 0 {
			tm.and = &security.Match{Principals: heads}
		} else {
			tm.match.Principals = heads
		}
	}
	if heads, ok := principalHeads(notIn); !ok {
		tm.cannot = append(tm.cannot, notName)
	} else {
		tm.match.NotPrincipals = append(tm.match.NotPrincipals, heads...)
	}
}

// principalHeads turns trust domains into matches of a principal, which starts
// with its trust domain and a slash. A wildcard in front cannot be expressed.
func principalHeads(domains []string) ([]*security.StringMatch, bool) {
	var out []*security.StringMatch
	for _, d := range domains {
		head, wild := strings.CutSuffix(d, "*")
		switch {
		case strings.Contains(head, "*"):
			return nil, false
		case d == "*":
			out = append(out, present())
		case wild:
			out = append(out, prefix(head))
		default:
			out = append(out, prefix(d+"/"))
		}
	}
	return out, true
}

func operation(o *crd.Operation) term {
	tm := term{match: &security.Match{DestinationPorts: ports(o.Ports), NotDestinationPorts: ports(o.NotPorts)}}
	tm.http("hosts", o.Hosts)
	tm.http("notHosts", o.NotHosts)
	tm.http("methods", o.Methods)
	tm.http("notMethods", o.NotMethods)
	tm.http("paths", o.Paths)
	tm.http("notPaths", o.NotPaths)
	return tm
}

func (t *translation) condition(c *crd.Condition) term {
	m := &security.Match{}
	tm := term{match: m}
	switch c.Key {
	case crd.KeySourceIP:
		m.SourceIps, m.NotSourceIps = blocks(c.Values), blocks(c.NotValues)
	case crd.KeySourceNamespace:
		m.Namespaces, m.NotNamespaces = matchAll(c.Values), matchAll(c.NotValues)
	case crd.KeySourcePrincipal:
		m.Principals, m.NotPrincipals = t.principals(c.Values), t.principals(c.NotValues)
	case crd.KeySourceServiceAccount:
		m.ServiceAccounts, m.NotServiceAccounts = t.serviceAccounts(c.Values), t.serviceAccounts(c.NotValues)
	case crd.KeySourceTrustDomain:
		tm.trustDomains(c.Values, c.NotValues, c.Key, c.Key)
	case crd.KeyDestinationIP:
		m.DestinationIps, m.NotDestinationIps = blocks(c.Values), blocks(c.NotValues)
	case crd.KeyDestinationPort:
		m.DestinationPorts, m.NotDestinationPorts = ports(c.Values), ports(c.NotValues)
	default:
		tm.cannot = []string{c.Key}
	}
	return tm
}

// principals expands the mesh's trust domain to its aliases. cluster.local in a
// policy means the mesh's trust domain, whatever it is called.
func (t *translation) principals(values []string) []*security.StringMatch {
	var out []*security.StringMatch
	seen := set[string]{}
	add := func(v string) {
		if _, dup := seen[v]; !dup {
			seen[v] = struct{}{}
			out = append(out, match(v))
		}
	}
	for _, v := range values {
		td, rest, full := strings.Cut(v, "/")
		if !full || strings.Contains(td, "*") || (td != defaultTrustDomain && !slices.Contains(t.set.trustDomains, td)) {
			add(v)
			continue
		}
		for _, alias := range t.set.trustDomains {
			add(alias + "/" + rest)
		}
	}
	return out
}

func (t *translation) serviceAccounts(values []string) []*security.ServiceAccountMatch {
	var out []*security.ServiceAccountMatch
	for _, v := range values {
		ns, sa, full := strings.Cut(v, "/")
		if !full {
			ns, sa = t.ns, v
		}
		out = append(out, &security.ServiceAccountMatch{Namespace: ns, ServiceAccount: sa})
	}
	return out
}

func matchAll(values []string) []*security.StringMatch {
	var out []*security.StringMatch
	for _, v := range values {
		out = append(out, match(v))
	}
	return out
}

// match reads "*", "x*", "*x" and exact values.
func match(v string) *security.StringMatch {
	if v == "*" {
		return present()
	}
	if head, ok := strings.CutSuffix(v, "*"); ok {
		return prefix(head)
	}
	if tail, ok := strings.CutPrefix(v, "*"); ok {
		return &security.StringMatch{MatchType: &security.StringMatch_Suffix{Suffix: tail}}
	}
	return &security.StringMatch{MatchType: &security.StringMatch_Exact{Exact: v}}
}

func present() *security.StringMatch {
	return &security.StringMatch{MatchType: &security.StringMatch_Presence{Presence: &emptypb.Empty{}}}
}

func prefix(head string) *security.StringMatch {
	return &security.StringMatch{MatchType: &security.StringMatch_Prefix{Prefix: head}}
}

// blocks and ports read values that were validated when the object was decoded.
func blocks(values []string) []*security.Address {
	var out []*security.Address
	for _, v := range values {
		p, err := crd.ParseBlock(v)
		if err != nil {
			panic("BUG: an address block passed validation: " + err.Error())
		}
		out = append(out, &security.Address{Address: p.Addr().AsSlice(), Length: uint32(p.Bits())})
	}
	return out
}

func ports(values []string) []uint32 {
	var out []uint32
	for _, v := range values {
		p, err := crd.ParsePort(v)
		if err != nil {
			panic("BUG: a port passed validation: " + err.Error())
		}
		out = append(out, p)
	}
	return out
}
