package derive

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/ambit-mesh/ambit/xds/api/workload"
)

const (
	trafficDistributionAnnotation = "networking.istio.io/traffic-distribution"
	exportToAnnotation            = "networking.istio.io/exportTo"
)

// servicePort is a TCP port of a service. Others are not the mesh's business.
type servicePort struct {
	name   string
	port   uint32
	target uint32 // 0 when named
	named  string // target port's name in the pod
	app    workload.AppProtocol
}

// servicePorts lists the TCP ports in the service's order.
func servicePorts(s *corev1.Service) []servicePort {
	out := make([]servicePort, 0, len(s.Spec.Ports))
	for _, p := range s.Spec.Ports {
		if (p.Protocol != "" && p.Protocol != corev1.ProtocolTCP) || !validPort(p.Port) {
			continue
		}
		sp := servicePort{name: p.Name, port: uint32(p.Port), app: appProtocol(p.AppProtocol, p.Name)}
		switch {
		case p.TargetPort.Type == intstr.String:
			sp.named = p.TargetPort.StrVal
		case validPort(p.TargetPort.IntVal):
			sp.target = uint32(p.TargetPort.IntVal)
		default:
			sp.target = sp.port // absent means the same
		}
		out = append(out, sp)
	}
	return out
}

func validPort(p int32) bool { return p > 0 && p <= 65535 }

// appProtocol is the declared protocol: spec.ports[].appProtocol, else the port's
// name up to the first "-".
func appProtocol(declared *string, name string) workload.AppProtocol {
	proto := name
	if declared != nil && *declared != "" {
		proto = strings.TrimPrefix(*declared, "kubernetes.io/")
	} else if !strings.EqualFold(name, "grpc-web") && !strings.HasPrefix(strings.ToLower(name), "grpc-web-") {
		proto, _, _ = strings.Cut(name, "-")
	} else {
		proto = "grpc-web"
	}
	switch strings.ToLower(proto) {
	case "http", "http1", "ws", "grpc-web":
		return workload.AppProtocol_HTTP11
	case "http2", "h2c":
		return workload.AppProtocol_HTTP2
	case "grpc":
		return workload.AppProtocol_GRPC
	case "https", "tls", "wss":
		return workload.AppProtocol_TLS
	case "tcp", "mongo", "redis", "mysql":
		return workload.AppProtocol_TCP
	}
	return workload.AppProtocol_UNKNOWN
}

// inMesh reports whether a service is served to proxies at all.
func inMesh(s *corev1.Service) bool { return s.Spec.Type != corev1.ServiceTypeExternalName }

// clusterIPs are the service's virtual addresses; a headless one has none.
func clusterIPs(s *corev1.Service) []netip.Addr {
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 && s.Spec.ClusterIP != "" {
		ips = []string{s.Spec.ClusterIP}
	}
	return parseAddrs(ips)
}

// parseAddrs drops what is no address ("None", "") and duplicates.
func parseAddrs(ips []string) []netip.Addr {
	var out []netip.Addr
	for _, ip := range ips {
		a, err := netip.ParseAddr(ip)
		if err != nil || a.Zone() != "" {
			continue
		}
		if a = a.Unmap(); !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

func (e *Engine) hostname(svc nn) string {
	return svc.name + "." + svc.ns + ".svc." + e.cfg.ClusterDomain
}

// serviceKey is the service's resource name and its key in Workload.services.
func (e *Engine) serviceKey(svc nn) string { return svc.ns + "/" + e.hostname(svc) }

// service builds the resource of one service, nil when it is not in the mesh,
// and says what of it is not in force.
func (e *Engine) service(k nn) (*workload.Service, []Condition) {
	s := e.services[k]
	if s == nil {
		return nil, nil
	}
	if !inMesh(s) {
		return nil, outsideConditions(k, s)
	}
	b := e.bind(bound{source: source{"Service", k}, meta: &s.ObjectMeta, traffic: trafficService})
	w := &workload.Service{
		Name: k.name, Namespace: k.ns, Hostname: e.hostname(k),
		Canonical:     true, // a Kubernetes service wins over other sources of its hostname
		LoadBalancing: e.loadBalancing(s),
		IpFamilies:    families(s.Spec.IPFamilies),
		Waypoint:      b.waypoint, WeightedWaypoints: b.weighted, IngressUseWaypoint: b.ingress,
		SubjectAltNames: e.serviceIdentities(k, s),
	}
	for _, a := range clusterIPs(s) {
		w.Addresses = append(w.Addresses, &workload.NetworkAddress{Network: e.set.network, Address: a.AsSlice()})
	}
	ports := servicePorts(s)
	for _, p := range ports {
		w.Ports = append(w.Ports, &workload.Port{ServicePort: p.port, TargetPort: p.target, AppProtocol: p.app})
	}
	namePorts(w, ports)
	if strings.TrimSpace(s.Annotations[exportToAnnotation]) == "." {
		w.Visibility = workload.Service_NAMESPACE
	}
	return w, append(b.conditions, serviceConditions(k, s)...)
}

// Conditions of annotations and fields of a Service.
const (
	ConditionTrafficDistribution = "ambit.dev/TrafficDistributionAccepted"
	ConditionExportTo            = "ambit.dev/ExportToAccepted"
	ConditionSessionAffinity     = "ambit.dev/SessionAffinityAccepted"
)

// outsideConditions says what a service that the mesh does not serve asks for.
func outsideConditions(k nn, s *corev1.Service) []Condition {
	if _, ok := waypointName(s.Labels, k.ns, useWaypointLabel, waypointNamespaceLabel); !ok {
		return nil
	}
	return []Condition{source{"Service", k}.unsupported(ConditionWaypoint,
		"label %s: a Service of type ExternalName is an alias, which has no waypoint: label the service that it stands for, or write a ServiceEntry", useWaypointLabel)}
}

// distributionConditions judges a traffic distribution.
func distributionConditions(src source, where, v string) []Condition {
	if v == "" || strings.EqualFold(v, "any") || preference(v) != nil {
		return nil
	}
	return []Condition{src.unsupported(ConditionTrafficDistribution,
		"%s: %q: valid are PreferClose, PreferSameZone, PreferSameNode; endpoints everywhere are used alike", where, v)}
}

// serviceConditions says which of a service's settings mean nothing here.
func serviceConditions(k nn, s *corev1.Service) []Condition {
	var out []Condition
	src := source{"Service", k}
	v, where := s.Annotations[trafficDistributionAnnotation], "annotation "+trafficDistributionAnnotation
	if s.Spec.TrafficDistribution != nil {
		v, where = *s.Spec.TrafficDistribution, "spec.trafficDistribution"
	}
	out = append(out, distributionConditions(src, where, v)...)
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		out = append(out, src.unsupported(ConditionSessionAffinity,
			"spec.sessionAffinity ClientIP: node proxies choose an endpoint for each connection, clients do not stay with one"))
	}
	if v := strings.TrimSpace(s.Annotations[exportToAnnotation]); v != "" && v != "." && v != "*" {
		out = append(out, src.unsupported(ConditionExportTo, "annotation %s: %q: node proxies know \".\" (its own namespace) and \"*\" only, every namespace sees the service: write . to hide it, or deny with an AuthorizationPolicy", exportToAnnotation, v))
	}
	return out
}

func families(fs []corev1.IPFamily) workload.IPFamilies {
	v4, v6 := slices.Contains(fs, corev1.IPv4Protocol), slices.Contains(fs, corev1.IPv6Protocol)
	switch {
	case v4 && v6:
		return workload.IPFamilies_DUAL
	case v4:
		return workload.IPFamilies_IPV4_ONLY
	case v6:
		return workload.IPFamilies_IPV6_ONLY
	}
	return workload.IPFamilies_AUTOMATIC
}

// loadBalancing maps the service's traffic policies, nil for the default.
func (e *Engine) loadBalancing(s *corev1.Service) *workload.LoadBalancing {
	var lb workload.LoadBalancing
	set := false
	if s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal {
		lb.Mode = workload.LoadBalancing_STRICT
		lb.RoutingPreference = []workload.LoadBalancing_Scope{workload.LoadBalancing_NODE}
		set = true
	} else if pref := preference(e.trafficDistribution(s)); pref != nil {
		lb.Mode = workload.LoadBalancing_FAILOVER
		lb.RoutingPreference = pref
		set = true
	}
	if s.Spec.PublishNotReadyAddresses {
		lb.HealthPolicy = workload.LoadBalancing_ALLOW_ALL
		set = true
	}
	if !set {
		return nil
	}
	return &lb
}

// trafficDistribution: the field, else the service's annotation, else its namespace's.
func (e *Engine) trafficDistribution(s *corev1.Service) string {
	if s.Spec.TrafficDistribution != nil {
		return *s.Spec.TrafficDistribution
	}
	return e.annotatedDistribution(s.Namespace, s.Annotations)
}

func (e *Engine) annotatedDistribution(in string, annotations map[string]string) string {
	if v := annotations[trafficDistributionAnnotation]; v != "" {
		return v
	}
	if ns := e.namespaces[in]; ns != nil {
		return ns.Annotations[trafficDistributionAnnotation]
	}
	return ""
}

func preference(distribution string) []workload.LoadBalancing_Scope {
	zone := []workload.LoadBalancing_Scope{workload.LoadBalancing_NETWORK, workload.LoadBalancing_REGION, workload.LoadBalancing_ZONE}
	switch strings.ToLower(distribution) {
	case "preferclose", "prefersamezone":
		return zone
	case "prefersamenode":
		return append(zone, workload.LoadBalancing_SUBZONE, workload.LoadBalancing_NODE)
	}
	return nil
}
