package derive

import (
	"cmp"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/xds/crd"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// A workload of another network is reached through two tunnels. The outer one
// ends at the gateway of that network; the inner one ends at a workload that the
// gateway chooses, so a client can authenticate it by its service alone. These are
// the identities that a service's endpoints in other networks have.
//
// Endpoints of the mesh's own network are not among them: they are authenticated
// one by one.

// identities collects SPIFFE IDs.
type identities struct {
	trustDomain, own string // own: the mesh's network
	seen             set[string]
}

func (e *Engine) newIdentities() *identities {
	return &identities{trustDomain: e.set.trustDomain, own: e.set.network, seen: set[string]{}}
}

func (ids *identities) add(network, ns, account string) {
	if network == "" || network == ids.own {
		return
	}
	// A workload without a valid identity is refused by itself, not its service.
	if id, err := identity.New(ids.trustDomain, ns, cmp.Or(account, "default")); err == nil {
		ids.seen[id.String()] = struct{}{}
	}
}

func (ids *identities) pod(k nn, p *corev1.Pod) {
	if p != nil && !terminal(p) {
		ids.add(networkOf(p), k.ns, p.Spec.ServiceAccountName)
	}
}

func (ids *identities) sorted() []string { return slices.Sorted(maps.Keys(ids.seen)) }

// chosen adds the workloads that a selector chooses.
func (e *Engine) chosen(ids *identities, ns string, selector map[string]string) {
	if len(selector) == 0 || len(e.elsewhere) == 0 {
		return
	}
	e.podLabels.selected(ns, selector, func(k nn) { ids.pod(k, e.pods[k]) })
	e.entries.labels.selected(ns, selector, func(k nn) {
		w := e.entries.workloads[k]
		ids.add(entryNetworkOf(w), ns, w.Spec.ServiceAccount)
	})
}

// serviceIdentities are those of a Service.
func (e *Engine) serviceIdentities(k nn, s *corev1.Service) []string {
	if len(e.elsewhere) == 0 {
		return nil
	}
	ids := e.newIdentities()
	e.chosen(ids, k.ns, s.Spec.Selector)
	if len(s.Spec.Selector) == 0 {
		for slice := range e.slicesOf[k] {
			for pod := range slicePods(e.slices[slice]) {
				ids.pod(pod, e.pods[pod])
			}
		}
	}
	return ids.sorted()
}

// entryIdentities are those of a ServiceEntry that names none itself.
func (e *Engine) entryIdentities(k nn, se *crd.ServiceEntry) []string {
	ids := e.newIdentities()
	e.chosen(ids, k.ns, se.Spec.WorkloadSelector.Chosen())
	for _, ep := range se.Spec.Endpoints {
		ids.add(cmp.Or(ep.Network, ep.Labels[networkLabel]), k.ns, ep.ServiceAccount)
	}
	return ids.sorted()
}

// networkOf is the network a pod says it is on, "" for its mesh's.
func networkOf(p *corev1.Pod) string {
	if p == nil {
		return ""
	}
	return cmp.Or(p.Labels[networkLabel], p.Annotations[networkLabel])
}

// entryNetworkOf is the network a WorkloadEntry says it is on.
func entryNetworkOf(w *crd.WorkloadEntry) string {
	if w == nil {
		return ""
	}
	return cmp.Or(w.Spec.Network, entryLabels(w)[networkLabel])
}

// inputNetwork marks whatever has a workload as endpoint that is, or was, on a
// network of its own choice.
func (e *Engine) inputNetwork(src source, was, now string, labels ...map[string]string) {
	if was == "" && now == "" {
		return
	}
	if now == "" {
		delete(e.elsewhere, src)
	} else {
		e.elsewhere[src] = struct{}{}
	}
	for _, l := range labels {
		e.serviceSelectors.choosing(src.ns, l, func(svc nn) { e.dirty.services[svc] = struct{}{} })
		e.entries.selectors.choosing(src.ns, l, func(se nn) { e.dirty.entries[se] = struct{}{} })
	}
	if src.kind != "Pod" {
		return
	}
	for slice := range e.slicesTo[src.nn] {
		if svc, ok := sliceService(e.slices[slice]); ok {
			e.dirty.services[svc] = struct{}{}
		}
	}
}

// listsElsewhere marks a service whose slices change while there are endpoints on
// other networks.
func (e *Engine) listsElsewhere(svc nn) {
	if len(e.elsewhere) > 0 {
		e.dirty.services[svc] = struct{}{}
	}
}
