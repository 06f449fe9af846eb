package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unique"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// What an empty field means on the wire.
const (
	defaultTrustDomain    = "cluster.local"
	defaultServiceAccount = "default"
	defaultClusterID      = "Kubernetes"
)

// decoder collects the first error of a resource, so that decoding reads as
// a list of fields.
type decoder struct{ err error }

func (d *decoder) fail(field string, err error) {
	if d.err == nil {
		d.err = fmt.Errorf("%s: %w", field, err)
	}
}

// enumValue is an enumeration of the wire protocol.
type enumValue interface {
	protoreflect.Enum
	~int32
}

// enum refuses values that this build does not know: acting on half of a
// resource could send traffic in the clear.
func enum[E enumValue](d *decoder, field string, v E) E {
	if v.Descriptor().Values().ByNumber(v.Number()) == nil {
		d.fail(field, fmt.Errorf("value %d is unknown to this version", v.Number()))
	}
	return v
}

func (d *decoder) port(field string, v uint32) uint16 {
	if v > 65535 {
		d.fail(field, fmt.Errorf("port %d is larger than 65535", v))
	}
	return uint16(v)
}

func (d *decoder) addr(field string, b []byte) netip.Addr {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		d.fail(field, fmt.Errorf("address of %d bytes %w", len(b), errAddrLen))
	}
	return a.Unmap()
}

func (d *decoder) ports(field string, in []*workload.Port) []Port {
	if len(in) == 0 {
		return nil
	}
	out := make([]Port, 0, len(in))
	for _, p := range in {
		out = append(out, Port{
			Service: d.port(field+".service_port", p.GetServicePort()),
			Target:  d.port(field+".target_port", p.GetTargetPort()),
			App:     enum(d, field+".app_protocol", p.GetAppProtocol()),
		})
	}
	return out
}

func (d *decoder) gateway(field string, in *workload.GatewayAddress) *GatewayAddress {
	if in == nil {
		return nil
	}
	g := &GatewayAddress{HBONEPort: d.port(field+".hbone_mtls_port", in.GetHboneMtlsPort())}
	switch to := in.GetDestination().(type) {
	case *workload.GatewayAddress_Hostname:
		g.Host = Hostname{intern(to.Hostname.GetNamespace()), intern(to.Hostname.GetHostname())}
		if g.Host.Namespace == "" || g.Host.Name == "" {
			d.fail(field, fmt.Errorf("hostname %q has an empty part", g.Host))
		}
	case *workload.GatewayAddress_Address:
		g.Network = intern(to.Address.GetNetwork())
		g.Addr = d.addr(field+".address", to.Address.GetAddress())
	default:
		d.fail(field, fmt.Errorf("has no destination that this version knows"))
	}
	return g
}

func (d *decoder) extensions(in []*workload.Extension) []Extension {
	var out []Extension
	for _, e := range in {
		out = append(out, Extension{e.GetName(), e.GetConfig().GetTypeUrl(), e.GetConfig().GetValue()})
	}
	return out
}

// intern shares the strings that thousands of workloads have in common.
func intern(s string) string {
	if s == "" {
		return ""
	}
	return unique.Make(s).Value()
}

func either(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// DecodeWorkload checks a workload and fills in the defaults of the wire
// format. The error names the field.
func DecodeWorkload(in *workload.Workload) (*Workload, error) {
	var d decoder
	of := &withAddr{Workload: Workload{UID: in.GetUid(), Name: in.GetName(), Node: intern(in.GetNode()), WorkloadName: intern(in.GetWorkloadName())}}
	w := &of.Workload
	w.Adopt(w.UID)
	w.Traits = &Traits{
		Namespace:         intern(in.GetNamespace()),
		ServiceAccount:    intern(either(in.GetServiceAccount(), defaultServiceAccount)),
		TrustDomain:       intern(either(in.GetTrustDomain(), defaultTrustDomain)),
		Network:           intern(in.GetNetwork()),
		ClusterID:         intern(either(in.GetClusterId(), defaultClusterID)),
		Hostname:          in.GetHostname(),
		Tunnel:            enum(&d, "tunnel_protocol", in.GetTunnelProtocol()),
		NativeTunnel:      in.GetNativeTunnel(),
		NetworkMode:       enum(&d, "network_mode", in.GetNetworkMode()),
		CanonicalName:     intern(in.GetCanonicalName()),
		CanonicalRevision: intern(in.GetCanonicalRevision()),
		WorkloadType:      enum(&d, "workload_type", in.GetWorkloadType()),
		Healthy:           enum(&d, "status", in.GetStatus()) == workload.WorkloadStatus_HEALTHY,
		Capacity:          1,
		Waypoint:          d.gateway("waypoint", in.GetWaypoint()),
		NetworkGateway:    d.gateway("network_gateway", in.GetNetworkGateway()),
	}
	if w.UID == "" {
		d.fail("uid", fmt.Errorf("is empty"))
	}
	if w.Tunnel == workload.TunnelProtocol_LEGACY_ISTIO_MTLS {
		d.fail("tunnel_protocol", fmt.Errorf("LEGACY_ISTIO_MTLS is not spoken by node proxies; use HBONE or NONE"))
	}
	if c := in.GetCapacity(); c != nil {
		w.Capacity = c.GetValue()
	}
	for _, b := range in.GetAddresses() {
		of.add(d.addr("addresses", b))
	}
	if l := in.GetLocality(); l != nil {
		w.Locality = Locality{intern(l.GetRegion()), intern(l.GetZone()), intern(l.GetSubzone())}
	}
	for _, p := range in.GetAuthorizationPolicies() {
		w.Policies = append(w.Policies, intern(p))
	}
	slices.Sort(w.Policies)
	w.Policies = slices.Compact(w.Policies)
	if t := in.GetApplicationTunnel(); t != nil {
		w.AppTunnel = &ApplicationTunnel{
			Protocol: enum(&d, "application_tunnel.protocol", t.GetProtocol()),
			Port:     d.port("application_tunnel.port", t.GetPort()),
		}
	}
	if len(in.GetServices()) > 0 {
		w.Services = make(map[Hostname][]Port, len(in.GetServices()))
	}
	for key, list := range in.GetServices() {
		host, err := ParseHostname(key)
		if err != nil {
			d.fail("services", err)
			continue
		}
		host = Hostname{intern(host.Namespace), intern(host.Name)}
		w.Services[host] = d.ports("services["+key+"]", list.GetPorts())
	}
	d.identity(w)
	d.own(w, in.GetExtensions())
	if d.err != nil {
		return nil, fmt.Errorf("workload %q: %w", w.UID, d.err)
	}
	return w, nil
}

// own reads Ambit's extension. Values of a later version count as the default.
func (d *decoder) own(w *Workload, in []*workload.Extension) {
	for _, e := range in {
		if e.GetName() != api.WorkloadExtension || e.GetConfig().GetTypeUrl() != api.WorkloadExtensionType {
			continue
		}
		var x ambit.WorkloadExtension
		if err := proto.Unmarshal(e.GetConfig().GetValue(), &x); err != nil {
			d.fail("extensions["+e.GetName()+"]", err)
			return
		}
		w.SameNode, w.AccessLog, w.Terminating = x.GetSameNode(), x.GetAccessLog(), x.GetTerminating()
		w.StrictBy = intern(x.GetStrictBy())
		for _, n := range x.GetDnsNames() {
			w.DNSNames = append(w.DNSNames, strings.ToLower(strings.TrimSuffix(n, ".")))
		}
	}
}

// identity: a workload outside any namespace (a bare address of another
// system) has none; otherwise its parts must make a SPIFFE ID.
func (d *decoder) identity(w *Workload) {
	if w.Namespace == "" {
		return
	}
	id, err := identity.New(w.TrustDomain, w.Namespace, w.ServiceAccount)
	if err != nil {
		d.fail("service_account", err)
	}
	w.Identity = id
}

// DecodeService checks a service. The error names the field.
func DecodeService(in *workload.Service) (*Service, error) {
	var d decoder
	lb := in.GetLoadBalancing()
	s := &Service{
		Name:               in.GetName(),
		Namespace:          intern(in.GetNamespace()),
		Host:               Hostname{intern(in.GetNamespace()), intern(in.GetHostname())},
		Ports:              d.ports("ports", in.GetPorts()),
		Waypoint:           d.gateway("waypoint", in.GetWaypoint()),
		IngressUseWaypoint: in.GetIngressUseWaypoint(),
		Mode:               enum(&d, "load_balancing.mode", lb.GetMode()),
		AllowUnhealthy:     enum(&d, "load_balancing.health_policy", lb.GetHealthPolicy()) == workload.LoadBalancing_ALLOW_ALL,
		Families:           enum(&d, "ip_families", in.GetIpFamilies()),
		Canonical:          in.GetCanonical(),
		Extensions:         d.extensions(in.GetExtensions()),
	}
	if s.Host.Namespace == "" || s.Host.Name == "" {
		d.fail("hostname", fmt.Errorf("namespace %q and hostname %q must not be empty", s.Host.Namespace, s.Host.Name))
	}
	// Later versions may know finer visibilities: the wire says PUBLIC then.
	if in.GetVisibility() == workload.Service_NAMESPACE {
		s.Visibility = workload.Service_NAMESPACE
	}
	for _, scope := range lb.GetRoutingPreference() {
		if enum(&d, "load_balancing.routing_preference", scope) == workload.LoadBalancing_UNSPECIFIED_SCOPE {
			d.fail("load_balancing.routing_preference", fmt.Errorf("scope is not specified"))
		}
		s.Preference = append(s.Preference, scope)
	}
	for _, a := range in.GetAddresses() {
		d.vip(s, a)
	}
	for _, uri := range in.GetSubjectAltNames() {
		// Other names, such as the DNS names of a server outside the mesh, are for
		// clients that verify certificates of the web. Leaving them out accepts less.
		if id, err := identity.Parse(uri); err == nil {
			s.SANs = append(s.SANs, id)
		}
	}
	for _, ww := range in.GetWeightedWaypoints() {
		g := d.gateway("weighted_waypoints.destination", ww.GetDestination())
		if g == nil {
			d.fail("weighted_waypoints.destination", fmt.Errorf("is missing"))
			continue
		}
		s.WeightedWaypoints = append(s.WeightedWaypoints, WeightedWaypoint{*g, ww.GetWeight()})
	}
	d.portNames(s)
	if d.err != nil {
		return nil, fmt.Errorf("service %q: %w", s.Host, d.err)
	}
	return s, nil
}

// vip sorts an address into single VIPs and ranges.
func (d *decoder) vip(s *Service, in *workload.NetworkAddress) {
	raw := in.GetAddress()
	a := d.addr("addresses", raw)
	if !a.IsValid() {
		return
	}
	network := intern(in.GetNetwork())
	bits := a.BitLen()
	if in.Length != nil {
		bits = int(min(in.GetLength(), 1000))
		if len(raw) == 16 && a.Is4() { // ::ffff:a.b.c.d/n
			bits -= 96
		}
	}
	p, err := a.Prefix(bits)
	switch {
	case err != nil:
		d.fail("addresses", fmt.Errorf("prefix length %d does not fit %s", in.GetLength(), a))
	case bits == a.BitLen():
		s.VIPs = append(s.VIPs, NetAddr{network, a})
	default:
		s.CIDRs = append(s.CIDRs, NetPrefix{network, p})
	}
}
