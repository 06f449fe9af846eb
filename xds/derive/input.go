package derive

import (
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/xds/crd"
)

// input stores one object (nil: it is gone) and marks what depends on it, before
// and after the change.
func (e *Engine) input(kind string, k nn, value any) {
	switch kind {
	case "Pod":
		v, _ := value.(*corev1.Pod)
		e.inputPod(k, v)
	case "Service":
		v, _ := value.(*corev1.Service)
		e.inputService(k, v)
	case "EndpointSlice":
		v, _ := value.(*discoveryv1.EndpointSlice)
		e.inputSlice(k, v)
	case "Namespace":
		v, _ := value.(*corev1.Namespace)
		e.inputNamespace(k.name, v)
	case "Node":
		v, _ := value.(*corev1.Node)
		e.inputNode(k.name, v)
	case "AuthorizationPolicy":
		v, _ := value.(*crd.AuthorizationPolicy)
		e.inputPolicy(k, v)
	case "PeerAuthentication":
		v, _ := value.(*crd.PeerAuthentication)
		e.inputPeer(k, v)
	case "Gateway":
		v, _ := value.(*crd.Gateway)
		e.inputGateway(k, v)
	case "GatewayClass":
		v, _ := value.(*crd.GatewayClass)
		e.inputGatewayClass(k.name, v)
	case "Telemetry":
		v, _ := value.(*crd.Telemetry)
		e.inputTelemetry(k, v)
	case "ServiceEntry":
		v, _ := value.(*crd.ServiceEntry)
		e.inputServiceEntry(k, v)
	case "WorkloadEntry":
		v, _ := value.(*crd.WorkloadEntry)
		e.inputWorkloadEntry(k, v)
	case crd.MeshConfigKind:
		v, _ := value.(*crd.Mesh)
		put(e.meshes, k, v)
	}
}

// put stores a pointer, or deletes when it is nil, and returns what was there.
func put[K comparable, V any](m map[K]*V, k K, v *V) (was *V) {
	was = m[k]
	if v == nil {
		delete(m, k)
	} else {
		m[k] = v
	}
	return was
}

func (e *Engine) inputPod(k nn, p *corev1.Pod) {
	was := put(e.pods, k, p)
	if was != nil {
		e.podsOnNode.remove(was.Spec.NodeName, k)
		e.podLabels.remove(k)
	}
	if p != nil {
		e.podsOnNode.add(p.Spec.NodeName, k)
		e.podLabels.put(k, p.Labels)
		e.entries.vips.declare(source{"Pod", k}, singles(podAddrs(p)))
	} else {
		e.entries.vips.declare(source{"Pod", k}, nil)
	}
	e.dirty.pods[k] = struct{}{}
	e.inputNetwork(source{"Pod", k}, networkOf(was), networkOf(p), labelsOf(was), labelsOf(p))
	e.use(source{"Pod", k}, labelsOf(was), labelsOf(p))
}

func (e *Engine) inputService(k nn, s *corev1.Service) {
	mark := func(pod nn) { e.dirty.pods[pod] = struct{}{} }
	was := put(e.services, k, s)
	hadSelector := was != nil && len(was.Spec.Selector) > 0
	hasSelector := s != nil && len(s.Spec.Selector) > 0
	if hadSelector {
		e.markWorkloads(k.ns, was.Spec.Selector)
	}
	var before, declared []netip.Prefix
	if was != nil && inMesh(was) {
		before = singles(clusterIPs(was))
	}
	if s != nil && inMesh(s) {
		declared = singles(clusterIPs(s))
	}
	e.inputAddresses(source{"Service", k}, before, declared)
	e.entries.vips.declare(source{"Service", k}, declared)
	if (was != nil && inMesh(was)) != (s != nil && inMesh(s)) {
		e.serviceChangesHost(k)
	}
	e.serviceSelectors.remove(k)
	if s == nil {
		e.servicesIn.remove(k.ns, k)
	} else {
		e.servicesIn.add(k.ns, k)
		if hasSelector {
			e.serviceSelectors.put(k, s.Spec.Selector)
			e.markWorkloads(k.ns, s.Spec.Selector)
		}
	}
	e.dirty.services[k] = struct{}{}
	for slice := range e.slicesOf[k] {
		e.dirty.slices[slice] = struct{}{}
		if hadSelector != hasSelector || !hasSelector {
			for pod := range slicePods(e.slices[slice]) {
				mark(pod)
			}
		}
	}
	e.serviceOfGateways(k)
	e.use(source{"Service", k}, labelsOf(was), labelsOf(s))
}

func (e *Engine) inputSlice(k nn, s *discoveryv1.EndpointSlice) {
	if was := put(e.slices, k, s); was != nil {
		if svc, ok := sliceService(was); ok {
			e.slicesOf.remove(svc, k)
			e.listsElsewhere(svc)
			for pod := range slicePods(was) {
				e.slicesTo.remove(pod, k)
				e.markListed(svc, pod)
			}
		}
	}
	var declared []netip.Prefix
	if s != nil {
		for i := range s.Endpoints {
			declared = append(declared, singles(parseAddrs(s.Endpoints[i].Addresses))...)
		}
		if svc, ok := sliceService(s); ok {
			e.slicesOf.add(svc, k)
			e.listsElsewhere(svc)
			for pod := range slicePods(s) {
				e.slicesTo.add(pod, k)
				e.markListed(svc, pod)
			}
		}
	}
	e.entries.vips.declare(source{"EndpointSlice", k}, declared)
	e.dirty.slices[k] = struct{}{}
}

// markListed marks a pod whose place in a slice matters: only a service without a
// selector takes its pods from slices.
func (e *Engine) markListed(svc, pod nn) {
	if s := e.services[svc]; s != nil && len(s.Spec.Selector) == 0 {
		e.dirty.pods[pod] = struct{}{}
	}
}

func (e *Engine) inputNamespace(name string, ns *corev1.Namespace) {
	was := put(e.namespaces, name, ns)
	e.gw.dirtyNamespaces[name] = struct{}{}
	before, after := labelsOf(was), labelsOf(ns)
	e.use(source{"Namespace", nn{"", name}}, before, after)
	differs := func(before, after map[string]string, keys ...string) bool {
		return slices.ContainsFunc(keys, func(key string) bool { return before[key] != after[key] })
	}
	switch {
	case differs(before, after, namespaceLabels...), e.gw.selective > 0 && !maps.Equal(before, after),
		differs(annotationsOf(was), annotationsOf(ns), namespaceAnnotations...):
		e.markNamespace(name)
	}
}

// What of a namespace its pods and services depend on; besides, waypoints may
// choose namespaces by any label.
var (
	namespaceLabels = []string{
		useWaypointLabel, waypointNamespaceLabel, canaryLabel, canaryNamespaceLabel, ingressWaypointLabel,
	}
	namespaceAnnotations = []string{
		trafficDistributionAnnotation, canaryWeightAnnotation, sameNodeAnnotation, accessLogAnnotation,
	}
)

// input is a pointer to an object, which may be nil.
type input[T any] interface {
	*T
	metav1.Object
}

func labelsOf[T any, O input[T]](o O) map[string]string {
	if o == nil {
		return nil
	}
	return o.GetLabels()
}

func annotationsOf[T any, O input[T]](o O) map[string]string {
	if o == nil {
		return nil
	}
	return o.GetAnnotations()
}

func (e *Engine) inputNode(name string, n *corev1.Node) {
	if was := put(e.nodes, name, n); localityOf(was) == localityOf(n) {
		return // a node's heartbeat changes nothing
	}
	for pod := range e.podsOnNode[name] {
		e.dirty.pods[pod] = struct{}{}
	}
}

// sentSelector is the selector by which workloads must refer to a policy, nil
// when none does.
func sentSelector(p *crd.AuthorizationPolicy) map[string]string {
	if p == nil || p.Spec.TargetRef != nil || len(p.Spec.TargetRefs) > 0 ||
		p.Spec.Action == crd.ActionAudit || p.Spec.Action == crd.ActionCustom {
		return nil
	}
	return p.Spec.Selector.Labels()
}

func (e *Engine) inputPolicy(k nn, p *crd.AuthorizationPolicy) {
	was := put(e.policies, k, p)
	e.dirty.policies[k] = struct{}{}
	before, after := sentSelector(was), sentSelector(p)
	if maps.Equal(before, after) {
		return // other rules, same workloads
	}
	e.policySelectors.remove(k)
	if len(after) > 0 {
		e.policySelectors.put(k, after)
	}
	e.markSelected(k.ns, before)
	e.markSelected(k.ns, after)
}

// markSelected marks the workloads a policy's selector chooses: in its namespace, or in
// every namespace when it is in the root namespace.
func (e *Engine) markSelected(ns string, selector map[string]string) {
	if len(selector) == 0 {
		return
	}
	if !e.set.isRoot(ns) {
		e.markWorkloads(ns, selector)
		return
	}
	for in := range e.podLabels {
		e.markWorkloads(in, selector)
	}
	for in := range e.entries.labels {
		e.markWorkloads(in, selector)
	}
}

func (e *Engine) inputPeer(k nn, p *crd.PeerAuthentication) {
	before := e.inheritedFrom(k.ns)
	was := put(e.peers, k, p)
	e.dirty.peers[k] = struct{}{}
	if was != nil {
		if sel := was.Spec.Selector.Labels(); len(sel) > 0 {
			e.peerSelectors.remove(k)
			e.markWorkloads(k.ns, sel)
		} else if delete(e.wide[k.ns], k); len(e.wide[k.ns]) == 0 {
			delete(e.wide, k.ns)
		}
	}
	if p != nil {
		if sel := p.Spec.Selector.Labels(); len(sel) > 0 {
			e.peerSelectors.put(k, sel)
			e.markWorkloads(k.ns, sel)
		} else {
			if e.wide[k.ns] == nil {
				e.wide[k.ns] = map[nn]*crd.PeerAuthentication{}
			}
			e.wide[k.ns][k] = p
		}
	}
	if !isWide(was) && !isWide(p) {
		return
	}
	// Others of the level may have won or lost, and modes per port are relative
	// to what is inherited. There are few of these objects, so all are looked at.
	root := e.set.isRoot(k.ns)
	for other := range e.peers {
		if root || other.ns == k.ns {
			e.dirty.peers[other] = struct{}{}
		}
	}
	switch {
	case before == e.inheritedFrom(k.ns):
	case root:
		markAll(e.dirty.pods, e.pods)
		markAll(e.dirty.workloads, e.entries.workloads)
	default:
		e.markWorkloads(k.ns, nil)
	}
}

func isWide(p *crd.PeerAuthentication) bool { return p != nil && len(p.Spec.Selector.Labels()) == 0 }
