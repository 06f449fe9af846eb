package crd

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

// Bounds of our own: each host and endpoint becomes a resource of every proxy, and
// each endpoint, also one that is selected, repeats every port of every host. They
// are arbitrary, far above what people write and below what an object of the
// largest size could hold.
const (
	maxHosts      = 1000
	maxEndpoints  = 10_000
	maxAddresses  = 1000
	maxHostPorts  = 2000    // hosts times ports
	maxHostValues = 20_000  // hosts times addresses, or times names of certificates
	maxServed     = 200_000 // hosts times ports times endpoints
)

// Validate implements Validator.
func (e *ServiceEntry) Validate() []Fault {
	var fs faults
	s := &e.Spec
	fs.hosts("spec.hosts", s)
	fs.entryPorts("spec.ports", s)
	fs.entryAddresses("spec.addresses", s)
	fs.exportTo("spec.exportTo", s.ExportTo)
	fs.distinct("spec.subjectAltNames", s.SubjectAltNames)
	if len(s.Addresses) > maxAddresses {
		fs.add("spec.addresses", "use ranges, or several objects", "%d addresses, at most %d are allowed", len(s.Addresses), maxAddresses)
	} else {
		fs.eachHost("spec.addresses", s, len(s.Addresses), "addresses")
	}
	fs.eachHost("spec.subjectAltNames", s, len(s.SubjectAltNames), "names")
	if len(s.Endpoints) > 0 && s.WorkloadSelector != nil {
		fs.add("spec.workloadSelector", "keep one of them", "endpoints and workloadSelector exclude each other")
	}
	if s.WorkloadSelector != nil {
		fs.labels("spec.workloadSelector.labels", s.WorkloadSelector.Labels)
	}
	fs.resolution(s)
	for i, ep := range s.Endpoints {
		at := fmt.Sprintf("spec.endpoints[%d]", i)
		fs.workload(at, ep)
		if s.EffectiveResolution() == ResolutionStatic && ep.Address != "" && !isUnix(ep.Address) && !isAddr(ep.Address) {
			fs.add(at+".address", "use an IP address, or resolution: DNS", "%q is not an address, as resolution STATIC needs", ep.Address)
		}
		for _, name := range slices.Sorted(maps.Keys(ep.Ports)) {
			if !slices.ContainsFunc(s.Ports, func(p *EntryPort) bool { return p.Name == name }) {
				fs.add(fmt.Sprintf("%s.ports[%s]", at, name), portNames(s.Ports), "spec.ports has no port %q", name)
			}
		}
	}
	if n := len(s.Hosts) * max(1, len(s.Ports)); len(s.Hosts) <= maxHosts && n > maxHostPorts {
		fs.add("spec.ports", "use several objects", "%d hosts have %d ports together, at most %d are allowed", len(s.Hosts), n, maxHostPorts)
	} else if len(s.Endpoints) <= maxEndpoints && n*len(s.Endpoints) > maxServed {
		fs.add("spec.endpoints", "use several objects", "%d endpoints have %d ports together for every host, at most %d are allowed", len(s.Endpoints), n*len(s.Endpoints), maxServed)
	}
	if len(s.Endpoints) > maxEndpoints {
		fs.add("spec.endpoints", "use WorkloadEntries and a workloadSelector", "%d endpoints, at most %d are allowed", len(s.Endpoints), maxEndpoints)
	}
	return fs
}

// eachHost bounds what every host repeats.
func (fs *faults) eachHost(path string, s *ServiceEntrySpec, n int, what string) {
	if all := len(s.Hosts) * n; len(s.Hosts) <= maxHosts && all > maxHostValues {
		fs.add(path, "use several objects", "%d hosts have %d %s together, at most %d are allowed", len(s.Hosts), all, what, maxHostValues)
	}
}

func portNames(ports []*EntryPort) string {
	if len(ports) == 0 {
		return "add it there"
	}
	var names []string
	for _, p := range ports {
		names = append(names, p.Name)
	}
	return "valid are " + strings.Join(names, ", ")
}

func (fs *faults) hosts(path string, s *ServiceEntrySpec) {
	if len(s.Hosts) == 0 {
		fs.add(path, "name at least one host", "is missing")
	}
	if len(s.Hosts) > maxHosts {
		fs.add(path, "use several objects", "%d hosts, at most %d are allowed", len(s.Hosts), maxHosts)
	}
	fs.distinct(path, s.HostNames())
	for i, h := range s.HostNames() {
		at := fmt.Sprintf("%s[%d]", path, i)
		switch {
		case h == "": // said by distinct
		case h == "*":
			fs.add(at, "write *.example.com", "* alone would stand for every host")
		case isAddr(h):
			fs.add(at, "put it into spec.addresses and name a host", "%q is an address", s.Hosts[i])
		case !isHost(h, true):
			fs.add(at, "examples are example.com and *.example.com", "%q is not a host name", s.Hosts[i])
		}
	}
}

// isHost accepts what DNS does (RFC 1123 labels), optionally with a wildcard as
// or at the start of the first label.
func isHost(h string, wildcard bool) bool {
	if len(h) > 253 {
		return false
	}
	for i, l := range strings.Split(h, ".") {
		if i == 0 && wildcard && strings.HasPrefix(l, "*") {
			if l == "*" {
				continue
			}
			l = strings.TrimPrefix(strings.TrimPrefix(l, "*"), "-")
		}
		if len(validation.IsDNS1123Label(l)) > 0 {
			return false
		}
	}
	return true
}

func isAddr(v string) bool {
	a, err := netip.ParseAddr(v)
	return err == nil && a.Zone() == ""
}

func isUnix(v string) bool { return strings.HasPrefix(v, "unix:") }

// protocols of ports as the Istio API spells them.
var protocols = []string{"HTTP", "HTTPS", "HTTP2", "GRPC", "GRPC-WEB", "TLS", "TCP", "MONGO", "MYSQL", "REDIS", "UDP"}

// sniffable reports whether the host can be told from the bytes of a connection.
func sniffable(protocol string) bool {
	switch strings.ToUpper(protocol) {
	case "HTTP", "HTTP2", "GRPC", "GRPC-WEB", "HTTPS", "TLS":
		return true
	}
	return false
}

func (fs *faults) entryPorts(path string, s *ServiceEntrySpec) {
	numbers, names := map[uint32]int{}, map[string]int{}
	for i, p := range s.Ports {
		at := fmt.Sprintf("%s[%d]", path, i)
		if p.Number == 0 || p.Number > maxPort {
			fs.add(at+".number", "use a port from 1 to 65535", "port %d is out of range", p.Number)
		} else if first, dup := numbers[p.Number]; dup {
			fs.add(at+".number", "", "port %d is in spec.ports[%d] already", p.Number, first)
		} else {
			numbers[p.Number] = i
		}
		switch first, dup := names[p.Name]; {
		case p.Name == "":
			fs.add(at+".name", "name it, for example "+strings.ToLower(cmp.Or(p.Protocol, "tcp")), "is missing")
		case dup:
			fs.add(at+".name", "", "%q is the name of spec.ports[%d] already", p.Name, first)
		case !isPortName(p.Name):
			fs.add(at+".name", "use letters, digits and '-'", "%q is not a port name", p.Name)
		default:
			names[p.Name] = i
		}
		if p.TargetPort > maxPort {
			fs.add(at+".targetPort", "use a port from 1 to 65535", "port %d is out of range", p.TargetPort)
		}
		if p.Protocol != "" && !slices.Contains(protocols, strings.ToUpper(p.Protocol)) {
			fs.add(at+".protocol", "valid are "+strings.Join(protocols, ", "), "unknown protocol %q", p.Protocol)
		}
		if len(s.Hosts) > 1 && s.EffectiveResolution() != ResolutionNone && p.Protocol != "" && !sniffable(p.Protocol) {
			fs.add(at+".protocol", "write one ServiceEntry per host", "a %s connection does not say which of the %d hosts is meant", p.Protocol, len(s.Hosts))
		}
	}
}

// isPortName accepts capitals too, as the Istio API does.
func isPortName(name string) bool { return len(validation.IsDNS1123Label(strings.ToLower(name))) == 0 }

func (fs *faults) entryAddresses(path string, s *ServiceEntrySpec) {
	seen := map[netip.Prefix]int{}
	for i, v := range s.Addresses {
		at := fmt.Sprintf("%s[%d]", path, i)
		p, err := ParseBlock(v)
		if err != nil {
			fs.add(at, "examples are 10.1.2.3, 10.0.0.0/8, fd00::1", "%q is not an IP address or CIDR", v)
			continue
		}
		if first, dup := seen[p]; dup {
			fs.add(at, "", "%q is the same as %s[%d]", v, path, first)
		} else {
			seen[p] = i
		}
		if r := s.EffectiveResolution(); !p.IsSingleIP() && r != ResolutionNone && r != ResolutionStatic {
			fs.add(at, "name single addresses, or use resolution NONE or STATIC", "resolution %s cannot have the range %q", r, v)
		}
	}
}

func (fs *faults) exportTo(path string, values []string) {
	fs.distinct(path, values)
	for i, v := range values {
		at := fmt.Sprintf("%s[%d]", path, i)
		switch {
		case v == "" || v == ".":
		case v == "*" || v == "~":
			if len(values) > 1 {
				fs.add(at, "keep it alone", "%q cannot be combined with other values", v)
			}
		case len(validation.IsDNS1123Label(v)) > 0:
			fs.add(at, "valid are ., *, ~ and names of namespaces", "%q is not a namespace", v)
		}
	}
}

// distinct reports empty and repeated values.
func (fs *faults) distinct(path string, values []string) {
	seen := map[string]int{}
	for i, v := range values {
		at := fmt.Sprintf("%s[%d]", path, i)
		if v == "" {
			fs.add(at, "", "is empty")
		} else if first, dup := seen[v]; dup {
			fs.add(at, "", "%q is the same as %s[%d]", v, path, first)
		} else {
			seen[v] = i
		}
	}
}

// resolution checks what each way of resolving needs and excludes.
func (fs *faults) resolution(s *ServiceEntrySpec) {
	r, n := s.EffectiveResolution(), len(s.Endpoints)
	wild := slices.IndexFunc(s.Hosts, Wildcard)
	switch r {
	case ResolutionNone:
		if n > 0 {
			fs.add("spec.endpoints", "remove them or set resolution: STATIC or DNS", "resolution NONE sends connections where the client aimed: endpoints are never used")
		}
	case ResolutionDNS, ResolutionRoundRobin:
		if n == 0 && s.WorkloadSelector == nil && wild >= 0 {
			fs.add(fmt.Sprintf("spec.hosts[%d]", wild), "name endpoints or the exact host", "%q cannot be resolved: without endpoints resolution %s resolves the host itself", s.Hosts[wild], r)
		}
		if r == ResolutionRoundRobin && n > 1 {
			fs.add("spec.endpoints", "use resolution: DNS", "%d endpoints, resolution DNS_ROUND_ROBIN takes at most one", n)
		}
	case ResolutionDynamic:
		if exact := slices.IndexFunc(s.Hosts, func(h string) bool { return !Wildcard(h) }); exact >= 0 {
			fs.add(fmt.Sprintf("spec.hosts[%d]", exact), "use resolution: DNS", "%q is one host: DYNAMIC_DNS is for wildcards", s.Hosts[exact])
		}
		for i, p := range s.Ports {
			if p.Protocol != "" && !sniffable(p.Protocol) {
				fs.add(fmt.Sprintf("spec.ports[%d].protocol", i), "valid are HTTP, HTTP2, GRPC, HTTPS, TLS", "a %s connection does not say which host is meant, as DYNAMIC_DNS needs", p.Protocol)
			}
		}
		if n > 0 || s.WorkloadSelector != nil || len(s.Addresses) > 0 {
			fs.add("spec.resolution", "remove them", "DYNAMIC_DNS has no endpoints, workloadSelector or addresses")
		}
	}
}

// Validate implements Validator.
func (w *WorkloadEntry) Validate() []Fault {
	var fs faults
	fs.workload("spec", &w.Spec)
	return fs
}

// Validate implements Validator.
func (g *WorkloadGroup) Validate() []Fault {
	var fs faults
	if m := g.Spec.Metadata; m != nil {
		fs.labels("spec.metadata.labels", m.Labels)
	}
	switch t := g.Spec.Template; {
	case t == nil:
		fs.add("spec.template", "", "is missing")
	case t.Address != "":
		fs.add("spec.template.address", "remove it", "each workload of the group brings its own address")
	default:
		fs.workloadFields("spec.template", t)
	}
	return fs
}

// workload checks a WorkloadEntry or an endpoint.
func (fs *faults) workload(path string, w *WorkloadEntrySpec) {
	at := path + ".address"
	switch {
	case w.Address == "":
		if w.Network == "" {
			fs.add(at, "use an IP address or a host name", "is missing")
		}
	case isUnix(w.Address):
		fs.add(at, "use an IP address and a port", "%q is a unix socket: node proxies reach endpoints by IP address only", w.Address)
	case !isAddr(w.Address) && !isHost(HostName(w.Address), false):
		fs.add(at, "examples are 10.1.2.3 and vm1.example.com", "%q is neither an IP address nor a host name", w.Address)
	}
	fs.workloadFields(path, w)
}

func (fs *faults) workloadFields(path string, w *WorkloadEntrySpec) {
	for _, name := range slices.Sorted(maps.Keys(w.Ports)) {
		at, port := fmt.Sprintf("%s.ports[%s]", path, name), w.Ports[name]
		if !isPortName(name) {
			fs.add(at, "use letters, digits and '-'", "%q is not a port name", name)
		}
		if port == 0 || port > maxPort {
			fs.add(at, "use a port from 1 to 65535", "port %d is out of range", port)
		}
	}
	fs.labels(path+".labels", w.Labels)
	if len(validation.IsValidLabelValue(w.Network)) > 0 { // it is one of a Gateway's, too
		fs.add(path+".network", "use letters, digits, '-', '_' and '.'", "%q is not the name of a network", w.Network)
	}
	if w.ServiceAccount != "" && len(validation.IsDNS1123Subdomain(w.ServiceAccount)) > 0 {
		fs.add(path+".serviceAccount", "name an account of this namespace", "%q is not a service account", w.ServiceAccount)
	}
	if n := strings.Count(w.Locality, "/"); n > 2 || strings.Contains(w.Locality, "*") {
		fs.add(path+".locality", "write region/zone/subzone", "%q is not a locality", w.Locality)
	}
}

func (fs *faults) labels(path string, labels map[string]string) {
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		at, v := path+"["+k+"]", labels[k]
		switch {
		case len(validation.IsQualifiedName(k)) > 0:
			fs.add(at, "", "%q is not the name of a label", k)
		case strings.Contains(v, "*"):
			fs.add(at, "name the value exactly", "wildcards are not supported")
		case len(validation.IsValidLabelValue(v)) > 0:
			fs.add(at, "use letters, digits, '-', '_' and '.'", "%q is not the value of a label", v)
		}
	}
}
