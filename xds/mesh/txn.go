package mesh

import (
	"net/netip"
	"slices"
	"sort"

	"github.com/ambit-mesh/ambit/xds/hamt"
)

// Txn collects changes on top of a snapshot. It belongs to one goroutine and
// ends with Commit.
type Txn struct {
	s  Snapshot
	ed *hamt.Edit
}

// Edit starts a transaction; the snapshot itself does not change.
func (s *Snapshot) Edit() *Txn {
	return &Txn{s: *s.orEmpty(), ed: &hamt.Edit{}}
}

// Commit returns the new snapshot. The transaction must not be used again.
func (t *Txn) Commit() *Snapshot {
	t.ed = nil
	s := t.s
	t.s = Snapshot{}
	return &s
}

// Workload reads a workload within the transaction.
func (t *Txn) Workload(uid string) *Workload {
	return t.s.Workload(uid)
}

// Service reads a service within the transaction.
func (t *Txn) Service(h Hostname) *Service {
	s, _ := t.s.services.Get(h)
	return s
}

// PutWorkload adds or replaces the workload with its uid.
func (t *Txn) PutWorkload(w *Workload) {
	old := t.s.Workload(w.UID)
	t.s.workloads = t.s.workloads.Set(t.ed, w.UID, w)
	t.unindexWorkload(old, w)
	t.indexNames(old, w)
	if w.indexedByAddr() {
		for _, a := range w.Addrs {
			t.indexAddr(a, w, old)
		}
	}
	if t.s.local(w.Node) { // workloads outside the cluster are on no node, and many share a name
		t.editNode(w.Node, func(on pods) pods {
			k := podName{w.Namespace, w.Name}
			list, _ := on.Get(k)
			return on.Set(t.ed, k, withWorkload(list, w, old))
		})
	}
	for h := range w.Services {
		set, _ := t.s.endpoints.Get(h)
		if now := set.put(t.ed, h, w, old); now != set {
			t.s.endpoints = t.s.endpoints.Set(t.ed, h, now)
		}
	}
}

// RemoveWorkload removes a workload and its endpoints; it reports whether
// there was one.
func (t *Txn) RemoveWorkload(uid string) bool {
	old := t.s.Workload(uid)
	if old == nil {
		return false
	}
	t.s.workloads = t.s.workloads.Delete(t.ed, uid)
	t.unindexWorkload(old, nil)
	t.indexNames(old, nil)
	return true
}

// unindexWorkload removes what the index has of old and will not be replaced
// by next.
func (t *Txn) unindexWorkload(old, next *Workload) {
	if old == nil {
		return
	}
	if old.indexedByAddr() {
		for _, a := range old.Addrs {
			if next != nil && next.indexedByAddr() && next.Network == old.Network && next.HasAddr(a) {
				continue
			}
			t.unindexAddr(a, old)
		}
	}
	if t.s.local(old.Node) && (next == nil || next.Node != old.Node || next.Namespace != old.Namespace || next.Name != old.Name) {
		t.editNode(old.Node, func(on pods) pods {
			k := podName{old.Namespace, old.Name}
			list, _ := on.Get(k)
			return setOrDelete(on, t.ed, k, withoutWorkload(list, old))
		})
	}
	for h := range old.Services {
		if next != nil {
			if _, stays := next.Services[h]; stays {
				continue
			}
		}
		set, _ := t.s.endpoints.Get(h)
		if set == nil {
			continue
		}
		if now := set.remove(t.ed, old); now.Len() == 0 {
			t.s.endpoints = t.s.endpoints.Delete(t.ed, h)
		} else if now != set {
			t.s.endpoints = t.s.endpoints.Set(t.ed, h, now)
		}
	}
}

// indexAddr makes w, not old, one of those that have an address.
func (t *Txn) indexAddr(a netip.Addr, w, old *Workload) {
	k := NetAddr{w.Network, a}
	have := t.s.addrs.Get(k)
	if have == nil || have.shared == nil && have.best.UID == w.UID {
		t.s.addrs = t.s.addrs.Set(t.ed, k, newHolder(a, w, nil))
		return
	}
	list := withWorkload(have.all(), w, old)
	t.s.addrs = t.s.addrs.Set(t.ed, k, newHolder(a, list[0], list[1:]))
}

func (t *Txn) unindexAddr(a netip.Addr, old *Workload) {
	k := NetAddr{old.Network, a}
	have := t.s.addrs.Get(k)
	if have == nil {
		return
	}
	if list := withoutWorkload(have.all(), old); len(list) > 0 {
		t.s.addrs = t.s.addrs.Set(t.ed, k, newHolder(a, list[0], list[1:]))
	} else {
		t.s.addrs = t.s.addrs.Delete(t.ed, k)
	}
}

func (t *Txn) editNode(node string, f func(pods) pods) {
	on := hamt.NewMap[podName, []*Workload](hashPodName)
	if have, _ := t.s.nodes.Get(node); have != nil {
		on = *have
	}
	if on = f(on); on.Len() == 0 {
		t.s.nodes = t.s.nodes.Delete(t.ed, node)
	} else {
		t.s.nodes = t.s.nodes.Set(t.ed, node, &on)
	}
}

// PutService adds or replaces the service with its name.
func (t *Txn) PutService(s *Service) {
	old, _ := t.s.services.Get(s.Host)
	t.s.services = t.s.services.Set(t.ed, s.Host, s)
	t.unindexService(old, s)
	list, _ := t.s.hosts.Get(s.Host.Name)
	t.s.hosts = t.s.hosts.Set(t.ed, s.Host.Name, withService(list, s))
	for _, v := range s.VIPs {
		list, _ := t.s.vips.Get(v)
		t.s.vips = t.s.vips.Set(t.ed, v, withService(list, s))
	}
	for _, c := range s.CIDRs {
		list, known := t.s.cidrs.Get(c)
		t.s.cidrs = t.s.cidrs.Set(t.ed, c, withService(list, s))
		if !known {
			t.countLength(c, 1)
		}
	}
}

// RemoveService removes a service; its endpoints stay for the case that it
// comes back. It reports whether there was one.
func (t *Txn) RemoveService(h Hostname) bool {
	old, ok := t.s.services.Get(h)
	if !ok {
		return false
	}
	t.s.services = t.s.services.Delete(t.ed, h)
	t.unindexService(old, nil)
	return true
}

func (t *Txn) unindexService(old, next *Service) {
	if old == nil {
		return
	}
	if next == nil {
		list, _ := t.s.hosts.Get(old.Host.Name)
		t.s.hosts = setOrDelete(t.s.hosts, t.ed, old.Host.Name, withoutService(list, old.Host))
	}
	for _, v := range old.VIPs {
		if next != nil && slices.Contains(next.VIPs, v) {
			continue
		}
		list, _ := t.s.vips.Get(v)
		t.s.vips = setOrDelete(t.s.vips, t.ed, v, withoutService(list, old.Host))
	}
	for _, c := range old.CIDRs {
		if next != nil && slices.Contains(next.CIDRs, c) {
			continue
		}
		list, known := t.s.cidrs.Get(c)
		list = withoutService(list, old.Host)
		t.s.cidrs = setOrDelete(t.s.cidrs, t.ed, c, list)
		if known && len(list) == 0 {
			t.countLength(c, -1)
		}
	}
}

func (t *Txn) countLength(c NetPrefix, by int32) {
	l := *t.s.lengths
	l.of(c.Prefix.Addr())[c.Prefix.Bits()] += by
	t.s.lengths = &l
}

func setOrDelete[K comparable, T any](m hamt.Map[K, []T], ed *hamt.Edit, k K, list []T) hamt.Map[K, []T] {
	if len(list) == 0 {
		return m.Delete(ed, k)
	}
	return m.Set(ed, k, list)
}

// Lists in the index are short and immutable: each change copies.

// withWorkload and withoutWorkload find the place by the order of the list, so
// that an address or name that thousands share stays affordable.

func withWorkload(list []*Workload, w, old *Workload) []*Workload {
	i, found := placeOf(list, w)
	if found { // the version before, at the same place
		list = slices.Clone(list)
		list[i] = w
		return list
	}
	if old != nil { // the version before, at another place if at all
		list = withoutWorkload(list, old)
		i, _ = placeOf(list, w)
	}
	out := make([]*Workload, 0, len(list)+1)
	return append(append(append(out, list[:i]...), w), list[i:]...)
}

func withoutWorkload(list []*Workload, old *Workload) []*Workload {
	i, found := placeOf(list, old)
	if !found {
		return list
	}
	out := make([]*Workload, 0, len(list))
	return append(append(out, list[:i]...), list[i+1:]...)
}

func placeOf(list []*Workload, w *Workload) (int, bool) {
	i := sort.Search(len(list), func(i int) bool { return !list[i].betterAt(w) })
	return i, i < len(list) && list[i].UID == w.UID && !w.betterAt(list[i])
}

// withService keeps the place of a service that is replaced, so that "first
// seen" is stable.
func withService(list []*Service, s *Service) []*Service {
	out := make([]*Service, 0, len(list)+1)
	placed := false
	for _, have := range list {
		if have.Host == s.Host {
			if placed {
				continue
			}
			have, placed = s, true
		}
		out = append(out, have)
	}
	if !placed {
		out = append(out, s)
	}
	return out
}

func withoutService(list []*Service, h Hostname) []*Service {
	var out []*Service
	for _, have := range list {
		if have.Host != h {
			out = append(out, have)
		}
	}
	return out
}
