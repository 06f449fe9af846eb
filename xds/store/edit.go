package store

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/turn"
)

// edit is one change under way; the store's lock is held.
type edit struct {
	s        *Store
	old      *View
	mesh     *mesh.Txn
	policies *policy.Txn

	workloads []string // touched, by uid, each once
	services  map[mesh.Hostname]bool
	keys      map[string]bool // touched policies
}

func (s *Store) begin() *edit {
	old := s.View()
	return &edit{
		s: s, old: old, mesh: old.Mesh.Edit(), policies: old.Policies.Edit(),
		services: map[mesh.Hostname]bool{}, keys: map[string]bool{},
	}
}

// addresses applies workloads and services.
func (e *edit) addresses(d client.Delta) (rejects []client.Reject) {
	var others turn.Taker
	for _, r := range d.Added {
		if err := e.address(r); err != nil {
			rejects = append(rejects, client.Reject{Name: r.Name, Reason: err.Error()})
		}
		others.Next()
	}
	for _, name := range d.Removed {
		delete(e.s.raws.known, name)
		e.removeAddress(name)
		others.Next()
	}
	return rejects
}

// decoded decodes a workload or a service, puts it in force or holds it back, and returns which it is then.
func (e *edit) decoded(r client.Resource, sum [2]uint64) (k raw, err error) {
	k.sum = sum
	if r.TypeURL != api.AddressType {
		return k, fmt.Errorf("value has type %s, want %s", r.TypeURL, api.AddressType)
	}
	if w := e.s.shared.Replica(r.Value, r.Name); w != nil {
		w.Source = sum
		k.workload = e.putWorkload(w)
		return k, nil
	}
	var a workload.Address
	if err := proto.Unmarshal(r.Value, &a); err != nil {
		return k, fmt.Errorf("decode address: %w", err)
	}
	switch v := a.GetType().(type) {
	case *workload.Address_Workload:
		w, err := mesh.DecodeWorkload(v.Workload)
		if err != nil {
			return k, err
		}
		w.Source = k.sum
		w.Adopt(r.Name) // kept once
		e.s.shared.Intern(w)
		e.s.shared.Remember(r.Value, w)
		k.workload = e.putWorkload(w)
	case *workload.Address_Service:
		svc, err := mesh.DecodeService(v.Service)
		if err != nil {
			return k, err
		}
		if old := e.mesh.Service(svc.Host); reflect.DeepEqual(old, svc) {
			svc = old // sent again, as putWorkload says
		} else {
			e.mesh.PutService(svc)
			e.services[svc.Host] = true
		}
		k.service = svc
	default:
		return k, fmt.Errorf("address is neither a workload nor a service that this version knows")
	}
	return k, nil
}

// removeAddress: a name is a uid, else namespace/hostname, of which a further
// part is ignored.
func (e *edit) removeAddress(name string) {
	if e.mesh.Workload(name) != nil {
		e.dropHeld(name)
		e.count(e.mesh.Workload(name), -1)
		e.touch(name)
		e.mesh.RemoveWorkload(name)
		return
	}
	if parts := strings.SplitN(name, "/", 3); len(parts) >= 2 {
		h := mesh.Hostname{Namespace: parts[0], Name: parts[1]}
		if e.mesh.RemoveService(h) {
			e.services[h] = true
		}
	}
}

// putWorkload takes a version in force or holds it back. What is sent again as
// it was, by a control plane that does not know what this proxy has, is no
// change: nothing is decided anew for it, however much of it there is. It
// returns the version that stands for w: w, or an equal one.
func (e *edit) putWorkload(w *mesh.Workload) *mesh.Workload {
	e.dropHeld(w.UID)
	old := e.mesh.Workload(w.UID)
	if old.Says(w) {
		return old
	}
	e.count(w, 1)
	if old != nil && samePod(old, w) && e.missing(w) != "" {
		e.s.held[w.UID] = held{w, time.Now().Add(HoldBack)}
		return w
	}
	e.count(old, -1)
	e.touch(w.UID)
	e.mesh.PutWorkload(w)
	return w
}

// touch notes that a workload is about to change.
func (e *edit) touch(uid string) {
	if e.mesh.Workload(uid) == e.old.Mesh.Workload(uid) { // it has not been before
		e.workloads = append(e.workloads, uid)
	}
}

// samePod: the version before can stand in for the new one.
func samePod(a, b *mesh.Workload) bool {
	return a.Identity == b.Identity && a.Network == b.Network && a.Node == b.Node && slices.Equal(a.Addrs, b.Addrs)
}

func (e *edit) dropHeld(uid string) {
	if h, ok := e.s.held[uid]; ok {
		e.count(h.w, -1)
		delete(e.s.held, uid)
	}
}

func (e *edit) count(w *mesh.Workload, by int) {
	if w == nil {
		return
	}
	for _, key := range w.Policies {
		if e.s.named[key] += by; e.s.named[key] == 0 {
			delete(e.s.named, key)
		}
	}
}

func (e *edit) missing(w *mesh.Workload) string {
	for _, key := range w.Policies {
		if e.policies.Get(key) == nil {
			return key
		}
	}
	return ""
}

// authorizations applies policies.
func (e *edit) authorizations(d client.Delta) (rejects []client.Reject) {
	for _, r := range d.Added {
		if err := e.authorization(r); err != nil {
			rejects = append(rejects, client.Reject{Name: r.Name, Reason: err.Error()})
		}
	}
	for _, key := range d.Removed {
		if e.policies.Get(key) != nil {
			if _, known := e.s.dying[key]; !known {
				e.s.dying[key] = time.Now().Add(HoldBack)
			}
		}
	}
	return rejects
}

func (e *edit) authorization(r client.Resource) error {
	if r.TypeURL != api.AuthorizationType {
		return fmt.Errorf("value has type %s, want %s", r.TypeURL, api.AuthorizationType)
	}
	var a security.Authorization
	if err := proto.Unmarshal(r.Value, &a); err != nil {
		return fmt.Errorf("decode authorization: %w", err)
	}
	if key := a.GetNamespace() + "/" + a.GetName(); e.policies.Get(key) != nil && proto.Equal(e.policies.Get(key).Source, &a) {
		delete(e.s.dying, key)
		return nil // sent again, as putWorkload says
	}
	p, err := policy.Compile(&a)
	if err != nil {
		return err
	}
	for _, problem := range p.Problems {
		e.s.log.Warn("policy has a term that is not understood; it is applied more strictly", "err", problem)
	}
	delete(e.s.dying, p.Key)
	e.policies.PutPolicy(p)
	e.keys[p.Key] = true
	return nil
}

// settle ends the hold-backs that are over: because what was waited for is
// there, or because time is up.
func (e *edit) settle(now time.Time) {
	for uid, h := range e.s.held {
		missing := e.missing(h.w)
		if missing != "" && now.Before(h.deadline) {
			continue
		}
		if missing != "" {
			e.s.log.Warn("workload names a policy that did not come; it denies from now on", "workload", uid, "policy", missing)
		}
		delete(e.s.held, uid)
		e.count(e.mesh.Workload(uid), -1)
		e.touch(uid)
		e.mesh.PutWorkload(h.w)
	}
	for key, deadline := range e.s.dying {
		p := e.policies.Get(key)
		if p != nil && p.Scope == policy.Selector && e.s.named[key] > 0 && now.Before(deadline) {
			continue
		}
		delete(e.s.dying, key)
		e.policies.Remove(key)
		e.keys[key] = true
	}
}

// commit publishes the change, if it is one, and tells the subscribers.
func (e *edit) commit() {
	now := time.Now()
	e.settle(now)
	e.s.schedule(now)
	next := &View{
		Mesh: e.old.Mesh, Policies: e.old.Policies, Generation: e.old.Generation + 1,
		Synced: e.s.synced[api.AddressType] && e.s.synced[api.AuthorizationType],
	}
	if len(e.workloads)+len(e.services) > 0 {
		next.Mesh = e.mesh.Commit()
	}
	if len(e.keys) > 0 {
		next.Policies = e.policies.Commit()
	}
	if next.Mesh == e.old.Mesh && next.Policies == e.old.Policies && next.Synced == e.old.Synced {
		return
	}
	ch := e.change(next)
	e.s.cur.Store(next)
	for _, f := range e.s.subs {
		(*f)(e.old, next, ch)
	}
}

func (e *edit) change(next *View) Change {
	ch := Change{Workloads: make([]WorkloadChange, 0, len(e.workloads))}
	var others turn.Taker
	for _, uid := range e.workloads {
		ch.Workloads = append(ch.Workloads, WorkloadChange{uid, e.old.Mesh.Workload(uid), next.Mesh.Workload(uid)})
		others.Next()
	}
	for h := range e.services {
		ch.Services = append(ch.Services, ServiceChange{h, e.old.Mesh.Service(h), next.Mesh.Service(h)})
	}
	slices.SortFunc(ch.Services, func(a, b ServiceChange) int { return strings.Compare(a.Host.String(), b.Host.String()) })
	for _, key := range slices.Sorted(maps.Keys(e.keys)) {
		ch.Policies = append(ch.Policies, PolicyChange{key, e.old.Policies.Get(key), next.Policies.Get(key)})
	}
	return ch
}

// schedule sets the timer to the next deadline.
func (s *Store) schedule(now time.Time) {
	var next time.Time
	earlier := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	for _, h := range s.held {
		earlier(h.deadline)
	}
	for _, t := range s.dying {
		earlier(t)
	}
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	if !next.IsZero() && !s.closed {
		s.timer = time.AfterFunc(next.Sub(now), s.expire)
	}
}
