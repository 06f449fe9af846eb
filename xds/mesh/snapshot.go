// Package mesh is what a proxy knows of the mesh: workloads, services and
// their endpoints, decoded and indexed.
//
//	wire message → Decode… → Txn.Put… → Commit → *Snapshot → lookups, Pick
//
// A Snapshot is immutable and any goroutine may read it. A change makes a new
// Snapshot that shares all but a few small nodes with the one before, so its
// cost does not grow with the mesh. Lookups do not allocate. A connection takes
// the immutable records it needs and must not keep the Snapshot.
//
// The package does no I/O, reads no clock and draws no randomness.
package mesh

import (
	"iter"
	"net/netip"
	"strings"

	"github.com/ambit-mesh/ambit/xds/hamt"
)

// podName finds the workload of a pod on its node, that the node agent hands over.
type podName struct{ ns, name string }

func hashPodName(n podName) uint64 { return hamt.Mix(hamt.HashString(n.name), hamt.HashString(n.ns)) }

// pods are the workloads of a node, several of one name best first.
type pods = hamt.Map[podName, []*Workload]

func hashHostname(h Hostname) uint64 {
	return hamt.Mix(hamt.HashString(h.Name), hamt.HashString(h.Namespace))
}

func hashNetAddr(a NetAddr) uint64 {
	return hamt.Mix(hamt.HashAddr(a.Addr), hamt.HashString(a.Network))
}

func hashNetPrefix(p NetPrefix) uint64 {
	return hamt.Mix(hamt.HashAddr(p.Prefix.Addr())+uint64(p.Prefix.Bits()), hamt.HashString(p.Network))
}

// Snapshot is one version of the mesh. A nil Snapshot is empty.
type Snapshot struct {
	workloads hamt.Index[string, *Workload]
	addrs     hamt.Index[NetAddr, holder]
	node      string // of which alone pods are found by name; "": of all
	nodes     hamt.Map[string, *pods]

	services  hamt.Map[Hostname, *Service]
	hosts     hamt.Map[string, []*Service]    // first seen first
	vips      hamt.Map[NetAddr, []*Service]   // first seen first
	cidrs     hamt.Map[NetPrefix, []*Service] // first seen first
	lengths   *prefixLengths                  // of the keys of cidrs
	endpoints hamt.Map[Hostname, *EndpointSet]
	names     hamt.Map[string, []*Workload] // pods' own DNS names; best first
}

// prefixLengths counts the ranges of each length, so that a lookup only probes
// lengths that occur.
type prefixLengths struct {
	v4 [33]int32
	v6 [129]int32
}

func (l *prefixLengths) of(a netip.Addr) []int32 {
	if a.Is4() {
		return l.v4[:]
	}
	return l.v6[:]
}

var empty = &Snapshot{
	workloads: hamt.NewIndex(byUID),
	addrs:     hamt.NewIndex(byAddr),
	nodes:     hamt.NewMap[string, *pods](hamt.HashString),
	services:  hamt.NewMap[Hostname, *Service](hashHostname),
	hosts:     hamt.NewMap[string, []*Service](hamt.HashString),
	vips:      hamt.NewMap[NetAddr, []*Service](hashNetAddr),
	cidrs:     hamt.NewMap[NetPrefix, []*Service](hashNetPrefix),
	lengths:   &prefixLengths{},
	endpoints: hamt.NewMap[Hostname, *EndpointSet](hashHostname),
	names:     newNames(),
}

// Empty is the snapshot of a mesh without anything.
func Empty() *Snapshot { return empty }

// EmptyOn is Empty for who asks for the pods of one node only; "" is every node.
func EmptyOn(node string) *Snapshot {
	s := *empty
	s.node = node
	return &s
}

// local reports whether the pods of a node are found by name. Workloads outside the cluster are on none.
func (s *Snapshot) local(node string) bool { return node != "" && (s.node == "" || node == s.node) }

func (s *Snapshot) orEmpty() *Snapshot {
	if s == nil {
		return empty
	}
	return s
}

// Workload returns the workload with a uid, nil if there is none.
func (s *Snapshot) Workload(uid string) *Workload {
	if w := s.orEmpty().workloads.Get(uid); w != nil {
		return *w
	}
	return nil
}

// WorkloadByAddr returns the workload that an address means: of several, a
// pod, then one that speaks HBONE.
func (s *Snapshot) WorkloadByAddr(network string, a netip.Addr) *Workload {
	if h := s.orEmpty().addrs.Get(NetAddr{network, a.Unmap()}); h != nil {
		return h.best
	}
	return nil
}

// Has reports whether there is what a name means: a workload's uid,
// network/address or namespace/hostname, whoever sees the service. A range that
// holds the address does not say what the address is.
func (s *Snapshot) Has(name string) bool {
	s = s.orEmpty()
	if s.Workload(name) != nil {
		return true
	}
	first, rest, ok := strings.Cut(name, "/")
	if !ok {
		return false
	}
	a, err := netip.ParseAddr(rest)
	if err != nil {
		return s.Service(Hostname{first, rest}) != nil
	}
	k := NetAddr{first, a.Unmap()}
	if s.addrs.Get(k) != nil {
		return true
	}
	_, ok = s.vips.Get(k)
	return ok
}

// LocalWorkload returns the workload of a pod on a node, if the snapshot knows of that node's pods.
func (s *Snapshot) LocalWorkload(node, ns, name string) *Workload {
	on, _ := s.orEmpty().nodes.Get(node)
	if on == nil {
		return nil
	}
	list, _ := on.Get(podName{ns, name})
	if len(list) == 0 {
		return nil
	}
	return list[0]
}

// WorkloadsOn iterates the workloads of a node.
func (s *Snapshot) WorkloadsOn(node string) iter.Seq[*Workload] {
	return func(yield func(*Workload) bool) {
		on, _ := s.orEmpty().nodes.Get(node)
		if on == nil {
			return
		}
		for _, list := range on.All() {
			for _, w := range list {
				if !yield(w) {
					return
				}
			}
		}
	}
}

// Service returns the service with a name, nil if there is none.
func (s *Snapshot) Service(h Hostname) *Service {
	svc, _ := s.orEmpty().services.Get(h)
	return svc
}

// ServiceByHostname returns the service that a client of a namespace means by
// a host name.
func (s *Snapshot) ServiceByHostname(host, clientNS string) *Service {
	list, _ := s.orEmpty().hosts.Get(host)
	svc, _ := prefer(list, clientNS)
	return svc
}

// ServiceByVIP returns the service that a client of a namespace means by an
// address. A range counts only when no service has the address itself.
func (s *Snapshot) ServiceByVIP(network string, a netip.Addr, clientNS string) *Service {
	s = s.orEmpty()
	a = a.Unmap()
	list, _ := s.vips.Get(NetAddr{network, a})
	if svc, _ := prefer(list, clientNS); svc != nil {
		return svc
	}
	if s.cidrs.Len() == 0 || !a.IsValid() {
		return nil
	}
	return s.serviceByCIDR(network, a, clientNS)
}

// serviceByCIDR: the client's own namespace first, then the longest prefix,
// then canonical.
func (s *Snapshot) serviceByCIDR(network string, a netip.Addr, clientNS string) *Service {
	var best *Service
	lengths := s.lengths.of(a)
	for bits := len(lengths) - 1; bits >= 0; bits-- {
		if lengths[bits] == 0 {
			continue
		}
		p, err := a.Prefix(bits)
		if err != nil {
			continue
		}
		list, _ := s.cidrs.Get(NetPrefix{network, p})
		svc, own := prefer(list, clientNS)
		if own {
			return svc
		}
		if best == nil {
			best = svc
		}
	}
	return best
}

// prefer picks among the services visible to a client: its own namespace's,
// then a canonical one, then the first seen.
func prefer(list []*Service, clientNS string) (svc *Service, own bool) {
	for _, s := range list {
		if !s.VisibleTo(clientNS) {
			continue
		}
		sOwn := s.Namespace == clientNS
		switch {
		case svc == nil, sOwn && !own, sOwn == own && s.Canonical && !svc.Canonical:
			svc, own = s, sOwn
		}
	}
	return svc, own
}

// Endpoints returns the endpoints of a service, also of one not known yet. It
// is never nil.
func (s *Snapshot) Endpoints(h Hostname) *EndpointSet {
	set, _ := s.orEmpty().endpoints.Get(h)
	if set == nil {
		return &noEndpoints
	}
	return set
}

// AllWorkloads iterates every workload.
func (s *Snapshot) AllWorkloads() iter.Seq[*Workload] {
	return func(yield func(*Workload) bool) {
		for w := range s.orEmpty().workloads.All() {
			if !yield(*w) {
				return
			}
		}
	}
}

// AllServices iterates every service.
func (s *Snapshot) AllServices() iter.Seq[*Service] {
	return func(yield func(*Service) bool) {
		for _, svc := range s.orEmpty().services.All() {
			if !yield(svc) {
				return
			}
		}
	}
}

// Workloads and Services are the numbers of each.
func (s *Snapshot) Workloads() int { return s.orEmpty().workloads.Len() }

// Services is the number of services.
func (s *Snapshot) Services() int { return s.orEmpty().services.Len() }
