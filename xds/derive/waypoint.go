package derive

import (
	"fmt"
	"maps"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/crd"
)

const (
	useWaypointLabel       = "istio.io/use-waypoint"
	waypointNamespaceLabel = "istio.io/use-waypoint-namespace"
	canaryLabel            = "istio.io/use-waypoint-canary"
	canaryNamespaceLabel   = "istio.io/use-waypoint-canary-namespace"
	canaryWeightAnnotation = "istio.io/use-waypoint-canary-weight"
	ingressWaypointLabel   = "istio.io/ingress-use-waypoint"

	noWaypoint = "none" // as a waypoint's name: explicitly no waypoint
)

// Kinds of traffic that waypoints take.
const (
	trafficService  = "service"
	trafficWorkload = "workload"
	trafficAll      = "all"
	trafficNone     = "none"
)

// ConditionWaypoint says whether traffic goes through the waypoint an object asks for.
const ConditionWaypoint = "istio.io/WaypointBound"

// Reasons of ConditionWaypoint.
const (
	ReasonWaypointAccepted    = "WaypointAccepted"
	ReasonWaypointNotReady    = "WaypointIsNotReady"
	ReasonAttachmentDenied    = "AttachmentDenied"
	ReasonUnsupportedTraffic  = "UnsupportedTrafficType"
	ReasonCrossNamespaceBound = "CrossNamespaceWaypointForbidden"
)

// bound is an object that may have a waypoint.
type bound struct {
	source
	meta    *metav1.ObjectMeta
	traffic string // trafficService or trafficWorkload
	private bool   // visible in its namespace only
}

// binding is where an object's traffic goes.
type binding struct {
	waypoint   *workload.GatewayAddress
	weighted   []*workload.WeightedWaypoint
	ingress    bool // ingress gateways use the waypoint too
	conditions []Condition
}

// bind finds the waypoint of an object: the one its own label names, else its
// namespace's. A waypoint that is not there, not ready or not willing is as none:
// traffic goes to the endpoints directly, as under Istio, and a condition on the
// object with the label says so.
func (e *Engine) bind(b bound) binding {
	var out binding
	own, fallback := b.meta.Labels, map[string]string(nil)
	from, annotations := own, b.meta.Annotations
	if ns := e.namespaces[b.ns]; ns != nil {
		fallback = ns.Labels
		if own[useWaypointLabel] == "" {
			from, annotations = ns.Labels, ns.Annotations
		}
	}
	out.ingress = b.traffic == trafficService && e.ingressUses(b, own, fallback, &out)
	if e.isGatewayPart(b) {
		return out
	}
	name, ok := waypointName(from, b.ns, useWaypointLabel, waypointNamespaceLabel)
	if !ok {
		return out
	}
	named := own[useWaypointLabel] != ""
	addr, cond := e.attach(b, name)
	canary, weight := e.canary(b, from, annotations, named, &out)
	switch {
	case canary == nil:
		out.waypoint = addr
	case addr == nil: // weighted traffic never falls back to none
		out.waypoint = canary
		cond.Message = strings.TrimSuffix(cond.Message, direct) + "; everything goes to the canary waypoint"
	default:
		out.waypoint = addr
		out.weighted = []*workload.WeightedWaypoint{{Destination: addr, Weight: 100 - weight}, {Destination: canary, Weight: weight}}
	}
	if named { // what is inherited is said once, on the namespace
		out.conditions = append(out.conditions, cond)
	}
	return out
}

// waypointName reads a pair of labels.
func waypointName(labels map[string]string, ns, nameLabel, nsLabel string) (nn, bool) {
	name := labels[nameLabel]
	if name == "" || name == noWaypoint {
		return nn{}, false
	}
	if other := labels[nsLabel]; other != "" {
		ns = other
	}
	return nn{ns, name}, true
}

// attach is the address of a waypoint, nil when the object cannot use it.
func (e *Engine) attach(b bound, name nn) (*workload.GatewayAddress, Condition) {
	refuse := func(reason, format string, args ...any) (*workload.GatewayAddress, Condition) {
		return nil, b.waypointCondition("False", reason, fmt.Sprintf(format, args...)+direct)
	}
	w := e.gw.points[name]
	switch {
	case w == nil:
		return refuse(ReasonWaypointNotReady, "label %s: there is no Gateway %s", useWaypointLabel, name)
	case w.address == nil:
		return refuse(ReasonWaypointNotReady, "label %s: Gateway %s is not ready: %s", useWaypointLabel, name, w.why)
	case !e.admits(w, name, b.ns):
		return refuse(ReasonAttachmentDenied, "label %s: Gateway %s does not admit namespace %s: set allowedRoutes.namespaces of its listener", useWaypointLabel, name, b.ns)
	case b.private && name.ns != b.ns:
		return refuse(ReasonCrossNamespaceBound, "label %s: an object visible in its namespace only cannot use Gateway %s of another one", useWaypointLabel, name)
	case w.serves == trafficNone:
		return refuse(ReasonUnsupportedTraffic, "label %s: Gateway %s takes no traffic: set its label %s", useWaypointLabel, name, waypointForLabel)
	case b.traffic != "" && w.serves != b.traffic && w.serves != trafficAll:
		return refuse(ReasonUnsupportedTraffic, "label %s: Gateway %s takes %s traffic only: label it %s=%s or all", useWaypointLabel, name, w.serves, waypointForLabel, b.traffic)
	}
	return w.address, b.waypointCondition("True", ReasonWaypointAccepted, "")
}

const direct = "; traffic goes past it and layer 7 policy is not enforced"

func (b *bound) waypointCondition(status, reason, message string) Condition {
	return Condition{Kind: b.kind, Namespace: b.source.ns, Name: b.name, Type: ConditionWaypoint, Status: status, Reason: reason, Message: message}
}

// admits applies the allowedRoutes of a waypoint's listener.
func (e *Engine) admits(w *waypoint, name nn, ns string) bool {
	switch w.from {
	case crd.FromAll:
		return true
	case crd.FromSelector:
		s, err := metav1.LabelSelectorAsSelector(w.selector)
		if err != nil {
			return false // the selector was validated when it was read
		}
		// Kubernetes gives every namespace its name as a label; files may not.
		have := labels.Set{corev1.LabelMetadataName: ns}
		if o := e.namespaces[ns]; o != nil {
			maps.Copy(have, o.Labels)
		}
		return s.Matches(have)
	}
	return name.ns == ns
}

// isGatewayPart: waypoints, and what leads into networks, have no waypoint.
func (e *Engine) isGatewayPart(b bound) bool {
	switch b.meta.Labels[gatewayManagedLabel] {
	case "istio.io-mesh-controller", "istio.io-eastwest-controller":
		return true
	}
	if b.kind == "Service" {
		if w := e.gw.points[b.nn]; w != nil && w.isPart {
			return true
		}
	}
	w := e.gw.points[nn{b.ns, b.meta.Labels[gatewayNameLabel]}]
	return w != nil && w.isPart
}

// canary is the second waypoint of a weighted shift, nil for none.
func (e *Engine) canary(b bound, from, annotations map[string]string, named bool, out *binding) (*workload.GatewayAddress, uint32) {
	name, ok := waypointName(from, b.ns, canaryLabel, canaryNamespaceLabel)
	text := annotations[canaryWeightAnnotation]
	if !ok || b.traffic != trafficService || text == "" {
		return nil, 0
	}
	weight, err := strconv.ParseUint(text, 10, 32)
	if err != nil || weight > 100 {
		if named {
			out.conditions = append(out.conditions, b.unsupported(ConditionCanary,
				"annotation %s: %q is not a number from 0 to 100, only the primary waypoint is used", canaryWeightAnnotation, text))
		}
		return nil, 0
	}
	if weight == 0 {
		return nil, 0
	}
	addr, cond := e.attach(b, name)
	if named && addr == nil {
		cond.Type = ConditionCanary
		cond.Message = fmt.Sprintf("label %s: Gateway %s cannot be used, everything goes to the primary waypoint", canaryLabel, name)
		out.conditions = append(out.conditions, cond)
	}
	return addr, uint32(weight)
}

// ConditionCanary is about the second waypoint of a weighted shift.
const ConditionCanary = "ambit.dev/WaypointCanaryBound"

// ConditionIngressWaypoint is about whether ingress gateways use a waypoint.
const ConditionIngressWaypoint = "ambit.dev/IngressUsesWaypoint"

// ingressUses reads a boolean label, of the object or of its namespace.
func (e *Engine) ingressUses(b bound, own, fallback map[string]string, out *binding) bool {
	v, mine := own[ingressWaypointLabel]
	if !mine {
		v = fallback[ingressWaypointLabel]
	}
	if v == "" {
		return false
	}
	use, err := strconv.ParseBool(v)
	if err != nil && mine {
		out.conditions = append(out.conditions, b.unsupported(ConditionIngressWaypoint,
			"label %s: %q is not true or false, ingress gateways go past the waypoint", ingressWaypointLabel, v))
	}
	return use
}

// namespaceConditions judges what a namespace's labels ask for.
func (e *Engine) namespaceConditions(name string) []Condition {
	ns := e.namespaces[name]
	if ns == nil {
		return nil
	}
	var out []Condition
	b := bound{source: source{"Namespace", nn{"", name}}, meta: &ns.ObjectMeta}
	inNs := b
	inNs.nn.ns = name // where its objects are
	if wp, ok := waypointName(ns.Labels, name, useWaypointLabel, waypointNamespaceLabel); ok {
		_, cond := e.attach(inNs, wp)
		cond.Namespace = ""
		out = append(out, cond)
	}
	var bad binding
	inNs.traffic = trafficService
	e.canary(inNs, ns.Labels, ns.Annotations, ns.Labels[useWaypointLabel] != "", &bad)
	e.ingressUses(b, ns.Labels, nil, &bad)
	for _, c := range bad.conditions {
		c.Namespace = ""
		out = append(out, c)
	}
	out = append(out, distributionConditions(b.source, "annotation "+trafficDistributionAnnotation, ns.Annotations[trafficDistributionAnnotation])...)
	return append(out, extensionConditions(b.source, ns.Annotations)...)
}
