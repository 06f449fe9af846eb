package crd

import (
	"strings"
	"testing"
)

func TestAuthorizationPolicyRules(t *testing.T) {
	from := func(s Source) []*Rule { return []*Rule{{From: []*From{{Source: &s}}}} }
	to := func(o Operation) []*Rule { return []*Rule{{To: []*To{{Operation: &o}}}} }
	when := func(c Condition) []*Rule { return []*Rule{{When: []*Condition{&c}}} }
	tests := []struct {
		name string
		spec AuthorizationPolicySpec
		want string // start of the only fault, "" when valid
	}{
		{"allow nothing", AuthorizationPolicySpec{}, ""},
		{"match all", AuthorizationPolicySpec{Action: ActionDeny, Rules: []*Rule{{}}}, ""},
		{"deny without rules", AuthorizationPolicySpec{Action: ActionDeny}, "spec.rules: action DENY without rules"},
		{"selector and targets", AuthorizationPolicySpec{Selector: &Selector{}, TargetRef: &TargetRef{Kind: "Service", Name: "a"}}, "spec: only one of"},
		{"target kind", AuthorizationPolicySpec{TargetRefs: []*TargetRef{{Kind: "Pod", Name: "a"}}}, `spec.targetRefs[0].kind: unsupported kind "Pod"`},
		{"target group", AuthorizationPolicySpec{TargetRefs: []*TargetRef{{Kind: "Gateway", Name: "a"}}}, `spec.targetRefs[0].group: unsupported group ""`},
		{"target elsewhere", AuthorizationPolicySpec{TargetRefs: []*TargetRef{{Kind: "Service", Name: "a", Namespace: "b"}}}, "spec.targetRefs[0].namespace:"},
		{"custom without provider", AuthorizationPolicySpec{Action: ActionCustom, Rules: []*Rule{{}}}, "spec.provider: action CUSTOM needs"},
		{"provider without custom", AuthorizationPolicySpec{Provider: &ExternalProvider{Name: "x"}}, "spec.provider: provider is only for"},
		{"custom with principals", AuthorizationPolicySpec{Action: ActionCustom, Provider: &ExternalProvider{Name: "x"}, Rules: from(Source{Principals: []string{"a"}})}, "spec.rules[0].from[0].source.principals: is not supported with"},
		{"empty source", AuthorizationPolicySpec{Rules: from(Source{})}, "spec.rules[0].from[0].source: is empty"},
		{"empty from", AuthorizationPolicySpec{Rules: []*Rule{{From: []*From{}}}}, "spec.rules[0].from: is empty"},
		{"empty list", AuthorizationPolicySpec{Rules: from(Source{Namespaces: []string{"a"}, Principals: []string{}})}, "spec.rules[0].from[0].source.principals: is empty"},
		{"empty value", AuthorizationPolicySpec{Rules: from(Source{Namespaces: []string{""}})}, "spec.rules[0].from[0].source.namespaces[0]: is empty"},
		{"exclusive", AuthorizationPolicySpec{Rules: from(Source{ServiceAccounts: []string{"a"}, Namespaces: []string{"b"}})}, "spec.rules[0].from[0].source: serviceAccounts cannot be combined"},
		{"account wildcard", AuthorizationPolicySpec{Rules: from(Source{ServiceAccounts: []string{"a/*"}})}, "spec.rules[0].from[0].source.serviceAccounts[0]: wildcards"},
		{"account form", AuthorizationPolicySpec{Rules: from(Source{ServiceAccounts: []string{"a/b/c"}})}, `spec.rules[0].from[0].source.serviceAccounts[0]: "a/b/c" is not`},
		{"too many accounts", AuthorizationPolicySpec{Rules: from(Source{ServiceAccounts: strings.Fields(strings.Repeat("a ", 17))})}, "spec.rules[0].from[0].source.serviceAccounts: 17"},
		{"principal scheme", AuthorizationPolicySpec{Rules: from(Source{Principals: []string{"spiffe://td/ns/a/sa/b"}})}, "spec.rules[0].from[0].source.principals[0]: a principal is written without"},
		{"wildcards", AuthorizationPolicySpec{Rules: from(Source{Principals: []string{"*", "a*", "*a"}})}, ""},
		{"two wildcards", AuthorizationPolicySpec{Rules: from(Source{Principals: []string{"*a*"}})}, `spec.rules[0].from[0].source.principals[0]: "*a*"`},
		{"trust domain", AuthorizationPolicySpec{Rules: from(Source{TrustDomains: []string{"a*b*"}})}, "spec.rules[0].from[0].source.trustDomains[0]:"},
		{"block", AuthorizationPolicySpec{Rules: from(Source{NotIPBlocks: []string{"::ffff:10.0.0.0/104", "300.0.0.1"}})}, "spec.rules[0].from[0].source.notIpBlocks[1]:"},
		{"ports", AuthorizationPolicySpec{Rules: to(Operation{Ports: []string{"0", "65535", "65536"}})}, "spec.rules[0].to[0].operation.ports[2]:"},
		{"path templates", AuthorizationPolicySpec{Rules: to(Operation{Paths: []string{"/a/{*}/b", "/a/{**}", "/x*"}})}, ""},
		{"path template inside", AuthorizationPolicySpec{Rules: to(Operation{Paths: []string{"/{**}/b"}})}, "spec.rules[0].to[0].operation.paths[0]:"},
		{"unknown attribute", AuthorizationPolicySpec{Rules: when(Condition{Key: "source.port", Values: []string{"1"}})}, `spec.rules[0].when[0].key: unknown attribute "source.port"`},
		{"no values", AuthorizationPolicySpec{Rules: when(Condition{Key: "source.ip"})}, "spec.rules[0].when[0]: needs values"},
		{"claims", AuthorizationPolicySpec{Rules: when(Condition{Key: "request.auth.claims[a][b]", Values: []string{"1"}})}, ""},
		{"empty header", AuthorizationPolicySpec{Rules: when(Condition{Key: "request.headers[]", Values: []string{"1"}})}, "spec.rules[0].when[0].key: unknown attribute"},
		{"label wildcard", AuthorizationPolicySpec{Selector: &Selector{MatchLabels: map[string]string{"a": "b*"}}}, "spec.selector.matchLabels[a]: wildcards"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			fs := (&AuthorizationPolicy{Spec: tt.spec}).Validate()
			var got []string
			for _, f := range fs {
				got = append(got, f.Path+": "+f.Message)
			}
			if tt.want == "" && len(got) > 0 || tt.want != "" && (len(got) != 1 || !strings.HasPrefix(got[0], tt.want)) {
				t.Errorf("got %q, want one that starts with %q", got, tt.want)
			}
		})
	}
}

func TestPeerAuthenticationRules(t *testing.T) {
	ports := map[uint32]*MTLS{0: {Mode: ModeStrict}}
	fs := (&PeerAuthentication{Spec: PeerAuthenticationSpec{PortLevelMTLS: ports}}).Validate()
	if len(fs) != 2 {
		t.Errorf("got %v, want a fault for the selector and one for port 0", fs)
	}
}

func TestMeshConfigKeys(t *testing.T) {
	m := &MeshConfig{TrustDomain: "a.b", AccessLogFile: "/dev/stdout", EnableTracing: false}
	if got := strings.Join(m.Unenforced(), " "); got != "accessLogFile enableTracing" {
		t.Errorf("unenforced %q", got)
	}
	m = &MeshConfig{TrustDomain: "A", TrustDomainAliases: []string{"ok", ""}}
	if fs := m.Validate(); len(fs) != 2 {
		t.Errorf("faults %v, want two", fs)
	}
}

func TestParseBlock(t *testing.T) {
	for in, want := range map[string]string{
		"10.1.2.3": "10.1.2.3/32", "10.1.2.3/8": "10.0.0.0/8", "::ffff:10.1.2.3": "10.1.2.3/32",
		"::ffff:10.1.2.3/104": "10.0.0.0/8", "fd00::1": "fd00::1/128", "::/0": "::/0", "fe80::1%eth0": "", "": "", "10/8": "",
	} {
		p, err := ParseBlock(in)
		if got := p.String(); (err == nil) != (want != "") || err == nil && got != want {
			t.Errorf("%q: %v, %v, want %q", in, p, err, want)
		}
	}
}
