package derive

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/crd"
)

// sameNodeAnnotation is ours, on pods and namespaces: hbone or local.
const sameNodeAnnotation = "ambit.dev/same-node"

// Conditions of our own annotations.
const (
	ConditionSameNode  = "ambit.dev/SameNodeAccepted"
	ConditionAccessLog = "ambit.dev/AccessLogAccepted"
)

// extend adds what only our own proxies understand, when there is something.
func extend(w *workload.Workload, x *ambit.WorkloadExtension) {
	if proto.Size(x) == 0 {
		return
	}
	w.Extensions = append(w.Extensions, &workload.Extension{
		Name:   api.WorkloadExtension,
		Config: &anypb.Any{TypeUrl: api.WorkloadExtensionType, Value: marshal(x)},
	})
}

// extension is what a pod's proxy needs to know beyond the workload itself.
func (e *Engine) extension(k nn, p *corev1.Pod, w *workload.Workload) *ambit.WorkloadExtension {
	x := &ambit.WorkloadExtension{
		AccessLog:   e.podLog(k, p.Labels, p.Annotations),
		Terminating: p.DeletionTimestamp != nil,
		DnsNames:    e.dnsNames(k, p),
	}
	if e.sameNode(k, p, w) == crd.SameNodeLocal {
		x.SameNode = ambit.WorkloadExtension_SAME_NODE_LOCAL
	}
	return x
}

// sameNode is how a client on the pod's node reaches it. Only the node's proxy
// can take the local path, so what terminates HBONE itself, or gets it through an
// application tunnel, is always reached by HBONE.
func (e *Engine) sameNode(k nn, p *corev1.Pod, w *workload.Workload) crd.SameNode {
	if w.TunnelProtocol != workload.TunnelProtocol_HBONE || w.NativeTunnel || w.ApplicationTunnel != nil {
		return crd.SameNodeHBONE
	}
	v := p.Annotations[sameNodeAnnotation]
	if ns := e.namespaces[k.ns]; v == "" && ns != nil {
		v = ns.Annotations[sameNodeAnnotation]
	}
	if v == "" {
		v = string(e.set.sameNode)
	}
	switch {
	case v == string(crd.SameNodeLocal):
		return crd.SameNodeLocal
	case v != "": // hbone, or something that is neither
		return crd.SameNodeHBONE
	case e.peerPolicy(k.ns, p.Labels) != "": // plaintext is refused, on some ports at least
		return crd.SameNodeHBONE
	}
	return crd.SameNodeLocal
}

// extensionConditions judges our annotations on a pod or a namespace.
func (e *Engine) extensionConditions(src source, annotations map[string]string) []Condition {
	var out []Condition
	bad := func(typ, annotation, value, valid, effect string) {
		out = append(out, Condition{
			Kind: src.kind, Namespace: src.ns, Name: src.name, Type: typ, Status: "False", Reason: ReasonUnsupported,
			Message: fmt.Sprintf("annotation %s: %q: valid are %s; %s", annotation, value, valid, effect),
		})
	}
	if v := annotations[accessLogAnnotation]; v != "" {
		if _, ok := parseAccessLog(v); !ok {
			bad(ConditionAccessLog, accessLogAnnotation, v, "all, failures, off", "it is ignored")
		}
	}
	if v := annotations[sameNodeAnnotation]; v != "" && !slices.Contains(crd.SameNode("").Values(), v) {
		bad(ConditionSameNode, sameNodeAnnotation, v, "hbone, local", "hbone holds, the stricter one")
	}
	return out
}

// dnsNames are the pod's own names: <hostname>.<service>... of the headless
// service that its subdomain names and that selects it, as Kubernetes publishes
// them (DNS-based service discovery 1.1.0, §2.4.1), or that a slice gives it.
func (e *Engine) dnsNames(k nn, p *corev1.Pod) []string {
	var out []string
	if p.Spec.Hostname != "" && p.Spec.Subdomain != "" {
		svc := nn{k.ns, p.Spec.Subdomain}
		if s := e.services[svc]; isHeadless(s) && len(s.Spec.Selector) > 0 && matches(s.Spec.Selector, p.Labels) {
			out = e.appendName(out, p.Spec.Hostname, svc)
		}
	}
	for _, slice := range slices.SortedFunc(maps.Keys(e.slicesTo[k]), nn.compare) {
		s := e.slices[slice]
		svc, _ := sliceService(s)
		if o := e.services[svc]; !isHeadless(o) || len(o.Spec.Selector) > 0 {
			continue
		}
		for _, ep := range s.Endpoints {
			if ep.TargetRef != nil && ep.TargetRef.Kind == "Pod" && ep.TargetRef.Name == k.name {
				out = e.appendName(out, hostnameOf(ep), svc)
			}
		}
	}
	return out
}

func isHeadless(s *corev1.Service) bool {
	return s != nil && inMesh(s) && (s.Spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(s.Spec.ClusterIPs, corev1.ClusterIPNone))
}

func hostnameOf(ep discoveryv1.Endpoint) string {
	if ep.Hostname == nil {
		return ""
	}
	return *ep.Hostname
}

func (e *Engine) appendName(names []string, host string, svc nn) []string {
	name := host + "." + e.hostname(svc)
	if len(validation.IsDNS1123Label(host)) > 0 || slices.Contains(names, name) {
		return names
	}
	return append(names, name)
}

// subjectAltNames are the identities of a service's endpoints in other networks:
// the proxy there is authenticated through a tunnel whose end is known by the
// service alone.
func (e *Engine) subjectAltNames(k nn, s *corev1.Service) []string {
	if len(e.elsewhere) == 0 {
		return nil
	}
	seen := set[string]{}
	add := func(pod nn) {
		p := e.pods[pod]
		if p == nil || terminal(p) || e.podNetwork(p) == e.set.network {
			return
		}
		seen["spiffe://"+e.set.trustDomain+"/ns/"+pod.ns+"/sa/"+serviceAccountOf(p)] = struct{}{}
	}
	if len(s.Spec.Selector) > 0 {
		e.podLabels.selected(k.ns, s.Spec.Selector, add)
	} else {
		for slice := range e.slicesOf[k] {
			for pod := range slicePods(e.slices[slice]) {
				add(pod)
			}
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// networkOf is the network a pod says it is on, "" for its mesh's.
func networkOf(p *corev1.Pod) string {
	if p == nil {
		return ""
	}
	return cmp.Or(p.Labels[networkLabel], p.Annotations[networkLabel])
}

// listsElsewhere marks a service whose slices change while there are endpoints in
// other networks.
func (e *Engine) listsElsewhere(svc nn) {
	if len(e.elsewhere) > 0 {
		e.dirty.services[svc] = struct{}{}
	}
}

// inputNetwork marks the services of a pod that is, or was, in a network of its
// own choice: they name its identity.
func (e *Engine) inputNetwork(k nn, was, now *corev1.Pod) {
	if networkOf(was) == "" && networkOf(now) == "" {
		return
	}
	if networkOf(now) == "" {
		delete(e.elsewhere, k)
	} else {
		e.elsewhere[k] = struct{}{}
	}
	mark := func(svc nn) { e.dirty.services[svc] = struct{}{} }
	for _, p := range []*corev1.Pod{was, now} {
		if p != nil {
			e.serviceSelectors.choosing(k.ns, p.Labels, mark)
		}
	}
	for slice := range e.slicesTo[k] {
		if svc, ok := sliceService(e.slices[slice]); ok {
			mark(svc)
		}
	}
}
