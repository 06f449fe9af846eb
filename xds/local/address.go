package local

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ambit-mesh/ambit/xds/api/workload"
)

type localWorkload struct {
	UID                   string             `yaml:"uid"`
	Name                  string             `yaml:"name"`
	Namespace             string             `yaml:"namespace"`
	ServiceAccount        string             `yaml:"serviceAccount"`
	TrustDomain           string             `yaml:"trustDomain"`
	Network               string             `yaml:"network"`
	Node                  string             `yaml:"node"`
	WorkloadIPs           []netip.Addr       `yaml:"workloadIps"`
	Protocol              string             `yaml:"protocol"`
	NetworkMode           string             `yaml:"networkMode"`
	Hostname              string             `yaml:"hostname"`
	Waypoint              *gateway           `yaml:"waypoint"`
	NetworkGateway        *gateway           `yaml:"networkGateway"`
	ApplicationTunnel     *tunnel            `yaml:"applicationTunnel"`
	NativeTunnel          bool               `yaml:"nativeTunnel"`
	AuthorizationPolicies []string           `yaml:"authorizationPolicies"`
	Status                string             `yaml:"status"`
	ClusterID             string             `yaml:"clusterId"`
	Locality              locality           `yaml:"locality"`
	WorkloadName          string             `yaml:"workloadName"`
	WorkloadType          string             `yaml:"workloadType"`
	CanonicalName         string             `yaml:"canonicalName"`
	CanonicalRevision     string             `yaml:"canonicalRevision"`
	Capacity              *uint32            `yaml:"capacity"`
	Services              map[string]portMap `yaml:"services"`
}

type portMap map[uint16]uint16

func (p portMap) ports() []*workload.Port {
	out := make([]*workload.Port, 0, len(p))
	for _, port := range slices.Sorted(maps.Keys(p)) {
		out = append(out, &workload.Port{ServicePort: uint32(port), TargetPort: uint32(p[port])})
	}
	return out
}

type locality struct {
	Region  string `yaml:"region"`
	Zone    string `yaml:"zone"`
	Subzone string `yaml:"subzone"`
}

type tunnel struct {
	Protocol string `yaml:"protocol"`
	Port     uint16 `yaml:"port"`
}

type gateway struct {
	Destination   string `yaml:"destination"`
	HBONEMTLSPort uint16 `yaml:"hboneMtlsPort"`
}

func (g *gateway) message() (*workload.GatewayAddress, error) {
	if g == nil {
		return nil, nil
	}
	out := &workload.GatewayAddress{HboneMtlsPort: uint32(g.HBONEMTLSPort)}
	first, rest, ok := strings.Cut(g.Destination, "/")
	if !ok || rest == "" {
		return nil, fmt.Errorf("destination %q: want network/address or namespace/hostname", g.Destination)
	}
	if a, err := netip.ParseAddr(rest); err == nil {
		out.Destination = &workload.GatewayAddress_Address{Address: &workload.NetworkAddress{Network: first, Address: a.AsSlice()}}
	} else {
		out.Destination = &workload.GatewayAddress_Hostname{Hostname: &workload.NamespacedHostname{Namespace: first, Hostname: rest}}
	}
	return out, nil
}

// choice maps a word of the file, in any case; the empty one is the first.
func choice[T any](errs *[]error, field, word string, values map[string]T) T {
	v, ok := values[strings.ToLower(word)]
	if !ok {
		*errs = append(*errs, fmt.Errorf("%s %q: want one of %s", field, word,
			strings.Join(slices.DeleteFunc(slices.Sorted(maps.Keys(values)), func(s string) bool { return s == "" }), ", ")))
	}
	return v
}

func (w *localWorkload) message() (*workload.Workload, error) {
	var errs []error
	for _, f := range []struct{ key, value string }{
		{"uid", w.UID}, {"namespace", w.Namespace}, {"serviceAccount", w.ServiceAccount}, {"trustDomain", w.TrustDomain},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("%s is missing: it has no default in a file (trustDomain is cluster.local in most clusters)", f.key))
		}
	}
	if w.Services == nil {
		errs = append(errs, errors.New("services is missing; write `services: {}` for none"))
	}
	gw := func(field string, g *gateway) *workload.GatewayAddress {
		m, err := g.message()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", field, err))
		}
		return m
	}
	m := &workload.Workload{
		Uid: w.UID, Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, TrustDomain: w.TrustDomain,
		Network: w.Network, Node: w.Node, Hostname: w.Hostname, NativeTunnel: w.NativeTunnel, ClusterId: w.ClusterID,
		AuthorizationPolicies: w.AuthorizationPolicies, WorkloadName: w.WorkloadName, CanonicalName: w.CanonicalName,
		CanonicalRevision: w.CanonicalRevision, Waypoint: gw("waypoint", w.Waypoint), NetworkGateway: gw("networkGateway", w.NetworkGateway),
		Locality: &workload.Locality{Region: w.Locality.Region, Zone: w.Locality.Zone, Subzone: w.Locality.Subzone},
		Services: map[string]*workload.PortList{},
		TunnelProtocol: choice(&errs, "protocol", w.Protocol, map[string]workload.TunnelProtocol{
			"": 0, "tcp": workload.TunnelProtocol_NONE, "hbone": workload.TunnelProtocol_HBONE}),
		NetworkMode: choice(&errs, "networkMode", w.NetworkMode, map[string]workload.NetworkMode{
			"": 0, "standard": workload.NetworkMode_STANDARD, "hostnetwork": workload.NetworkMode_HOST_NETWORK}),
		Status: choice(&errs, "status", w.Status, map[string]workload.WorkloadStatus{
			"": 0, "healthy": workload.WorkloadStatus_HEALTHY, "unhealthy": workload.WorkloadStatus_UNHEALTHY}),
		WorkloadType: choice(&errs, "workloadType", w.WorkloadType, map[string]workload.WorkloadType{
			"": 0, "deployment": workload.WorkloadType_DEPLOYMENT, "cronjob": workload.WorkloadType_CRONJOB,
			"pod": workload.WorkloadType_POD, "job": workload.WorkloadType_JOB}),
	}
	for _, ip := range w.WorkloadIPs {
		m.Addresses = append(m.Addresses, ip.AsSlice())
	}
	if t := w.ApplicationTunnel; t != nil {
		m.ApplicationTunnel = &workload.ApplicationTunnel{Port: uint32(t.Port),
			Protocol: choice(&errs, "applicationTunnel.protocol", t.Protocol, map[string]workload.ApplicationTunnel_Protocol{
				"none": workload.ApplicationTunnel_NONE, "proxy": workload.ApplicationTunnel_PROXY})}
	}
	if w.Capacity != nil {
		m.Capacity = wrapperspb.UInt32(*w.Capacity)
	}
	for host, ports := range w.Services {
		if ns, name, ok := strings.Cut(host, "/"); !ok || ns == "" || name == "" {
			errs = append(errs, fmt.Errorf("services: %q is not namespace/hostname", host))
		}
		m.Services[host] = &workload.PortList{Ports: ports.ports()}
	}
	return m, errors.Join(errs...)
}

type localService struct {
	Name              string            `yaml:"name"`
	Namespace         string            `yaml:"namespace"`
	Hostname          string            `yaml:"hostname"`
	VIPs              []string          `yaml:"vips"`
	CIDRVIPs          []string          `yaml:"cidrVips"`
	Ports             portMap           `yaml:"ports"`
	SubjectAltNames   []string          `yaml:"subjectAltNames"`
	Waypoint          *gateway          `yaml:"waypoint"`
	WeightedWaypoints []weightedGateway `yaml:"weightedWaypoints"`
	LoadBalancer      *loadBalancer     `yaml:"loadBalancer"`
	IPFamilies        string            `yaml:"ipFamilies"`
	Canonical         bool              `yaml:"canonical"`
	Visibility        string            `yaml:"visibility"`
	Endpoints         map[string]any    `yaml:"endpoints"`
}

type weightedGateway struct {
	gateway `yaml:",inline"`
	Weight  uint32 `yaml:"weight"`
}

type loadBalancer struct {
	RoutingPreferences []string `yaml:"routingPreferences"`
	Mode               string   `yaml:"mode"`
	HealthPolicy       string   `yaml:"healthPolicy"`
}

func (s *localService) message() (*workload.Service, error) {
	var errs []error
	fail := func(field string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", field, err))
		}
	}
	if s.Namespace == "" || s.Hostname == "" {
		errs = append(errs, errors.New("namespace and hostname must be set"))
	}
	if len(s.Endpoints) > 0 {
		errs = append(errs, errors.New("endpoints: write the service into the `services` of its workloads instead"))
	}
	m := &workload.Service{
		Name: s.Name, Namespace: s.Namespace, Hostname: s.Hostname, Ports: s.Ports.ports(), SubjectAltNames: s.SubjectAltNames, Canonical: s.Canonical,
		IpFamilies: choice(&errs, "ipFamilies", s.IPFamilies, map[string]workload.IPFamilies{"": 0, "dual": workload.IPFamilies_DUAL,
			"ipv4": workload.IPFamilies_IPV4_ONLY, "ipv6": workload.IPFamilies_IPV6_ONLY}),
		Visibility: choice(&errs, "visibility", s.Visibility, map[string]workload.Service_Visibility{
			"": 0, "public": workload.Service_PUBLIC, "namespace": workload.Service_NAMESPACE}),
	}
	var err error
	m.Waypoint, err = s.Waypoint.message()
	fail("waypoint", err)
	for _, w := range s.WeightedWaypoints {
		g, err := w.message()
		fail("weightedWaypoints", err)
		m.WeightedWaypoints = append(m.WeightedWaypoints, &workload.WeightedWaypoint{Destination: g, Weight: w.Weight})
	}
	for _, v := range s.VIPs {
		network, addr, _ := strings.Cut(v, "/")
		a, err := netip.ParseAddr(addr)
		if err != nil {
			fail("vips", fmt.Errorf("%q: want network/address; the empty network is written /10.0.0.1", v))
			continue
		}
		m.Addresses = append(m.Addresses, &workload.NetworkAddress{Network: network, Address: a.AsSlice()})
	}
	for _, v := range s.CIDRVIPs {
		network, prefix, _ := strings.Cut(v, "/")
		p, err := netip.ParsePrefix(prefix)
		if err != nil {
			fail("cidrVips", fmt.Errorf("%q: want network/address/length", v))
			continue
		}
		length := uint32(p.Bits())
		m.Addresses = append(m.Addresses, &workload.NetworkAddress{Network: network, Address: p.Addr().AsSlice(), Length: &length})
	}
	if lb := s.LoadBalancer; lb != nil {
		m.LoadBalancing = lb.message(&errs)
	}
	return m, errors.Join(errs...)
}

func (lb *loadBalancer) message(errs *[]error) *workload.LoadBalancing {
	m := &workload.LoadBalancing{
		Mode: choice(errs, "loadBalancer.mode", lb.Mode, map[string]workload.LoadBalancing_Mode{"": 0, "standard": 0,
			"strict": workload.LoadBalancing_STRICT, "failover": workload.LoadBalancing_FAILOVER, "passthrough": workload.LoadBalancing_PASSTHROUGH}),
		HealthPolicy: choice(errs, "loadBalancer.healthPolicy", lb.HealthPolicy, map[string]workload.LoadBalancing_HealthPolicy{
			"": 0, "onlyhealthy": workload.LoadBalancing_ONLY_HEALTHY, "allowall": workload.LoadBalancing_ALLOW_ALL}),
	}
	for _, p := range lb.RoutingPreferences {
		m.RoutingPreference = append(m.RoutingPreference, choice(errs, "loadBalancer.routingPreferences", p, map[string]workload.LoadBalancing_Scope{
			"region": workload.LoadBalancing_REGION, "zone": workload.LoadBalancing_ZONE, "subzone": workload.LoadBalancing_SUBZONE,
			"node": workload.LoadBalancing_NODE, "cluster": workload.LoadBalancing_CLUSTER, "network": workload.LoadBalancing_NETWORK}))
	}
	return m
}
