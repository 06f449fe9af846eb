package derive

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/crd"
	"github.com/ambit-mesh/ambit/xds/dir"
)

// Engine holds the tables. Create it with New.
type Engine struct {
	cfg Config // immutable

	// placed and shown are what other goroutines ask for while Apply works.
	placed placement
	shown  atomic.Pointer[[]Condition]

	mu sync.RWMutex // guards everything below; Apply holds it for writing

	// Inputs.
	namespaces map[string]*corev1.Namespace
	nodes      map[string]*corev1.Node
	pods       map[nn]*corev1.Pod
	services   map[nn]*corev1.Service
	slices     map[nn]*discoveryv1.EndpointSlice
	policies   map[nn]*crd.AuthorizationPolicy
	peers      map[nn]*crd.PeerAuthentication
	meshes     map[nn]*crd.Mesh
	gw         gateways
	tel        telemetries
	elsewhere  set[source] // pods and WorkloadEntries with a network of their own
	entries    entries
	set        settings

	// Indexes over the inputs.
	podLabels        labelIndex
	podsOnNode       multi[string, nn]
	servicesIn       multi[string, nn] // by namespace
	serviceSelectors *selectorIndex
	slicesOf         multi[nn, nn] // by service
	slicesTo         multi[nn, nn] // by pod that an endpoint is
	policySelectors  *selectorIndex
	peerSelectors    *selectorIndex
	wide             map[string]map[nn]*crd.PeerAuthentication // without selector, by namespace

	// Outputs.
	made       map[source][]Resource // what each input made
	conditions map[source][]Condition
	status     []Condition // sorted, rebuilt when stale
	stale      bool
	// dropped are the resources removed by the Apply under way, for the case that
	// another object makes one of the same name.
	dropped map[Name]Resource

	dirty    dirty
	computed computed // by the latest Apply
}

// source is the input object that a resource or condition comes from.
type source struct {
	kind string
	nn
}

// dirty is what must be computed again.
type dirty struct {
	pods, services, slices, policies, peers set[nn]
	entries, workloads                      set[nn] // ServiceEntries, WorkloadEntries
	all                                     bool
}

// computed counts what one Apply computed, for tests of incrementality.
type computed struct{ Pods, Services, Slices, Policies, Peers, Gateways, Telemetries, Entries, Workloads int }

// New returns an engine without objects.
func New(cfg Config) *Engine {
	e := &Engine{
		cfg:        cfg.withDefaults(),
		namespaces: map[string]*corev1.Namespace{}, nodes: map[string]*corev1.Node{},
		pods: map[nn]*corev1.Pod{}, services: map[nn]*corev1.Service{}, slices: map[nn]*discoveryv1.EndpointSlice{},
		policies: map[nn]*crd.AuthorizationPolicy{}, peers: map[nn]*crd.PeerAuthentication{}, meshes: map[nn]*crd.Mesh{},
		podLabels: labelIndex{}, podsOnNode: multi[string, nn]{},
		servicesIn: multi[string, nn]{}, serviceSelectors: newSelectorIndex(), slicesOf: multi[nn, nn]{}, slicesTo: multi[nn, nn]{},
		policySelectors: newSelectorIndex(), peerSelectors: newSelectorIndex(),
		wide: map[string]map[nn]*crd.PeerAuthentication{},
		gw:   newGateways(), tel: newTelemetries(), elsewhere: set[source]{},
		entries: newEntries(),
		made:    map[source][]Resource{}, conditions: map[source][]Condition{}, dropped: map[Name]Resource{},
	}
	e.dirty.reset()
	e.dirty.all = true // what the engine makes without any input
	e.set = settle(e.cfg, nil, nil)
	e.placed.trustDomain, e.placed.domains = e.set.trustDomain, e.set.trustDomains
	return e
}

func (d *dirty) reset() {
	*d = dirty{pods: set[nn]{}, services: set[nn]{}, slices: set[nn]{}, policies: set[nn]{}, peers: set[nn]{},
		entries: set[nn]{}, workloads: set[nn]{}}
}

// Apply takes a change into account and returns the resources that differ.
func (e *Engine) Apply(c dir.Change) Result {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, k := range c.Deletes {
		e.input(k.Kind, nn{k.Namespace, k.Name}, nil)
	}
	for _, o := range c.Upserts {
		e.input(o.GVK.Kind, nn{o.Namespace, o.Name}, o.Value)
	}
	if s := settle(e.cfg, e.meshes, e.namespaces); !s.equal(&e.set) {
		e.set = s
		e.dirty.all = true
	}
	if e.dirty.all {
		e.dirtyAll()
	}
	e.settleEntries()
	// Certificates must not wait for a change of the whole mesh to be computed.
	e.placed.apply(c, e.set.trustDomain, e.set.trustDomains)
	var r Result
	e.settleGateways(&r) // marks what depends on them
	e.compute(&r)
	e.settleDropped(&r)
	e.dirty.reset()
	clear(e.gw.dirty)
	clear(e.gw.dirtyNamespaces)
	clear(e.tel.dirty)
	slices.SortFunc(r.Upserts, func(a, b Resource) int { return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name)) })
	slices.SortFunc(r.Removes, func(a, b Name) int { return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name)) })
	r.Status = e.statusLocked()
	return r
}

func (e *Engine) dirtyAll() {
	markAll(e.dirty.pods, e.pods)
	markAll(e.dirty.services, e.services)
	markAll(e.dirty.slices, e.slices)
	markAll(e.dirty.policies, e.policies)
	markAll(e.dirty.peers, e.peers)
	markAll(e.gw.dirty, e.gw.all)
	markAll(e.tel.dirty, e.tel.all)
	markAll(e.dirty.entries, e.entries.services)
	markAll(e.dirty.workloads, e.entries.workloads)
}

func markAll[V any](s set[nn], from map[nn]V) {
	for k := range from {
		s[k] = struct{}{}
	}
}

// compute makes every dirty input's resources again.
func (e *Engine) compute(r *Result) {
	e.computed = computed{
		Pods: len(e.dirty.pods), Services: len(e.dirty.services), Slices: len(e.dirty.slices),
		Policies: len(e.dirty.policies), Peers: len(e.dirty.peers), Gateways: len(e.gw.dirty), Telemetries: len(e.tel.dirty),
		Entries: len(e.dirty.entries), Workloads: len(e.dirty.workloads),
	}
	if e.dirty.all {
		strict := strictPolicy(e.set.roots[0])
		e.output(r, source{"static", nn{}}, []Resource{authorizationResource(strict.Namespace+"/"+strict.Name, strict)})
	}
	for k := range e.dirty.services {
		var out []Resource
		s, conditions := e.service(k)
		if s != nil {
			out = append(out, serviceResource(s))
		}
		e.output(r, source{"Service", k}, out)
		e.condition(source{"Service", k}, conditions)
	}
	for k := range e.dirty.pods {
		var out []Resource
		w, conditions := e.workload(k)
		if w != nil {
			out = append(out, workloadResource(w))
		}
		e.output(r, source{"Pod", k}, out)
		e.condition(source{"Pod", k}, conditions)
	}
	for k := range e.dirty.slices {
		var out []Resource
		for _, w := range e.sliceWorkloads(k) {
			out = append(out, workloadResource(w))
		}
		e.output(r, source{"EndpointSlice", k}, out)
	}
	for name := range e.gw.dirtyNamespaces {
		e.condition(source{"Namespace", nn{"", name}}, e.namespaceConditions(name))
	}
	for k := range e.tel.dirty {
		e.condition(source{"Telemetry", k}, e.telemetryConditions(k))
	}
	e.computeEntries(r)
	for k := range e.dirty.policies {
		src := source{"AuthorizationPolicy", k}
		if p := e.policies[k]; p != nil {
			e.judge(r, src, authorize(p, &e.set))
		} else {
			e.output(r, src, nil)
			e.condition(src, nil)
		}
	}
	for k := range e.dirty.peers {
		src := source{"PeerAuthentication", k}
		if e.peers[k] != nil {
			e.judge(r, src, e.peerVerdict(k))
		} else {
			e.output(r, src, nil)
			e.condition(src, nil)
		}
	}
}

// judge outputs a policy and its condition. It is accepted only when it is in
// force exactly as written.
func (e *Engine) judge(r *Result, src source, v verdict) {
	var out []Resource
	if v.authz != nil {
		out = append(out, authorizationResource(v.authz.Namespace+"/"+v.authz.Name, v.authz))
	}
	e.output(r, src, out)
	status := "False"
	if v.reason == ReasonAccepted {
		status = "True"
	}
	e.condition(src, []Condition{{
		Kind: src.kind, Namespace: src.ns, Name: src.name,
		Type: ConditionAccepted, Status: status, Reason: v.reason, Message: strings.Join(v.notes, "; "),
	}})
}

// output replaces what a source made and reports the difference.
func (e *Engine) output(r *Result, src source, now []Resource) {
	was := make(map[Name]Resource, len(e.made[src]))
	for _, o := range e.made[src] {
		was[Name{o.Type, o.Name}] = o
	}
	for i := range now {
		name := Name{now[i].Type, now[i].Name}
		o, had := was[name]
		delete(was, name)
		if had && string(o.Bytes) == string(now[i].Bytes) {
			now[i] = o // keeps one copy
			continue
		}
		r.Upserts = append(r.Upserts, now[i])
	}
	maps.Copy(e.dropped, was)
	if len(now) == 0 {
		delete(e.made, src)
	} else {
		e.made[src] = now
	}
}

// settleDropped reports what is gone. A resource that one object made before and
// another one makes now has changed at most.
func (e *Engine) settleDropped(r *Result) {
	r.Upserts = slices.DeleteFunc(r.Upserts, func(u Resource) bool {
		was, moved := e.dropped[Name{u.Type, u.Name}]
		delete(e.dropped, Name{u.Type, u.Name})
		return moved && string(was.Bytes) == string(u.Bytes)
	})
	for n := range e.dropped {
		r.Removes = append(r.Removes, n)
	}
	clear(e.dropped)
}

func (e *Engine) condition(src source, now []Condition) {
	if slices.Equal(e.conditions[src], now) {
		return
	}
	e.stale = true
	if len(now) == 0 {
		delete(e.conditions, src)
	} else {
		e.conditions[src] = now
	}
}

func (e *Engine) statusLocked() []Condition {
	if !e.stale {
		return e.status
	}
	e.stale = false
	var all []Condition // a slice of its own: earlier results keep theirs
	for _, cs := range e.conditions {
		all = append(all, cs...)
	}
	slices.SortFunc(all, func(a, b Condition) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Type, b.Type))
	})
	e.status = all
	e.shown.Store(&all)
	return all
}

// podPolicies lists the policies a pod refers to: those whose selector chooses it
// and the one its mTLS mode asks for.
func (e *Engine) podPolicies(k nn, p *corev1.Pod) []string { return e.chosenPolicies(k.ns, p.Labels) }

// chosenPolicies is podPolicies for any workload with labels.
func (e *Engine) chosenPolicies(in string, labels map[string]string) []string {
	var out []string
	for _, ns := range distinct(append([]string{in}, e.set.roots...)) {
		e.policySelectors.choosing(ns, labels, func(policy nn) { out = append(out, policy.String()) })
	}
	slices.Sort(out)
	if name := e.peerPolicy(in, labels); name != "" {
		out = append(out, name)
	}
	return out
}

func workloadResource(w *workload.Workload) Resource {
	r := addressResource(w.Uid, &workload.Address{Type: &workload.Address_Workload{Workload: w}})
	if w.NetworkMode != workload.NetworkMode_HOST_NETWORK { // a shared address names nobody
		for _, a := range w.Addresses {
			r.Aliases = append(r.Aliases, alias(w.Network, a))
		}
	}
	return r
}

func serviceResource(s *workload.Service) Resource {
	r := addressResource(s.Namespace+"/"+s.Hostname, &workload.Address{Type: &workload.Address_Service{Service: s}})
	for _, a := range s.Addresses {
		if a.Length == nil { // nobody asks for a range by name
			r.Aliases = append(r.Aliases, alias(a.Network, a.Address))
		}
	}
	return r
}

func addressResource(name string, m *workload.Address) Resource {
	return Resource{Type: api.AddressType, Name: name, Message: m, Bytes: marshal(m)}
}

func authorizationResource(name string, m proto.Message) Resource {
	return Resource{Type: api.AuthorizationType, Name: name, Message: m, Bytes: marshal(m)}
}

func marshal(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic("BUG: a resource cannot be marshalled: " + err.Error()) // strings were read as UTF-8
	}
	return b
}
