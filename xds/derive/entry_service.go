package derive

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/crd"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// Reasons of conditions on ServiceEntries and WorkloadEntries.
const (
	ReasonNoAddress   = "NoAddress"
	ReasonNoEndpoints = "NoEndpoints"
	// ReasonWaypointMissing: only a waypoint could do it.
	ReasonWaypointMissing = "WaypointMissing"
)

// export is who sees a ServiceEntry.
type export int

const (
	exportPublic  export = iota
	exportPrivate        // its own namespace
	exportNowhere
)

// exportOf reads spec.exportTo. Node proxies know two answers, everybody and the
// own namespace; a list of other namespaces counts as everybody, as under Istio
// (who may connect is for policies to say).
func exportOf(se *crd.ServiceEntry) export {
	to := se.Spec.ExportTo
	switch {
	case len(to) == 0:
		return exportPublic
	case slices.Contains(to, "~"):
		return exportNowhere
	case slices.ContainsFunc(to, func(v string) bool { return v != "." && v != se.Namespace }):
		return exportPublic
	}
	return exportPrivate
}

// exportOfHost is who sees a host of an entry. A name under svc.<cluster domain>
// is its namespace's to give: what another namespace says about it, or about all
// of these names, is for that namespace alone, except for the root namespace. A
// name could otherwise be taken whose Service is yet to come, or is an alias.
func (e *Engine) exportOfHost(se *crd.ServiceEntry, host string) export {
	x := exportOf(se)
	if x == exportPublic && e.nameOfAnother(se.Namespace, host) {
		return exportPrivate
	}
	return x
}

func (e *Engine) nameOfAnother(ns, host string) bool {
	if e.set.isRoot(ns) {
		return false
	}
	names := ".svc." + e.cfg.ClusterDomain
	if crd.Wildcard(host) && strings.HasSuffix(names, host[1:]) {
		return true // of every namespace
	}
	rest, ok := strings.CutSuffix(host, names)
	return ok && rest[strings.LastIndexByte(rest, '.')+1:] != ns
}

// entryPorts lists the ports that a proxy can serve, in the entry's order. TCP
// with its real target: endpoints may override it by name.
func entryPorts(s *crd.ServiceEntrySpec) []servicePort {
	out := make([]servicePort, 0, len(s.Ports))
	for _, p := range s.Ports {
		if strings.EqualFold(p.Protocol, "UDP") {
			continue
		}
		sp := servicePort{name: p.Name, port: p.Number, target: p.TargetPort}
		if sp.target == 0 {
			sp.target = p.Number // absent means the same
		}
		if p.Protocol != "" {
			sp.app = appProtocol(&p.Protocol, "")
		}
		out = append(out, sp)
	}
	return out
}

// entryService builds the resource of one host.
func (e *Engine) entryService(k nn, se *crd.ServiceEntry, host string, b binding) *workload.Service {
	w := &workload.Service{
		Name: k.name, Namespace: k.ns, Hostname: host,
		Canonical:     e.canonical(host) == k,
		LoadBalancing: e.entryBalancing(se),
		Waypoint:      b.waypoint, WeightedWaypoints: b.weighted, IngressUseWaypoint: b.ingress,
	}
	for _, p := range e.entryAddresses(k, se, host) {
		a := &workload.NetworkAddress{Network: e.set.network, Address: p.Addr().AsSlice()}
		if !p.IsSingleIP() {
			a.Length = proto.Uint32(uint32(p.Bits()))
		}
		w.Addresses = append(w.Addresses, a)
	}
	ports := entryPorts(&se.Spec)
	for _, p := range ports {
		w.Ports = append(w.Ports, &workload.Port{ServicePort: p.port, TargetPort: p.target, AppProtocol: p.app})
	}
	namePorts(w, ports)
	for _, san := range se.Spec.SubjectAltNames {
		if _, err := identity.Parse(san); err == nil {
			w.SubjectAltNames = append(w.SubjectAltNames, san)
		}
	}
	if len(se.Spec.SubjectAltNames) == 0 {
		w.SubjectAltNames = e.entryIdentities(k, se)
	}
	if e.exportOfHost(se, host) == exportPrivate {
		w.Visibility = workload.Service_NAMESPACE
	}
	return w
}

// entryAddresses are those the entry declares, else those allocated to the host.
func (e *Engine) entryAddresses(k nn, se *crd.ServiceEntry, host string) []netip.Prefix {
	if len(se.Spec.Addresses) > 0 {
		return addressesOf(&se.Spec)
	}
	return singles(e.entries.vips.addrs(nn{k.ns, host}))
}

// entryBalancing: resolution NONE sends a connection where it was aimed.
func (e *Engine) entryBalancing(se *crd.ServiceEntry) *workload.LoadBalancing {
	if se.Spec.EffectiveResolution() == crd.ResolutionNone {
		return &workload.LoadBalancing{Mode: workload.LoadBalancing_PASSTHROUGH, HealthPolicy: workload.LoadBalancing_ALLOW_ALL}
	}
	if pref := preference(e.annotatedDistribution(se.Namespace, se.Annotations)); pref != nil {
		return &workload.LoadBalancing{Mode: workload.LoadBalancing_FAILOVER, RoutingPreference: pref}
	}
	return nil
}

// judgeEntry notes what of an entry node proxies do not do as it is written.
func (e *Engine) judgeEntry(j *judgement, se *crd.ServiceEntry, mine []string) {
	s := &se.Spec
	r := s.EffectiveResolution()
	switch exportOf(se) {
	case exportNowhere:
		j.add(ReasonUnsupported, "exportTo ~: no namespace sees the entry, it was not sent")
		return
	case exportPublic:
		if len(s.ExportTo) > 0 && !slices.Contains(s.ExportTo, "*") {
			j.add(ReasonUnsupported, "exportTo %s: node proxies know . and * only: every namespace sees the entry", strings.Join(s.ExportTo, ", "))
		}
	}
	e.judgeShared(j, s)
	if v := se.Annotations[trafficDistributionAnnotation]; v != "" && !strings.EqualFold(v, "any") && preference(v) == nil {
		j.add(ReasonUnsupported, "annotation %s: %q: valid are PreferClose, PreferSameZone, PreferSameNode; endpoints everywhere are used alike", trafficDistributionAnnotation, v)
	}
	for _, san := range s.SubjectAltNames {
		if _, err := identity.Parse(san); err != nil {
			j.add(ReasonUnsupported, "subjectAltNames %s: node proxies check identities of the form spiffe://<trust domain>/ns/<namespace>/sa/<account>, this one was left out", san)
		}
	}
	for _, h := range mine {
		if e.exportOfHost(se, h) != exportOf(se) {
			j.add(ReasonConflict, "host %s: names under svc.%s are their namespace's, others do not see the entry: write it there, or in namespace %s", h, e.cfg.ClusterDomain, e.set.roots[0])
		}
		if crd.Wildcard(h) && !strings.HasPrefix(h, "*.") {
			j.add(ReasonUnsupported, "host %s: node proxies find names by *.<domain> only", h)
		}
	}
	for _, p := range s.Ports {
		if strings.EqualFold(p.Protocol, "UDP") {
			j.add(ReasonUnsupported, "port %s: UDP does not go through the mesh", p.Name)
		}
	}
	if v, ok := se.Labels[autoAllocateLabel]; ok {
		if _, err := strconv.ParseBool(v); err != nil {
			j.add(ReasonUnsupported, "label %s: %q is not true or false, addresses are allocated", autoAllocateLabel, v)
		}
	}
	if w := s.WorkloadSelector; w != nil && r == crd.ResolutionNone {
		j.add(ReasonUnsupported, "workloadSelector has no effect with resolution NONE: connections go where the client aimed, use STATIC")
	} else if w != nil && len(w.Labels) == 0 {
		j.add(ReasonNoEndpoints, "workloadSelector without labels selects nothing: connections are refused")
	}
	if r == crd.ResolutionStatic && len(s.Endpoints) == 0 && s.WorkloadSelector == nil {
		j.add(ReasonNoEndpoints, "resolution STATIC without endpoints or workloadSelector: connections are refused")
	}
	if len(s.Ports) == 0 && r != crd.ResolutionNone {
		j.add(ReasonUnsupported, "no port: connections are refused")
	}
	if r == crd.ResolutionNone || len(s.Addresses) > 0 {
		return
	}
	for _, host := range mine {
		e.judgeAddress(j, se, host)
	}
}

// judgeAddress: node proxies know a service by its address alone.
func (e *Engine) judgeAddress(j *judgement, se *crd.ServiceEntry, host string) {
	why := ""
	switch n := len(e.entries.vips.addrs(nn{se.Namespace, host})); {
	case crd.Wildcard(host) && se.Spec.EffectiveResolution() != crd.ResolutionDynamic:
		why = "a wildcard gets no address: name one in spec.addresses"
	case !wantsVIP(se, host):
		why = fmt.Sprintf("label %s is false: name one in spec.addresses", autoAllocateLabel)
	case n < 2: // 70,000 hosts, or as many addresses declared
		j.add(ReasonNoAddress, "host %s: it has an address of one family only, none is free in the other range", host)
		return
	default:
		return
	}
	j.add(ReasonNoAddress, "host %s has no address, so node proxies do not tell its connections from others: %s", host, why)
}
