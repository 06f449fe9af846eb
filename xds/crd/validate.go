package crd

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Limits of the Istio API.
const (
	maxTargetRefs      = 16
	maxServiceAccounts = 16
	maxPort            = 65535
)

// Validate implements Validator.
func (p *PeerAuthentication) Validate() []Fault {
	var fs faults
	ports := p.Spec.PortLevelMTLS
	if len(ports) > 0 && len(p.Spec.Selector.Labels()) == 0 {
		fs.add("spec.portLevelMtls", "add spec.selector.matchLabels", "needs a selector")
	}
	for _, port := range slices.Sorted(maps.Keys(ports)) {
		if port == 0 || port > maxPort {
			fs.add(fmt.Sprintf("spec.portLevelMtls[%d]", port), "use a port from 1 to 65535", "port %d is out of range", port)
		}
	}
	fs.selector("spec.selector", p.Spec.Selector)
	return fs
}

// Validate implements Validator.
func (p *AuthorizationPolicy) Validate() []Fault {
	var fs faults
	s := &p.Spec
	set := 0
	for _, b := range []bool{s.Selector != nil, s.TargetRef != nil, len(s.TargetRefs) > 0} {
		if b {
			set++
		}
	}
	if set > 1 {
		fs.add("spec", "keep one of them", "only one of selector, targetRef and targetRefs may be set")
	}
	fs.selector("spec.selector", s.Selector)
	fs.targets(p)
	switch {
	case s.Action == ActionCustom && (s.Provider == nil || s.Provider.Name == ""):
		fs.add("spec.provider", "name one of meshConfig.extensionProviders", "action CUSTOM needs provider.name")
	case s.Action != ActionCustom && s.Provider != nil:
		fs.add("spec.provider", "remove it or set action: CUSTOM", "provider is only for action CUSTOM")
	}
	if len(s.Rules) == 0 && (s.Action == ActionDeny || s.Action == ActionCustom || s.Action == ActionAudit) {
		fs.add("spec.rules", "write rules: [{}] to match everything", "action %s without rules would never match", s.Action)
	}
	for i, r := range s.Rules {
		fs.rule(fmt.Sprintf("spec.rules[%d]", i), r, s.Action)
	}
	return fs
}

// Validate implements Validator.
func (m *MeshConfig) Validate() []Fault {
	var fs faults
	if m.TrustDomain != "" {
		fs.trustDomainName("trustDomain", m.TrustDomain)
	}
	for i, td := range m.TrustDomainAliases {
		fs.trustDomainName(fmt.Sprintf("trustDomainAliases[%d]", i), td)
	}
	return fs
}

type faults []Fault

func (fs *faults) add(path, hint, format string, args ...any) {
	*fs = append(*fs, Fault{path, fmt.Sprintf(format, args...), hint})
}

func (fs *faults) selector(path string, s *Selector) {
	for _, k := range slices.Sorted(maps.Keys(s.Labels())) {
		v := s.MatchLabels[k]
		switch {
		case k == "":
			fs.add(path+".matchLabels", "", "a label name is empty")
		case strings.Contains(k, "*") || strings.Contains(v, "*"):
			fs.add(path+".matchLabels["+k+"]", "name the value exactly", "wildcards are not supported in label selectors")
		}
	}
}

func (fs *faults) trustDomainName(path, td string) {
	// SPIFFE-ID §2.1: lower case letters, digits, '.', '-' and '_'.
	bad := func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_')
	}
	if td == "" || len(td) > 255 || strings.ContainsFunc(td, bad) {
		fs.add(path, "use lower case letters, digits, '.', '-' and '_'", "%q is not a trust domain", td)
	}
}

var targetKinds = map[string]string{
	"Service":      "",
	"ServiceEntry": "networking.istio.io",
	"Gateway":      "gateway.networking.k8s.io",
	"GatewayClass": "gateway.networking.k8s.io",
}

func (fs *faults) targets(p *AuthorizationPolicy) {
	check := func(path string, t *TargetRef) {
		group, known := targetKinds[t.Kind]
		switch {
		case t.Kind == "" || t.Name == "":
			fs.add(path, "", "kind and name are required")
		case !known:
			fs.add(path+".kind", "valid are Service, ServiceEntry, Gateway, GatewayClass", "unsupported kind %q", t.Kind)
		case t.Group != group && !(t.Kind == "Service" && t.Group == "core"):
			fs.add(path+".group", fmt.Sprintf("%s has group %q", t.Kind, group), "unsupported group %q", t.Group)
		case t.Namespace != "" && t.Namespace != p.Namespace:
			fs.add(path+".namespace", "put the policy into the target's namespace", "a target in another namespace is not supported")
		}
	}
	if p.Spec.TargetRef != nil {
		check("spec.targetRef", p.Spec.TargetRef)
	}
	if len(p.Spec.TargetRefs) > maxTargetRefs {
		fs.add("spec.targetRefs", "", "%d targets, at most %d are allowed", len(p.Spec.TargetRefs), maxTargetRefs)
	}
	for i, t := range p.Spec.TargetRefs {
		check(fmt.Sprintf("spec.targetRefs[%d]", i), t)
	}
}

func (fs *faults) rule(path string, r *Rule, action Action) {
	if r.From != nil && len(r.From) == 0 {
		fs.add(path+".from", "remove it or add a source", "is empty")
	}
	for i, f := range r.From {
		at := fmt.Sprintf("%s.from[%d].source", path, i)
		if f.Source == nil || !f.Source.any() {
			fs.add(at, "set at least one field", "is empty")
			continue
		}
		fs.source(at, f.Source, action)
	}
	if r.To != nil && len(r.To) == 0 {
		fs.add(path+".to", "remove it or add an operation", "is empty")
	}
	for i, t := range r.To {
		at := fmt.Sprintf("%s.to[%d].operation", path, i)
		if t.Operation == nil || !t.Operation.any() {
			fs.add(at, "set at least one field", "is empty")
			continue
		}
		fs.operation(at, t.Operation)
	}
	for i, c := range r.When {
		fs.condition(fmt.Sprintf("%s.when[%d]", path, i), c, action)
	}
}

// list is a field of a source or an operation with its name.
type list struct {
	name   string
	values []string
}

func (s *Source) lists() []list {
	return []list{
		{"principals", s.Principals}, {"notPrincipals", s.NotPrincipals},
		{"requestPrincipals", s.RequestPrincipals}, {"notRequestPrincipals", s.NotRequestPrincipals},
		{"namespaces", s.Namespaces}, {"notNamespaces", s.NotNamespaces},
		{"serviceAccounts", s.ServiceAccounts}, {"notServiceAccounts", s.NotServiceAccounts},
		{"trustDomains", s.TrustDomains}, {"notTrustDomains", s.NotTrustDomains},
		{"ipBlocks", s.IPBlocks}, {"notIpBlocks", s.NotIPBlocks},
		{"remoteIpBlocks", s.RemoteIPBlocks}, {"notRemoteIpBlocks", s.NotRemoteIPBlocks},
	}
}

func (o *Operation) lists() []list {
	return []list{
		{"hosts", o.Hosts}, {"notHosts", o.NotHosts}, {"ports", o.Ports}, {"notPorts", o.NotPorts},
		{"methods", o.Methods}, {"notMethods", o.NotMethods}, {"paths", o.Paths}, {"notPaths", o.NotPaths},
	}
}

func anySet(ls []list) bool {
	return slices.ContainsFunc(ls, func(l list) bool { return len(l.values) > 0 })
}

func (s *Source) any() bool    { return anySet(s.lists()) }
func (o *Operation) any() bool { return anySet(o.lists()) }

// notEmpty reports lists that are set without values, and empty values: both
// would match nothing where the author meant something.
func (fs *faults) notEmpty(path string, ls []list) {
	for _, l := range ls {
		if l.values != nil && len(l.values) == 0 {
			fs.add(path+"."+l.name, "remove it or add a value", "is empty")
		}
		for i, v := range l.values {
			if v == "" {
				fs.add(fmt.Sprintf("%s.%s[%d]", path, l.name, i), "", "is empty")
			}
		}
	}
}

func (fs *faults) source(path string, s *Source, action Action) {
	fs.notEmpty(path, s.lists())
	if len(s.ServiceAccounts)+len(s.NotServiceAccounts) > 0 &&
		len(s.Principals)+len(s.NotPrincipals)+len(s.Namespaces)+len(s.NotNamespaces) > 0 {
		fs.add(path, "keep serviceAccounts, or principals and namespaces", "serviceAccounts cannot be combined with principals or namespaces")
	}
	fs.serviceAccounts(path+".serviceAccounts", s.ServiceAccounts)
	fs.serviceAccounts(path+".notServiceAccounts", s.NotServiceAccounts)
	fs.principals(path+".principals", s.Principals)
	fs.principals(path+".notPrincipals", s.NotPrincipals)
	fs.wildcards(path+".namespaces", s.Namespaces)
	fs.wildcards(path+".notNamespaces", s.NotNamespaces)
	fs.trustDomains(path+".trustDomains", s.TrustDomains)
	fs.trustDomains(path+".notTrustDomains", s.NotTrustDomains)
	fs.blocks(path+".ipBlocks", s.IPBlocks)
	fs.blocks(path+".notIpBlocks", s.NotIPBlocks)
	fs.blocks(path+".remoteIpBlocks", s.RemoteIPBlocks)
	fs.blocks(path+".notRemoteIpBlocks", s.NotRemoteIPBlocks)
	if action != ActionCustom {
		return
	}
	for _, l := range s.lists()[:10] {
		if len(l.values) > 0 {
			fs.add(path+"."+l.name, "", "is not supported with action CUSTOM")
		}
	}
}

func (fs *faults) operation(path string, o *Operation) {
	fs.notEmpty(path, o.lists())
	fs.ports(path+".ports", o.Ports)
	fs.ports(path+".notPorts", o.NotPorts)
	fs.paths(path+".paths", o.Paths)
	fs.paths(path+".notPaths", o.NotPaths)
}

func (fs *faults) serviceAccounts(path string, values []string) {
	if len(values) > maxServiceAccounts {
		fs.add(path, "use namespaces or several from entries", "%d service accounts, at most %d are allowed", len(values), maxServiceAccounts)
	}
	for i, v := range values {
		at := fmt.Sprintf("%s[%d]", path, i)
		ns, sa, both := strings.Cut(v, "/")
		switch {
		case strings.Contains(v, "*"):
			fs.add(at, "use principals for wildcards", "wildcards are not supported in %q", v)
		case both && (ns == "" || sa == "" || strings.Contains(sa, "/")):
			fs.add(at, "write namespace/name or name", "%q is not a service account", v)
		}
	}
}

func (fs *faults) principals(path string, values []string) {
	for i, v := range values {
		if strings.HasPrefix(v, "spiffe://") {
			fs.add(fmt.Sprintf("%s[%d]", path, i), fmt.Sprintf("write %q", strings.TrimPrefix(v, "spiffe://")), "a principal is written without spiffe://")
		}
	}
	fs.wildcards(path, values)
}

// wildcards accepts "*", "x*", "*x" and exact values.
func (fs *faults) wildcards(path string, values []string) {
	for i, v := range values {
		if inner := strings.TrimSuffix(strings.TrimPrefix(v, "*"), "*"); strings.Contains(inner, "*") || len(v)-len(inner) == 2 {
			fs.add(fmt.Sprintf("%s[%d]", path, i), "valid are *, prefix*, *suffix and exact values", "%q has a wildcard in an unsupported place", v)
		}
	}
}

func (fs *faults) trustDomains(path string, values []string) {
	for i, v := range values {
		if at := fmt.Sprintf("%s[%d]", path, i); strings.Count(v, "*") > 1 {
			fs.add(at, "use one *", "%q has more than one wildcard", v)
		} else if strings.Contains(v, "/") {
			fs.add(at, "name the trust domain only", "%q is not a trust domain", v)
		}
	}
}

func (fs *faults) blocks(path string, values []string) {
	for i, v := range values {
		if _, err := ParseBlock(v); err != nil {
			fs.add(fmt.Sprintf("%s[%d]", path, i), "examples are 10.0.0.0/8, 10.1.2.3, fd00::/8", "%q is not an IP address or CIDR", v)
		}
	}
}

// ParseBlock reads an address or a CIDR as a prefix with its host bits cleared.
func ParseBlock(v string) (netip.Prefix, error) {
	if strings.Contains(v, "/") {
		p, err := netip.ParsePrefix(v)
		if err != nil {
			return netip.Prefix{}, err
		}
		if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 { // ::ffff:10.0.0.0/104 is 10.0.0.0/8
			p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
		}
		return p.Masked(), nil
	}
	a, err := netip.ParseAddr(v)
	if err != nil {
		return netip.Prefix{}, err
	}
	if a.Zone() != "" {
		return netip.Prefix{}, fmt.Errorf("%q has a zone", v)
	}
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen()), nil
}

func (fs *faults) ports(path string, values []string) {
	for i, v := range values {
		if _, err := ParsePort(v); err != nil {
			fs.add(fmt.Sprintf("%s[%d]", path, i), "use a number from 0 to 65535", "%q is not a port", v)
		}
	}
}

// ParsePort reads a port of an operation or a condition.
func ParsePort(v string) (uint32, error) {
	p, err := strconv.ParseUint(v, 10, 16)
	return uint32(p), err
}

// paths checks path templates: {*} is a segment, {**} is the last one.
func (fs *faults) paths(path string, values []string) {
	for i, v := range values {
		if !strings.ContainsAny(v, "{}") {
			continue
		}
		segments := strings.Split(v, "/")
		for j, seg := range segments {
			if strings.ContainsAny(seg, "{}") && seg != "{*}" && !(seg == "{**}" && j == len(segments)-1) {
				fs.add(fmt.Sprintf("%s[%d]", path, i), "{*} is exactly one segment, {**} the last one", "%q is not a path template", v)
				break
			}
		}
	}
}

// Keys of conditions.
const (
	KeySourceIP             = "source.ip"
	KeySourceNamespace      = "source.namespace"
	KeySourcePrincipal      = "source.principal"
	KeySourceServiceAccount = "source.serviceAccount"
	KeySourceTrustDomain    = "source.trustDomain"
	KeyDestinationIP        = "destination.ip"
	KeyDestinationPort      = "destination.port"
)

var (
	plainKeys = []string{
		KeySourceIP, "remote.ip", KeySourceNamespace, KeySourceServiceAccount, KeySourceTrustDomain, KeySourcePrincipal,
		"request.auth.principal", "request.auth.audiences", "request.auth.presenter",
		KeyDestinationIP, KeyDestinationPort, "connection.sni",
	}
	bracketKeys = []string{"request.headers", "request.auth.claims", "experimental.envoy.filters."}
)

func (fs *faults) condition(path string, c *Condition, action Action) {
	if c.Key == "" {
		fs.add(path, "", "key is missing")
		return
	}
	if !knownKey(c.Key) {
		fs.add(path+".key", "valid are "+strings.Join(plainKeys, ", ")+", request.headers[name], request.auth.claims[name]", "unknown attribute %q", c.Key)
		return
	}
	if len(c.Values)+len(c.NotValues) == 0 {
		fs.add(path, "", "needs values or notValues")
	}
	fs.notEmpty(path, []list{{"values", c.Values}, {"notValues", c.NotValues}})
	for _, l := range []list{{"values", c.Values}, {"notValues", c.NotValues}} {
		at, values := path+"."+l.name, l.values
		switch c.Key {
		case KeySourceIP, KeyDestinationIP, "remote.ip":
			fs.blocks(at, values)
		case KeyDestinationPort:
			fs.ports(at, values)
		case KeySourcePrincipal:
			fs.principals(at, values)
		case KeySourceNamespace:
			fs.wildcards(at, values)
		case KeySourceServiceAccount:
			fs.serviceAccounts(at, values)
		case KeySourceTrustDomain:
			fs.trustDomains(at, values)
		}
	}
	if action == ActionCustom && (strings.HasPrefix(c.Key, "request.auth.") || slices.Contains([]string{KeySourceNamespace, KeySourcePrincipal, KeySourceServiceAccount, KeySourceTrustDomain}, c.Key)) {
		fs.add(path+".key", "", "attribute %q is not supported with action CUSTOM", c.Key)
	}
}

func knownKey(key string) bool {
	if slices.Contains(plainKeys, key) {
		return true
	}
	for _, b := range bracketKeys {
		if rest, ok := strings.CutPrefix(key, b); ok {
			open := strings.IndexByte(rest, '[')
			return open >= 0 && strings.HasSuffix(rest, "]") && len(rest) > open+2
		}
	}
	return false
}
