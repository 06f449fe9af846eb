package derive

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/crd"
)

// endpoints builds the workloads that an entry lists itself. Without any, an
// entry that is resolved by name has its own host as endpoint.
//
// No policies: these workloads are on no node, nothing would enforce them.
func (e *Engine) endpoints(k nn, se *crd.ServiceEntry, hosts []string, j *judgement) []*workload.Workload {
	if len(hosts) == 0 {
		return nil
	}
	s := &se.Spec
	ports := entryPorts(s)
	// A waypoint for workloads, as a pod's: traffic to the address itself.
	waypoint := e.bind(bound{source: j.source, meta: &se.ObjectMeta, traffic: trafficWorkload, private: exportOf(se) == exportPrivate}).waypoint
	var out []*workload.Workload
	if s.EffectiveResolution().ByName() && len(s.Endpoints) == 0 && s.WorkloadSelector == nil {
		for _, host := range hosts {
			w := e.endpoint(k, &crd.WorkloadEntrySpec{Address: host})
			w.Uid, w.Waypoint = e.endpointUID(k, host), waypoint
			w.Services = servedHosts(k.ns, []string{host}, endpointPorts(ports, nil))
			out = append(out, w)
		}
		return out
	}
	used := map[string]int{}
	for i, ep := range s.Endpoints {
		w := e.endpoint(k, ep)
		if !reachable(w) {
			j.add(ReasonNoAddress, "endpoints[%d] has no address, and no gateway leads into network %s: it is not used", i, w.Network)
		}
		w.Uid, w.Waypoint = e.endpointUID(k, endpointAddress(ep)), waypoint
		// The same address again, for other ports or another weight.
		if used[w.Uid]++; used[w.Uid] > 1 {
			w.Uid += "/" + strconv.Itoa(used[w.Uid])
		}
		w.Services = servedHosts(k.ns, hosts, endpointPorts(ports, ep.Ports))
		out = append(out, w)
	}
	return out
}

func (e *Engine) endpointUID(k nn, address string) string {
	return e.cfg.ClusterID + "/networking.istio.io/ServiceEntry/" + k.ns + "/" + k.name + "/" + address
}

// endpointAddress spells an address in one way; an endpoint without one is a
// whole network.
func endpointAddress(ep *crd.WorkloadEntrySpec) string {
	if addrs := parseAddrs([]string{ep.Address}); len(addrs) > 0 {
		return addrs[0].String()
	}
	if ep.Address == "" {
		return ep.Network
	}
	return crd.HostName(ep.Address)
}

// endpoint builds what WorkloadEntries and endpoints have in common.
func (e *Engine) endpoint(k nn, ep *crd.WorkloadEntrySpec) *workload.Workload {
	w := &workload.Workload{
		Name: k.name, Namespace: k.ns,
		Network:        e.entryNetwork(ep),
		TrustDomain:    unless(e.set.trustDomain, defaultTrustDomain),
		ServiceAccount: unless(ep.ServiceAccount, "default"),
		ClusterId:      unless(e.cfg.ClusterID, defaultCluster),
		WorkloadName:   k.name,
		WorkloadType:   workload.WorkloadType_POD, // the wire knows nothing closer
		Locality:       localityFrom(ep.Locality, ep.Labels),
	}
	if addrs := parseAddrs([]string{ep.Address}); len(addrs) > 0 {
		w.Addresses = [][]byte{addrs[0].AsSlice()}
	} else {
		w.Hostname = crd.HostName(ep.Address) // resolved by the proxy
	}
	w.NetworkGateway = e.networkGateway(w.Network)
	if ep.Weight > 0 {
		w.Capacity = wrapperspb.UInt32(ep.Weight)
	}
	if ep.Labels[tunnelLabel] == "http" {
		w.TunnelProtocol, w.NativeTunnel = workload.TunnelProtocol_HBONE, true
	}
	w.CanonicalName = firstLabel(ep.Labels, k.name, canonicalNameLabel, "app.kubernetes.io/name", "app")
	w.CanonicalRevision = firstLabel(ep.Labels, "latest", canonicalRevisionLabel, "app.kubernetes.io/version", "version")
	return w
}

// reachable reports whether a proxy can find a way to a workload.
func reachable(w *workload.Workload) bool {
	return len(w.Addresses) > 0 || w.Hostname != "" || w.NetworkGateway != nil
}

// entryNetwork: what the endpoint says, else its label, else the mesh's own.
func (e *Engine) entryNetwork(ep *crd.WorkloadEntrySpec) string {
	return cmp.Or(ep.Network, ep.Labels[networkLabel], e.set.network)
}

// markEntriesIn marks everything that is in a network, when the way into it
// changes. That is rare: looking at all costs less than an index.
func (e *Engine) markEntriesIn(network string) {
	for k, w := range e.entries.workloads {
		if cmp.Or(w.Spec.Network, entryLabels(w)[networkLabel], e.set.network) == network {
			e.dirty.workloads[k] = struct{}{}
		}
	}
	for k, se := range e.entries.services {
		if slices.ContainsFunc(se.Spec.Endpoints, func(ep *crd.WorkloadEntrySpec) bool { return e.entryNetwork(ep) == network }) {
			e.dirty.entries[k] = struct{}{}
		}
	}
}

// localityFrom reads "region/zone/subzone", else the label with dots.
func localityFrom(v string, labels map[string]string) *workload.Locality {
	if v == "" {
		v = strings.ReplaceAll(labels[localityLabel], ".", "/")
	}
	if v == "" {
		return nil
	}
	parts := append(strings.SplitN(v, "/", 3), "", "")
	return &workload.Locality{Region: parts[0], Zone: parts[1], Subzone: parts[2]}
}

// servedHosts maps hosts of a namespace to the ports of an endpoint.
func servedHosts(ns string, hosts []string, ports *workload.PortList) map[string]*workload.PortList {
	out := make(map[string]*workload.PortList, len(hosts))
	for _, h := range hosts {
		out[ns+"/"+h] = ports
	}
	return out
}

// endpointPorts resolves target ports: the endpoint's own by the name of the
// service's port, else the service's.
func endpointPorts(ports []servicePort, own map[string]uint32) *workload.PortList {
	pl := &workload.PortList{}
	for _, sp := range ports {
		target, ok := own[sp.name]
		if !ok && sp.named != "" { // of a Kubernetes service
			if target, ok = own[sp.named]; !ok {
				continue // the service does not reach this endpoint there
			}
		}
		if !ok {
			target = sp.target
		}
		pl.Ports = append(pl.Ports, &workload.Port{ServicePort: sp.port, TargetPort: target, AppProtocol: sp.app})
	}
	return pl
}
