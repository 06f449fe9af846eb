package derive

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/xds/crd"
)

// ServiceEntries and WorkloadEntries: what the mesh knows besides pods and
// Kubernetes services.
//
//	ServiceEntry  ─▶ a Service per host      (entry_service.go)
//	              ─▶ a Workload per endpoint (entry_endpoint.go)
//	WorkloadEntry ─▶ a Workload, endpoint of whatever selects it (entry_workload.go)
//
// A host belongs to one object per namespace, its holder: a Kubernetes service of
// that very name, else the oldest ServiceEntry. What the others say about the
// host has no effect, and a condition on them says so. Namespaces are apart: the
// same host in two of them is two services.

// entries is the tables of both kinds.
type entries struct {
	services  map[nn]*crd.ServiceEntry
	workloads map[nn]*crd.WorkloadEntry

	in        multi[string, nn] // ServiceEntries by namespace
	claims    multi[nn, nn]     // (namespace, host) → ServiceEntries that name it
	hosts     multi[string, nn] // host → (namespace, host)
	selectors *selectorIndex    // of ServiceEntries
	labels    labelIndex        // of WorkloadEntries
	vips      *vips
	owners    multi[netip.Prefix, source] // who has an address as a service

	touched set[nn] // (namespace, host) whose holder may differ
}

func newEntries() entries {
	return entries{
		services: map[nn]*crd.ServiceEntry{}, workloads: map[nn]*crd.WorkloadEntry{},
		in: multi[string, nn]{}, claims: multi[nn, nn]{}, hosts: multi[string, nn]{},
		selectors: newSelectorIndex(), labels: labelIndex{}, vips: newVIPs(), owners: multi[netip.Prefix, source]{}, touched: set[nn]{},
	}
}

func (e *Engine) inputServiceEntry(k nn, se *crd.ServiceEntry) {
	was := e.entries.services[k]
	e.markEntry(k, was)
	hosts := hostsIn(k.ns, was)
	for _, h := range hostsIn(k.ns, se) {
		if !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	canonical := e.canonicals(hosts)
	put(e.entries.services, k, se)
	e.use(source{"ServiceEntry", k}, labelsOf(was), labelsOf(se))
	for _, h := range hostsIn(k.ns, was) {
		e.entries.claims.remove(h, k)
		if len(e.entries.claims[h]) == 0 {
			e.entries.hosts.remove(h.name, h)
		}
	}
	e.entries.selectors.remove(k)
	e.entries.in.remove(k.ns, k)
	var declared []netip.Prefix
	if se != nil {
		e.entries.in.add(k.ns, k)
		for _, h := range hostsIn(k.ns, se) {
			e.entries.claims.add(h, k)
			e.entries.hosts.add(h.name, h)
		}
		if sel := se.Spec.WorkloadSelector.Chosen(); len(sel) > 0 {
			e.entries.selectors.put(k, sel)
		}
		declared = declaredBy(&se.Spec)
	}
	e.entries.vips.declare(source{"ServiceEntry", k}, declared)
	e.inputAddresses(source{"ServiceEntry", k}, addressesIn(was), addressesIn(se))
	e.markEntry(k, se)
	for _, h := range hosts {
		e.touchHost(h)
	}
	for host, before := range canonical {
		if now := e.canonical(host); now != before {
			e.markEntry(before, nil)
			e.markEntry(now, nil)
		}
	}
}

// hostsIn lists the hosts of an entry with its namespace.
func hostsIn(ns string, se *crd.ServiceEntry) []nn {
	if se == nil {
		return nil
	}
	var out []nn
	for _, h := range se.Spec.HostNames() {
		out = append(out, nn{ns, h})
	}
	return out
}

func addressesIn(se *crd.ServiceEntry) []netip.Prefix {
	if se == nil {
		return nil
	}
	return addressesOf(&se.Spec)
}

// declaredBy lists every address in an entry.
func declaredBy(s *crd.ServiceEntrySpec) []netip.Prefix {
	out := addressesOf(s)
	for _, ep := range s.Endpoints {
		out = append(out, singles(parseAddrs([]string{ep.Address}))...)
	}
	return out
}

// addressesOf reads addresses that were validated when the object was decoded.
func addressesOf(s *crd.ServiceEntrySpec) []netip.Prefix {
	var out []netip.Prefix
	for _, v := range s.Addresses {
		p, err := crd.ParseBlock(v)
		if err != nil {
			panic("BUG: an address passed validation: " + err.Error())
		}
		out = append(out, p)
	}
	return out
}

// markEntry marks an entry and, when it selects its endpoints, these.
func (e *Engine) markEntry(k nn, se *crd.ServiceEntry) {
	if k == (nn{}) {
		return
	}
	e.dirty.entries[k] = struct{}{}
	if se != nil {
		e.markChosen(k.ns, se.Spec.WorkloadSelector.Chosen())
	}
}

// markChosen marks pods and WorkloadEntries of a namespace that have all of some
// labels. Nothing is chosen by none.
func (e *Engine) markChosen(ns string, labels map[string]string) {
	if len(labels) > 0 {
		e.markWorkloads(ns, labels)
	}
}

// markWorkloads is markChosen, but no labels choose everything.
func (e *Engine) markWorkloads(ns string, labels map[string]string) {
	e.podLabels.selected(ns, labels, func(k nn) { e.dirty.pods[k] = struct{}{} })
	e.entries.labels.selected(ns, labels, func(k nn) { e.dirty.workloads[k] = struct{}{} })
}

// touchHost marks everybody who names a host in a namespace: who holds it, and
// whom the others see in force, may differ.
func (e *Engine) touchHost(h nn) {
	e.entries.touched[h] = struct{}{}
	for k := range e.entries.claims[h] {
		e.markEntry(k, e.entries.services[k])
	}
}

// serviceChangesHost follows a Kubernetes service that came or went.
func (e *Engine) serviceChangesHost(svc nn) {
	host := e.hostname(svc)
	for h := range e.entries.hosts[host] {
		e.touchHost(h)
	}
}

// kubeService reports whether a host is the name of a Kubernetes service, and
// which one.
func (e *Engine) kubeService(host string) (nn, bool) {
	rest, ok := strings.CutSuffix(host, ".svc."+e.cfg.ClusterDomain)
	name, ns, dot := strings.Cut(rest, ".")
	if !ok || !dot {
		return nn{}, false
	}
	k := nn{ns, name}
	s := e.services[k]
	return k, s != nil && inMesh(s)
}

// holder is the object in force for a host in a namespace.
func (e *Engine) holder(h nn) source {
	if svc, ok := e.kubeService(h.name); ok && svc.ns == h.ns {
		return source{"Service", svc}
	}
	var best nn
	for k := range e.entries.claims[h] {
		if best == (nn{}) || e.olderEntry(k, best) {
			best = k
		}
	}
	if best == (nn{}) {
		return source{}
	}
	return source{"ServiceEntry", best}
}

func (e *Engine) olderEntry(a, b nn) bool {
	return compareAge(e.entryAge(a), a, e.entryAge(b), b) < 0
}

func (e *Engine) entryAge(k nn) time.Time { return e.entries.services[k].CreationTimestamp.Time }

// canonical is the entry that clients of other namespaces mean by a host that
// several namespaces define: the oldest of those they see. A Kubernetes service
// of that name goes before. With one definition there is nothing to choose, and
// the mark stays off, so that a real service wins an address that both have.
func (e *Engine) canonical(host string) nn {
	defined := e.entries.hosts[host]
	if len(defined) < 2 {
		return nn{}
	}
	if _, ok := e.kubeService(host); ok {
		return nn{}
	}
	var best nn
	for h := range defined {
		k := e.holder(h).nn
		if se := e.entries.services[k]; e.exportOfHost(se, host) != exportPublic || e.takesAddress(k, &se.Spec) {
			continue
		}
		if best == (nn{}) || e.olderEntry(k, best) {
			best = k
		}
	}
	return best
}

func (e *Engine) canonicals(hosts []nn) map[string]nn {
	out := make(map[string]nn, len(hosts))
	for _, h := range hosts {
		out[h.name] = e.canonical(h.name)
	}
	return out
}

// held lists the hosts that an entry is in force for, in its order, and for the
// others who is.
func (e *Engine) held(k nn, se *crd.ServiceEntry) (mine []string, lost []conflict) {
	for _, h := range se.Spec.HostNames() {
		if by := e.holder(nn{k.ns, h}); by.kind == "ServiceEntry" && by.nn == k {
			mine = append(mine, h)
		} else {
			lost = append(lost, conflict{h, by})
		}
	}
	return mine, lost
}

// conflict is a host that somebody else holds.
type conflict struct {
	host string
	by   source
}

// settleEntries gives addresses to the hosts that changed hands. It comes before
// anything is computed: somebody else may have to move.
func (e *Engine) settleEntries() {
	for h := range e.entries.touched {
		by := e.holder(h)
		if by.kind == "ServiceEntry" && wantsVIP(e.entries.services[by.nn], h.name) {
			e.entries.vips.claim(h, e.entryAge(by.nn))
		} else {
			e.entries.vips.release(h)
		}
	}
	clear(e.entries.touched)
	for h := range e.entries.vips.drain() {
		if by := e.holder(h); by.kind == "ServiceEntry" {
			e.dirty.entries[by.nn] = struct{}{}
		}
	}
}

const autoAllocateLabel = "networking.istio.io/enable-autoallocate-ip"

// wantsVIP: not when there is an address, when connections go where the client
// aimed anyway, when the host stands for many (unless a waypoint tells them apart),
// or when the label says so.
func wantsVIP(se *crd.ServiceEntry, host string) bool {
	r := se.Spec.EffectiveResolution()
	if r == crd.ResolutionNone || crd.Wildcard(host) && r != crd.ResolutionDynamic {
		return false
	}
	return len(se.Spec.Addresses) == 0 && exportOf(se) != exportNowhere && !strings.EqualFold(se.Labels[autoAllocateLabel], "false")
}

func (e *Engine) inputWorkloadEntry(k nn, w *crd.WorkloadEntry) {
	was := put(e.entries.workloads, k, w)
	e.use(source{"WorkloadEntry", k}, labelsOf(was), labelsOf(w))
	e.entries.labels.remove(k)
	var declared []netip.Prefix
	if w != nil {
		e.entries.labels.put(k, entryLabels(w))
		declared = singles(parseAddrs([]string{w.Spec.Address}))
	}
	e.entries.vips.declare(source{"WorkloadEntry", k}, declared)
	e.dirty.workloads[k] = struct{}{}
	var before, after map[string]string
	if was != nil {
		before = entryLabels(was)
	}
	if w != nil {
		after = entryLabels(w)
	}
	e.inputNetwork(source{"WorkloadEntry", k}, entryNetworkOf(was), entryNetworkOf(w), before, after)
}

// computeEntries makes the resources of dirty entries again.
func (e *Engine) computeEntries(r *Result) {
	for k := range e.dirty.entries {
		out, conditions := e.entry(k)
		e.output(r, source{"ServiceEntry", k}, out)
		e.condition(source{"ServiceEntry", k}, conditions)
	}
	for k := range e.dirty.workloads {
		out, conditions := e.workloadEntry(k)
		e.output(r, source{"WorkloadEntry", k}, out)
		e.condition(source{"WorkloadEntry", k}, conditions)
	}
}

// entry makes the services and endpoints of a ServiceEntry and judges it.
func (e *Engine) entry(k nn) ([]Resource, []Condition) {
	se := e.entries.services[k]
	if se == nil {
		return nil, nil
	}
	mine, lost := e.held(k, se)
	j := judgement{source: source{"ServiceEntry", k}}
	for _, c := range lost {
		j.add(ReasonConflict, "host %s: %s %s is in force", c.host, c.by.kind, c.by.nn)
	}
	b := e.bind(bound{source: j.source, meta: &se.ObjectMeta, traffic: trafficService, private: exportOf(se) == exportPrivate})
	if se.Spec.EffectiveResolution() == crd.ResolutionDynamic && b.waypoint == nil {
		j.add(ReasonWaypointMissing, "resolution DYNAMIC_DNS needs a waypoint, which resolves the host of each request: label the entry %s; it was not sent", useWaypointLabel)
		return nil, append(b.conditions, j.condition())
	}
	if se.Spec.EffectiveResolution() == crd.ResolutionDynamic && se.Spec.Location == crd.LocationInternal {
		j.add(ReasonUnsupported, "resolution DYNAMIC_DNS finds servers outside the mesh, location is MESH_INTERNAL: the entry was not sent")
		return nil, append(b.conditions, j.condition())
	}
	e.judgeEntry(&j, se, mine)
	b.conditions = append(b.conditions, distributionConditions(j.source, "annotation "+trafficDistributionAnnotation, se.Annotations[trafficDistributionAnnotation])...)
	var out []Resource
	if exportOf(se) != exportNowhere {
		for _, host := range mine {
			out = append(out, serviceResource(e.entryService(k, se, host, b)))
		}
		for _, w := range e.endpoints(k, se, mine, &j) {
			out = append(out, workloadResource(w))
		}
	}
	return out, append(b.conditions, j.condition())
}

// judgement collects what is not in force as it is written.
type judgement struct {
	source
	reason string // of the first note
	notes  []string
}

func (j *judgement) condition() Condition {
	c := Condition{Kind: j.kind, Namespace: j.ns, Name: j.name, Type: ConditionAccepted, Status: "True", Reason: ReasonAccepted}
	if len(j.notes) > 0 {
		c.Status, c.Reason, c.Message = "False", j.reason, strings.Join(j.notes, "; ")
	}
	return c
}

// An entry of thousands of hosts may have a note for each.
const maxNotes = 20

func (j *judgement) add(reason, format string, args ...any) {
	j.reason = cmp.Or(j.reason, reason)
	if len(j.notes) < maxNotes {
		j.notes = append(j.notes, fmt.Sprintf(format, args...))
	}
}
