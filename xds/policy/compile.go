package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/ambit-mesh/ambit/xds/api/security"
)

// Compile checks and compiles a policy. Terms that cannot be understood are in
// Policy.Problems; a policy whose name, scope or action is unusable is an error.
func Compile(a *security.Authorization) (*Policy, error) {
	key := a.GetNamespace() + "/" + a.GetName()
	bad := func(field, format string, args ...any) error {
		return Problem{Policy: key, Field: field, Message: fmt.Sprintf(format, args...), Rejected: true}
	}
	p := &Policy{Key: key, Namespace: a.GetNamespace(), Name: a.GetName(), DryRun: a.GetDryRun(), Source: a}
	if p.Namespace == "" || p.Name == "" || strings.Contains(p.Namespace, "/") {
		return nil, bad("name", "namespace %q and name %q must not be empty or contain a slash", p.Namespace, p.Name)
	}
	switch a.GetScope() {
	case security.Scope_GLOBAL:
		p.Scope = Global
	case security.Scope_NAMESPACE:
		p.Scope = Namespace
	case security.Scope_WORKLOAD_SELECTOR:
		p.Scope = Selector
	default:
		return nil, bad("scope", "value %d is unknown to this version", a.GetScope())
	}
	switch a.GetAction() {
	case security.Action_ALLOW:
		p.Action = Allow
	case security.Action_DENY:
		p.Action = Deny
	default:
		return nil, bad("action", "value %d is unknown to this version", a.GetAction())
	}
	for i, r := range a.GetRules() {
		c := compiler{policy: p, rule: i + 1}
		p.rules = append(p.rules, c.compile(r))
		if p.DryRun {
			p.dry = append(p.dry, fmt.Sprintf("dry-run policy %s rule %d would %s", key, i+1, strings.ToLower(p.Action.String())))
		}
	}
	if len(p.rules) > few {
		p.own = newIndex()
		p.own.apply(nil, p.refs())
	}
	return p, nil
}

// compiler compiles one rule and notes what it could not understand.
type compiler struct {
	policy *Policy
	rule   int
}

func (c *compiler) problem(field, format string, args ...any) {
	c.policy.Problems = append(c.policy.Problems, Problem{
		Policy: c.policy.Key, Rule: c.rule, Field: field, Message: fmt.Sprintf(format, args...),
	})
}

func (c *compiler) compile(in *security.Rule) rule {
	var out rule
	for _, cl := range in.GetClauses() {
		var compiled clause
		for _, m := range cl.GetMatches() {
			if !isEmpty(m) {
				compiled.alternatives = append(compiled.alternatives, c.match(m))
			}
		}
		out.clauses = append(out.clauses, compiled)
	}
	return out
}

func isEmpty(m *security.Match) bool {
	return len(m.GetNamespaces())+len(m.GetNotNamespaces())+len(m.GetPrincipals())+len(m.GetNotPrincipals())+
		len(m.GetSourceIps())+len(m.GetNotSourceIps())+len(m.GetDestinationIps())+len(m.GetNotDestinationIps())+
		len(m.GetDestinationPorts())+len(m.GetNotDestinationPorts())+
		len(m.GetServiceAccounts())+len(m.GetNotServiceAccounts())+len(m.GetExtensions()) == 0
}

func (c *compiler) match(in *security.Match) match {
	var m match
	m.principals = c.strings(&m, "principals", in.GetPrincipals(), true)
	m.notPrincipals = c.strings(&m, "not_principals", in.GetNotPrincipals(), false)
	m.namespaces = c.strings(&m, "namespaces", in.GetNamespaces(), true)
	m.notNamespaces = c.strings(&m, "not_namespaces", in.GetNotNamespaces(), false)
	m.src = c.prefixes(&m, "source_ips", in.GetSourceIps(), true)
	m.notSrc = c.prefixes(&m, "not_source_ips", in.GetNotSourceIps(), false)
	m.dst = c.prefixes(&m, "destination_ips", in.GetDestinationIps(), true)
	m.notDst = c.prefixes(&m, "not_destination_ips", in.GetNotDestinationIps(), false)
	m.ports = c.ports(&m, "destination_ports", in.GetDestinationPorts(), true)
	m.notPorts = c.ports(&m, "not_destination_ports", in.GetNotDestinationPorts(), false)
	m.accounts = accounts(in.GetServiceAccounts())
	m.notAccounts = accounts(in.GetNotServiceAccounts())
	for _, e := range in.GetExtensions() {
		c.problem("extensions", "%q is unknown to this version", e.GetName())
		if c.policy.Action == Allow {
			m.never = true
		}
	}
	return m
}

// unknown decides about a term with a value that could not be understood; it
// reports whether the rest of the term still counts.
//
//	             term must match       term must not match
//	ALLOW        value matches nothing  match never matches
//	DENY         term always matches    value excludes nothing
func (c *compiler) unknown(m *match, positive bool) (keep bool) {
	switch {
	case c.policy.Action == Allow && !positive:
		m.never = true
	case c.policy.Action == Deny && positive:
		return false
	}
	return true
}

func (c *compiler) strings(m *match, field string, in []*security.StringMatch, positive bool) *stringTerm {
	if len(in) == 0 {
		return nil
	}
	principal := strings.HasSuffix(field, "principals")
	bare := func(s string) string {
		if principal {
			return strings.TrimPrefix(s, "spiffe://")
		}
		return s
	}
	t, keep := &stringTerm{}, true
	for _, sm := range in {
		switch v := sm.GetMatchType().(type) {
		case *security.StringMatch_Exact:
			t.exact = append(t.exact, bare(v.Exact))
		case *security.StringMatch_Prefix:
			t.prefix = append(t.prefix, bare(v.Prefix))
		case *security.StringMatch_Suffix:
			t.suffix = append(t.suffix, v.Suffix)
		case *security.StringMatch_Presence:
			t.presence = true
		default:
			c.problem(field, "kind of string match is unknown to this version")
			keep = c.unknown(m, positive) && keep
		}
	}
	if !keep {
		return nil
	}
	slices.Sort(t.exact)
	return t
}

func (c *compiler) prefixes(m *match, field string, in []*security.Address, positive bool) *prefixTerm {
	if len(in) == 0 {
		return nil
	}
	var list []netip.Prefix
	keep := true
	for _, a := range in {
		p, err := decodePrefix(a)
		if err != nil {
			c.problem(field, "%v", err)
			keep = c.unknown(m, positive) && keep
			continue
		}
		list = append(list, p)
	}
	if !keep {
		return nil
	}
	return newPrefixTerm(list)
}

func decodePrefix(in *security.Address) (netip.Prefix, error) {
	a, ok := netip.AddrFromSlice(in.GetAddress())
	if !ok {
		return netip.Prefix{}, fmt.Errorf("address of %d bytes is not 4 or 16 bytes", len(in.GetAddress()))
	}
	bits := int(min(in.GetLength(), 1000))
	if a.Is4In6() {
		bits -= 96 // ::ffff:a.b.c.d/n; a shorter one would be more than IPv4
	}
	p, err := a.Unmap().Prefix(bits)
	if err != nil {
		return p, fmt.Errorf("prefix length %d does not fit %s", in.GetLength(), a)
	}
	return p, nil
}

func (c *compiler) ports(m *match, field string, in []uint32, positive bool) *portTerm {
	if len(in) == 0 {
		return nil
	}
	t, keep := &portTerm{}, true
	for _, n := range in {
		if n > 65535 {
			c.problem(field, "port %d is larger than 65535", n)
			keep = c.unknown(m, positive) && keep
			continue
		}
		t.list = append(t.list, uint16(n))
	}
	if !keep {
		return nil
	}
	slices.Sort(t.list)
	return t
}

func accounts(in []*security.ServiceAccountMatch) *accountTerm {
	if len(in) == 0 {
		return nil
	}
	t := &accountTerm{}
	for _, a := range in {
		t.list = append(t.list, account{a.GetNamespace(), a.GetServiceAccount()})
	}
	slices.SortFunc(t.list, compareAccounts)
	return t
}
