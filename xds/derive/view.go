package derive

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Resources returns every current resource of a type, sorted by name. It waits
// for an Apply under way.
func (e *Engine) Resources(typeURL string) []Resource {
	e.mu.RLock()
	defer e.mu.RUnlock()
	var out []Resource
	for _, made := range e.made {
		for _, r := range made {
			if r.Type == typeURL {
				out = append(out, r)
			}
		}
	}
	slices.SortFunc(out, func(a, b Resource) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Status returns the condition of every object that has one, sorted, as of the
// latest Apply. It must not be modified.
func (e *Engine) Status() []Condition {
	if p := e.shown.Load(); p != nil {
		return *p
	}
	return nil
}

// alias is the name network/ip by which a proxy may ask for a resource.
func alias(network string, addr []byte) string {
	a, ok := netip.AddrFromSlice(addr)
	if !ok {
		panic("BUG: an address of a resource has neither 4 nor 16 bytes")
	}
	return network + "/" + a.String()
}

const useWaypointLabel = "istio.io/use-waypoint"

// ConditionWaypoint says whether traffic goes through the waypoint an object asks for.
const ConditionWaypoint = "istio.io/WaypointBound"

// waypointCondition tells users of the waypoint label that nothing comes of it.
func (e *Engine) waypointCondition(src source, o metav1.Object) {
	var now []Condition
	if name := labelOf(o, useWaypointLabel); name != "" && name != "none" {
		now = append(now, Condition{
			Kind: src.kind, Namespace: src.ns, Name: src.name, Type: ConditionWaypoint, Status: "False", Reason: ReasonNoWaypoint,
			Message: "label " + useWaypointLabel + "=" + name + " has no effect: this build runs no waypoints, layer 7 policy is not enforced",
		})
	}
	e.condition(src, now)
}

func labelOf(o metav1.Object, key string) string {
	switch v := o.(type) { // a nil pointer in the interface: the object is gone
	case *corev1.Pod:
		if v != nil {
			return v.Labels[key]
		}
	case *corev1.Service:
		if v != nil {
			return v.Labels[key]
		}
	case *corev1.Namespace:
		if v != nil {
			return v.Labels[key]
		}
	}
	return ""
}
