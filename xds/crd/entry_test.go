package crd

import (
	"fmt"
	"strings"
	"testing"
)

func wantFault(t *testing.T, fs []Fault, want string) {
	t.Helper()
	var got []string
	for _, f := range fs {
		got = append(got, f.Path+": "+f.Message)
	}
	if want == "" && len(got) > 0 || want != "" && (len(got) != 1 || !strings.HasPrefix(got[0], want)) {
		t.Errorf("got %q, want one that starts with %q", got, want)
	}
}

func TestServiceEntryRules(t *testing.T) {
	http, tcp := &EntryPort{Number: 80, Name: "http", Protocol: "HTTP"}, &EntryPort{Number: 90, Name: "tcp", Protocol: "tcp"}
	tests := []struct {
		name string
		edit func(*ServiceEntrySpec)
		want string // start of the only fault, "" when valid
	}{
		{"plain", func(s *ServiceEntrySpec) {}, ""},
		{"hosts missing", func(s *ServiceEntrySpec) { s.Hosts = nil }, "spec.hosts: is missing"},
		{"host empty", func(s *ServiceEntrySpec) { s.Hosts = []string{""} }, "spec.hosts[0]: is empty"},
		{"every host", func(s *ServiceEntrySpec) { s.Hosts = []string{"*"} }, "spec.hosts[0]: * alone"},
		{"wildcard", func(s *ServiceEntrySpec) { s.Hosts = []string{"*.example.com"} }, ""},
		{"partial wildcard", func(s *ServiceEntrySpec) { s.Hosts = []string{"*-eu.example.com"} }, ""},
		{"wildcard inside", func(s *ServiceEntrySpec) { s.Hosts = []string{"a.*.com"} }, `spec.hosts[0]: "a.*.com" is not a host`},
		{"host with a port", func(s *ServiceEntrySpec) { s.Hosts = []string{"a.com:80"} }, `spec.hosts[0]: "a.com:80" is not a host`},
		{"host with a space", func(s *ServiceEntrySpec) { s.Hosts = []string{"a b.com"} }, `spec.hosts[0]: "a b.com" is not a host`},
		{"host too long", func(s *ServiceEntrySpec) { s.Hosts = []string{strings.Repeat("a.", 127) + "b"} }, `spec.hosts[0]: "a.a.`},
		{"address as host", func(s *ServiceEntrySpec) { s.Hosts = []string{"10.0.0.1"} }, `spec.hosts[0]: "10.0.0.1" is an address`},
		{"host twice", func(s *ServiceEntrySpec) { s.Hosts = []string{"A.com", "a.com."} }, `spec.hosts[1]: "a.com" is the same as spec.hosts[0]`},
		{"too many hosts", func(s *ServiceEntrySpec) {
			for i := range maxHosts {
				s.Hosts = append(s.Hosts, fmt.Sprintf("h%d.com", i))
			}
		}, "spec.hosts: 1001 hosts"},
		{"two hosts, a port that does not say which", func(s *ServiceEntrySpec) {
			s.Hosts = []string{"a.com", "b.com"}
			s.Ports = []*EntryPort{tcp}
		}, "spec.ports[0].protocol: a tcp connection"},
		{"two hosts without resolution", func(s *ServiceEntrySpec) {
			s.Hosts, s.Ports, s.Endpoints, s.Resolution = []string{"a.com", "b.com"}, []*EntryPort{tcp}, nil, ""
		}, ""},
		{"port 0", func(s *ServiceEntrySpec) { s.Ports = []*EntryPort{{Name: "a"}} }, "spec.ports[0].number: port 0"},
		{"port too high", func(s *ServiceEntrySpec) { s.Ports = []*EntryPort{{Name: "a", Number: 65536}} }, "spec.ports[0].number: port 65536"},
		{"port twice", func(s *ServiceEntrySpec) { s.Ports = []*EntryPort{http, {Name: "a", Number: 80}} }, "spec.ports[1].number: port 80 is in spec.ports[0] already"},
		{"port name twice", func(s *ServiceEntrySpec) { s.Ports = []*EntryPort{http, {Name: "http", Number: 81}} }, `spec.ports[1].name: "http" is the name of`},
		{"port without a name", func(s *ServiceEntrySpec) { s.Ports = []*EntryPort{{Number: 81}} }, "spec.ports[0].name: is missing"},
		{"port name", func(s *ServiceEntrySpec) { s.Ports = []*EntryPort{{Number: 81, Name: "A_b"}} }, `spec.ports[0].name: "A_b" is not`},
		{"target port", func(s *ServiceEntrySpec) { s.Ports = []*EntryPort{{Number: 81, Name: "a", TargetPort: 70000}} }, "spec.ports[0].targetPort: port 70000"},
		{"protocol", func(s *ServiceEntrySpec) { s.Ports = []*EntryPort{{Number: 81, Name: "a", Protocol: "HTTP3"}} }, `spec.ports[0].protocol: unknown protocol "HTTP3"`},
		{"address", func(s *ServiceEntrySpec) { s.Addresses = []string{"10.0.0.1", "10.0.0"} }, `spec.addresses[1]: "10.0.0" is not`},
		{"address twice", func(s *ServiceEntrySpec) { s.Addresses = []string{"10.0.0.1", "10.0.0.1/32"} }, `spec.addresses[1]: "10.0.0.1/32" is the same as spec.addresses[0]`},
		{"range", func(s *ServiceEntrySpec) { s.Addresses = []string{"10.0.0.0/8"} }, ""},
		{"range with DNS", func(s *ServiceEntrySpec) {
			s.Addresses, s.Resolution = []string{"10.0.0.0/8", "10.0.0.1/32"}, ResolutionDNS
		}, `spec.addresses[0]: resolution DNS cannot have the range "10.0.0.0/8"`},
		{"endpoints and selector", func(s *ServiceEntrySpec) { s.WorkloadSelector = &WorkloadSelector{} }, "spec.workloadSelector: endpoints and workloadSelector"},
		{"selector", func(s *ServiceEntrySpec) {
			s.Endpoints, s.WorkloadSelector = nil, &WorkloadSelector{Labels: map[string]string{"a": "b*"}}
		}, "spec.workloadSelector.labels[a]: wildcards"},
		{"endpoints without resolution", func(s *ServiceEntrySpec) { s.Resolution = ResolutionNone }, "spec.endpoints: resolution NONE"},
		{"name with STATIC", func(s *ServiceEntrySpec) { s.Endpoints[0].Address = "a.com" }, `spec.endpoints[0].address: "a.com" is not an address, as resolution STATIC needs`},
		{"name with DNS", func(s *ServiceEntrySpec) { s.Resolution, s.Endpoints[0].Address = ResolutionDNS, "a.com" }, ""},
		{"wildcard endpoint", func(s *ServiceEntrySpec) { s.Resolution, s.Endpoints[0].Address = ResolutionDNS, "*.a.com" }, `spec.endpoints[0].address: "*.a.com" is neither`},
		{"unix", func(s *ServiceEntrySpec) { s.Endpoints[0].Address = "unix:///a" }, `spec.endpoints[0].address: "unix:///a" is a unix socket`},
		{"no address", func(s *ServiceEntrySpec) { s.Endpoints[0].Address = "" }, "spec.endpoints[0].address: is missing"},
		{"a network", func(s *ServiceEntrySpec) { s.Endpoints[0] = &WorkloadEntrySpec{Network: "far"} }, ""},
		{"endpoint port", func(s *ServiceEntrySpec) { s.Endpoints[0].Ports = map[string]uint32{"http": 0} }, "spec.endpoints[0].ports[http]: port 0"},
		{"endpoint port of nothing", func(s *ServiceEntrySpec) { s.Endpoints[0].Ports = map[string]uint32{"htpp": 80} }, `spec.endpoints[0].ports[htpp]: spec.ports has no port "htpp"`},
		{"too many endpoints", func(s *ServiceEntrySpec) {
			for range maxEndpoints {
				s.Endpoints = append(s.Endpoints, s.Endpoints[0])
			}
		}, "spec.endpoints: 10001 endpoints"},
		{"hosts times ports", func(s *ServiceEntrySpec) {
			for i := range 999 {
				s.Hosts = append(s.Hosts, fmt.Sprintf("h%d.com", i))
			}
			s.Ports = append(s.Ports, &EntryPort{Number: 81, Name: "a"}, &EntryPort{Number: 82, Name: "b"})
		}, "spec.ports: 1000 hosts have 3000 ports"},
		{"hosts times endpoints", func(s *ServiceEntrySpec) {
			for i := range 99 {
				s.Hosts = append(s.Hosts, fmt.Sprintf("h%d.com", i))
			}
			for range 2000 {
				s.Endpoints = append(s.Endpoints, s.Endpoints[0])
			}
		}, "spec.endpoints: 2001 endpoints have 200100 ports"},
		{"too many addresses", func(s *ServiceEntrySpec) {
			for i := range maxAddresses + 1 {
				s.Addresses = append(s.Addresses, fmt.Sprintf("10.0.%d.%d", i>>8, i&255))
			}
		}, "spec.addresses: 1001 addresses"},
		{"hosts times addresses", func(s *ServiceEntrySpec) {
			for i := range 99 {
				s.Hosts = append(s.Hosts, fmt.Sprintf("h%d.com", i))
			}
			for i := range maxAddresses {
				s.Addresses = append(s.Addresses, fmt.Sprintf("10.0.%d.%d", i>>8, i&255))
			}
		}, "spec.addresses: 100 hosts have 100000 addresses"},
		{"hosts times names", func(s *ServiceEntrySpec) {
			for i := range 99 {
				s.Hosts = append(s.Hosts, fmt.Sprintf("h%d.com", i))
			}
			for i := range maxHostValues/100 + 1 {
				s.SubjectAltNames = append(s.SubjectAltNames, fmt.Sprintf("spiffe://a/ns/b/sa/c%d", i))
			}
		}, "spec.subjectAltNames: 100 hosts have 20100 names"},
		{"network", func(s *ServiceEntrySpec) { s.Endpoints[0].Network = "a/2" }, `spec.endpoints[0].network: "a/2" is not`},
		{"round robin", func(s *ServiceEntrySpec) {
			s.Resolution, s.Endpoints = ResolutionRoundRobin, []*WorkloadEntrySpec{{Address: "a.com"}, {Address: "b.com"}}
		}, "spec.endpoints: 2 endpoints"},
		{"wildcard resolves to nothing", func(s *ServiceEntrySpec) {
			s.Hosts, s.Endpoints, s.Resolution = []string{"*.a.com"}, nil, ResolutionDNS
		}, `spec.hosts[0]: "*.a.com" cannot be resolved`},
		{"dynamic", func(s *ServiceEntrySpec) {
			s.Hosts, s.Endpoints, s.Resolution = []string{"*.a.com"}, nil, ResolutionDynamic
		}, ""},
		{"dynamic with endpoints", func(s *ServiceEntrySpec) { s.Hosts, s.Resolution = []string{"*.a.com"}, ResolutionDynamic }, "spec.resolution: DYNAMIC_DNS has no endpoints"},
		{"dynamic with one host", func(s *ServiceEntrySpec) { s.Endpoints, s.Resolution = nil, ResolutionDynamic }, `spec.hosts[0]: "a.com" is one host`},
		{"dynamic TCP", func(s *ServiceEntrySpec) {
			s.Hosts, s.Endpoints, s.Resolution, s.Ports = []string{"*.a.com"}, nil, ResolutionDynamic, []*EntryPort{tcp}
		}, "spec.ports[0].protocol: a tcp connection"},
		{"export", func(s *ServiceEntrySpec) { s.ExportTo = []string{".", "other"} }, ""},
		{"export everywhere and more", func(s *ServiceEntrySpec) { s.ExportTo = []string{".", "*"} }, `spec.exportTo[1]: "*" cannot be combined`},
		{"export name", func(s *ServiceEntrySpec) { s.ExportTo = []string{"a b"} }, `spec.exportTo[0]: "a b" is not a namespace`},
		{"export twice", func(s *ServiceEntrySpec) { s.ExportTo = []string{".", "."} }, `spec.exportTo[1]: "." is the same`},
		{"san empty", func(s *ServiceEntrySpec) { s.SubjectAltNames = []string{""} }, "spec.subjectAltNames[0]: is empty"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := ServiceEntrySpec{
				Hosts: []string{"a.com"}, Resolution: ResolutionStatic,
				Ports:     []*EntryPort{{Number: 80, Name: "http", Protocol: "HTTP"}},
				Endpoints: []*WorkloadEntrySpec{{Address: "192.0.2.1"}},
			}
			tt.edit(&s)
			wantFault(t, (&ServiceEntry{Spec: s}).Validate(), tt.want)
		})
	}
}

func TestWorkloadEntryRules(t *testing.T) {
	tests := []struct {
		name string
		spec WorkloadEntrySpec
		want string
	}{
		{"address", WorkloadEntrySpec{Address: "10.0.0.1", Ports: map[string]uint32{"http": 80}, Locality: "a/b/c", Weight: 3, ServiceAccount: "sa"}, ""},
		{"IPv6", WorkloadEntrySpec{Address: "fd00::1"}, ""},
		{"name", WorkloadEntrySpec{Address: "VM.example.com."}, ""},
		{"nothing", WorkloadEntrySpec{}, "spec.address: is missing"},
		{"zone", WorkloadEntrySpec{Address: "fe80::1%eth0"}, `spec.address: "fe80::1%eth0" is neither`},
		{"CIDR", WorkloadEntrySpec{Address: "10.0.0.0/8"}, `spec.address: "10.0.0.0/8" is neither`},
		{"unix", WorkloadEntrySpec{Address: "unix:///a"}, `spec.address: "unix:///a" is a unix socket`},
		{"port name", WorkloadEntrySpec{Address: "10.0.0.1", Ports: map[string]uint32{"a_b": 1}}, `spec.ports[a_b]: "a_b" is not`},
		{"label", WorkloadEntrySpec{Address: "10.0.0.1", Labels: map[string]string{"a/b/c": "d"}}, `spec.labels[a/b/c]: "a/b/c" is not`},
		{"label value", WorkloadEntrySpec{Address: "10.0.0.1", Labels: map[string]string{"a": "b c"}}, `spec.labels[a]: "b c" is not`},
		{"locality", WorkloadEntrySpec{Address: "10.0.0.1", Locality: "a/b/c/d"}, `spec.locality: "a/b/c/d" is not`},
		{"network", WorkloadEntrySpec{Address: "10.0.0.1", Network: "a b"}, `spec.network: "a b" is not`},
		{"account", WorkloadEntrySpec{Address: "10.0.0.1", ServiceAccount: "spiffe://a/ns/b/sa/c"}, `spec.serviceAccount: "spiffe://a/ns/b/sa/c" is not`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantFault(t, (&WorkloadEntry{Spec: tt.spec}).Validate(), tt.want) })
	}
}

func TestWorkloadGroupRules(t *testing.T) {
	wantFault(t, (&WorkloadGroup{}).Validate(), "spec.template: is missing")
	wantFault(t, (&WorkloadGroup{Spec: WorkloadGroupSpec{Template: &WorkloadEntrySpec{Address: "10.0.0.1"}}}).Validate(), "spec.template.address: each workload")
	wantFault(t, (&WorkloadGroup{Spec: WorkloadGroupSpec{Template: &WorkloadEntrySpec{ServiceAccount: "sa"}}}).Validate(), "")
	bad := &GroupMetadata{Labels: map[string]string{"a": "b c"}}
	wantFault(t, (&WorkloadGroup{Spec: WorkloadGroupSpec{Metadata: bad, Template: &WorkloadEntrySpec{}}}).Validate(), "spec.metadata.labels[a]")
}
