package derive

import (
	"maps"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/crd"
)

// workloadEntry makes the workload of a WorkloadEntry. It is judged only when
// something is wrong: there may be very many.
func (e *Engine) workloadEntry(k nn) ([]Resource, []Condition) {
	o := e.entries.workloads[k]
	if o == nil {
		return nil, nil
	}
	spec := o.Spec
	spec.Labels = entryLabels(o)
	w := e.endpoint(k, &spec)
	w.Uid = e.cfg.ClusterID + "/networking.istio.io/WorkloadEntry/" + k.ns + "/" + k.name
	if o.Annotations[redirectionAnnotation] == "enabled" { // its traffic is captured as a pod's is
		w.TunnelProtocol = workload.TunnelProtocol_HBONE
	}
	w.Services = e.entryServices(k.ns, spec.Labels, spec.Ports, e.kubeServices(k.ns, &spec))
	b := e.bind(bound{source: source{"WorkloadEntry", k}, meta: &o.ObjectMeta, traffic: trafficWorkload})
	w.Waypoint = b.waypoint
	w.AuthorizationPolicies = e.chosenPolicies(k.ns, spec.Labels)
	j := judgement{source: source{"WorkloadEntry", k}}
	if !reachable(w) {
		j.add(ReasonNoAddress, "there is no address, and no gateway leads into network %s: it is not used", w.Network)
	}
	extend(w, &ambit.WorkloadExtension{AccessLog: e.podLog(k, spec.Labels, o.Annotations), StrictBy: e.strictBy(k.ns, spec.Labels)})
	conditions := append(b.conditions, accessLogConditions(source{"WorkloadEntry", k}, o.Annotations)...)
	if len(j.notes) > 0 {
		conditions = append(conditions, j.condition())
	}
	return []Resource{workloadResource(w)}, conditions
}

// kubeServices maps the Kubernetes services that select a WorkloadEntry.
func (e *Engine) kubeServices(ns string, spec *crd.WorkloadEntrySpec) map[string]*workload.PortList {
	var out map[string]*workload.PortList
	e.serviceSelectors.choosing(ns, spec.Labels, func(svc nn) {
		if s := e.services[svc]; s != nil && inMesh(s) {
			out = with(out, e.serviceKey(svc), endpointPorts(servicePorts(s), spec.Ports))
		}
	})
	return out
}

// entryServices adds the hosts of the ServiceEntries that select a workload, a
// pod or a WorkloadEntry with ports of its own.
func (e *Engine) entryServices(ns string, labels map[string]string, own map[string]uint32, out map[string]*workload.PortList) map[string]*workload.PortList {
	e.entries.selectors.choosing(ns, labels, func(k nn) {
		se := e.entries.services[k]
		if r := se.Spec.EffectiveResolution(); r == crd.ResolutionNone || r == crd.ResolutionDynamic || exportOf(se) == exportNowhere {
			return
		}
		hosts, _ := e.held(k, se)
		for _, h := range hosts {
			out = with(out, ns+"/"+h, endpointPorts(entryPorts(&se.Spec), own))
		}
	})
	return out
}

func with(m map[string]*workload.PortList, key string, ports *workload.PortList) map[string]*workload.PortList {
	if m == nil {
		m = map[string]*workload.PortList{}
	}
	m[key] = ports
	return m
}

// entryLabels are what selectors see: those of the spec over the object's own.
func entryLabels(w *crd.WorkloadEntry) map[string]string {
	if len(w.Spec.Labels) == 0 {
		return w.Labels
	}
	out := make(map[string]string, len(w.Labels)+len(w.Spec.Labels))
	maps.Copy(out, w.Labels)
	maps.Copy(out, w.Spec.Labels)
	return out
}
