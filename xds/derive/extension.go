package derive

import (
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
		StrictBy:    e.strictBy(k.ns, p.Labels),
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
func extensionConditions(src source, annotations map[string]string) []Condition {
	out := accessLogConditions(src, annotations)
	if v := annotations[sameNodeAnnotation]; v != "" && !slices.Contains(crd.SameNode("").Values(), v) {
		out = append(out, src.unsupported(ConditionSameNode,
			"annotation %s: %q: valid are hbone, local; hbone holds, the stricter one", sameNodeAnnotation, v))
	}
	return out
}

func accessLogConditions(src source, annotations map[string]string) []Condition {
	v := annotations[accessLogAnnotation]
	if _, ok := parseAccessLog(v); v == "" || ok {
		return nil
	}
	return []Condition{src.unsupported(ConditionAccessLog,
		"annotation %s: %q: valid are all, failures, off; it is ignored", accessLogAnnotation, v)}
}

// unsupported is a condition that says what of an object has no effect.
func (s source) unsupported(typ, format string, args ...any) Condition {
	return Condition{
		Kind: s.kind, Namespace: s.ns, Name: s.name, Type: typ, Status: "False", Reason: ReasonUnsupported,
		Message: fmt.Sprintf(format, args...),
	}
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
