package local

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/ambit-mesh/ambit/xds/api/security"
)

type localPolicy struct {
	Name      string         `yaml:"name"`
	Namespace string         `yaml:"namespace"`
	Scope     string         `yaml:"scope"`
	Action    string         `yaml:"action"`
	DryRun    bool           `yaml:"dryRun"`
	Rules     [][][]rbacTerm `yaml:"rules"` // any rule, all its clauses, any match of a clause
}

type rbacTerm struct {
	Namespaces          []stringTerm  `yaml:"namespaces"`
	NotNamespaces       []stringTerm  `yaml:"notNamespaces"`
	ServiceAccounts     []accountTerm `yaml:"serviceAccounts"`
	NotServiceAccounts  []accountTerm `yaml:"notServiceAccounts"`
	Principals          []stringTerm  `yaml:"principals"`
	NotPrincipals       []stringTerm  `yaml:"notPrincipals"`
	SourceIPs           []string      `yaml:"sourceIps"`
	NotSourceIPs        []string      `yaml:"notSourceIps"`
	DestinationIPs      []string      `yaml:"destinationIps"`
	NotDestinationIPs   []string      `yaml:"notDestinationIps"`
	DestinationPorts    []uint16      `yaml:"destinationPorts"`
	NotDestinationPorts []uint16      `yaml:"notDestinationPorts"`
}

// stringTerm has exactly one key.
type stringTerm struct {
	Exact    *string `yaml:"Exact"`
	Prefix   *string `yaml:"Prefix"`
	Suffix   *string `yaml:"Suffix"`
	Presence *[]any  `yaml:"Presence"`
}

type accountTerm struct {
	Namespace      string `yaml:"namespace"`
	ServiceAccount string `yaml:"serviceAccount"`
}

func (p *localPolicy) message() (*security.Authorization, error) {
	var errs []error
	if p.Name == "" {
		errs = append(errs, errors.New("name is missing"))
	}
	m := &security.Authorization{
		Name: p.Name, Namespace: p.Namespace, DryRun: p.DryRun,
		Scope: choice(&errs, "scope", p.Scope, map[string]security.Scope{"global": security.Scope_GLOBAL,
			"namespace": security.Scope_NAMESPACE, "workloadselector": security.Scope_WORKLOAD_SELECTOR}),
		Action: choice(&errs, "action", p.Action, map[string]security.Action{"allow": security.Action_ALLOW, "deny": security.Action_DENY}),
	}
	for _, rule := range p.Rules {
		r := &security.Rule{}
		for _, clause := range rule {
			c := &security.Clause{}
			for i := range clause {
				match, err := clause[i].message()
				if err != nil {
					errs = append(errs, err)
				}
				c.Matches = append(c.Matches, match)
			}
			r.Clauses = append(r.Clauses, c)
		}
		m.Rules = append(m.Rules, r)
	}
	return m, errors.Join(errs...)
}

func (t *rbacTerm) message() (*security.Match, error) {
	var errs []error
	words := func(field string, in []stringTerm) (out []*security.StringMatch) {
		for _, s := range in {
			m, err := s.message()
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", field, err))
			}
			out = append(out, m)
		}
		return out
	}
	ranges := func(field string, in []string) (out []*security.Address) {
		for _, s := range in {
			p, err := parseRange(s)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", field, err))
				continue
			}
			out = append(out, &security.Address{Address: p.Addr().AsSlice(), Length: uint32(p.Bits())})
		}
		return out
	}
	m := &security.Match{
		Namespaces: words("namespaces", t.Namespaces), NotNamespaces: words("notNamespaces", t.NotNamespaces),
		Principals: words("principals", t.Principals), NotPrincipals: words("notPrincipals", t.NotPrincipals),
		SourceIps: ranges("sourceIps", t.SourceIPs), NotSourceIps: ranges("notSourceIps", t.NotSourceIPs),
		DestinationIps: ranges("destinationIps", t.DestinationIPs), NotDestinationIps: ranges("notDestinationIps", t.NotDestinationIPs),
		DestinationPorts: widen(t.DestinationPorts), NotDestinationPorts: widen(t.NotDestinationPorts),
		ServiceAccounts: accounts(t.ServiceAccounts), NotServiceAccounts: accounts(t.NotServiceAccounts),
	}
	return m, errors.Join(errs...)
}

func (s stringTerm) message() (*security.StringMatch, error) {
	var out *security.StringMatch
	n := 0
	set := func(is bool, m func() *security.StringMatch) {
		if is {
			n++
			out = m()
		}
	}
	set(s.Exact != nil, func() *security.StringMatch {
		return &security.StringMatch{MatchType: &security.StringMatch_Exact{Exact: *s.Exact}}
	})
	set(s.Prefix != nil, func() *security.StringMatch {
		return &security.StringMatch{MatchType: &security.StringMatch_Prefix{Prefix: *s.Prefix}}
	})
	set(s.Suffix != nil, func() *security.StringMatch {
		return &security.StringMatch{MatchType: &security.StringMatch_Suffix{Suffix: *s.Suffix}}
	})
	set(s.Presence != nil, func() *security.StringMatch {
		return &security.StringMatch{MatchType: &security.StringMatch_Presence{Presence: &emptypb.Empty{}}}
	})
	if n != 1 {
		return nil, errors.New("want exactly one of Exact, Prefix, Suffix, Presence: []")
	}
	return out, nil
}

// parseRange takes a CIDR, or one address.
func parseRange(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return netip.Prefix{}, err
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	return netip.ParsePrefix(s)
}

func widen(in []uint16) (out []uint32) {
	for _, p := range in {
		out = append(out, uint32(p))
	}
	return out
}

func accounts(in []accountTerm) (out []*security.ServiceAccountMatch) {
	for _, a := range in {
		out = append(out, &security.ServiceAccountMatch{Namespace: a.Namespace, ServiceAccount: a.ServiceAccount})
	}
	return out
}
