package mesh

import (
	"maps"
	"slices"

	"github.com/ambit-mesh/ambit/xds/hamt"
)

// Interner lets workloads share what many have in common: a service's endpoints say of themselves, each anew, which
// services they serve on which ports, by which gateways they are reached and which policies count for them.
//
// It remembers what it has seen of late, up to a fixed number. It belongs to one goroutine; the zero value is
// usable.
type Interner struct {
	of       replicas
	traits   map[uint64]*Traits
	services map[uint64]map[Hostname][]Port
	policies map[uint64][]string
	gateways map[uint64]*GatewayAddress
}

// remembered of each kind, with room for the services of a large mesh: some hundreds of KiB.
const remembered = 8192

// Intern replaces the traits of w, which nobody else has seen yet, by equal ones.
func (n *Interner) Intern(w *Workload) {
	t := w.Traits
	if len(t.Services) > 0 {
		var h uint64
		for host, ports := range t.Services { // in any order
			h += hamt.Mix(hashHostname(host), uint64(len(ports)))
		}
		t.Services = seen(&n.services, h, t.Services, func(a, b map[Hostname][]Port) bool { return maps.EqualFunc(a, b, slices.Equal) })
	}
	if len(t.Policies) > 0 {
		var h uint64
		for _, p := range t.Policies {
			h = hamt.Mix(h, hamt.HashString(p))
		}
		t.Policies = seen(&n.policies, h, t.Policies, slices.Equal)
	}
	t.Waypoint, t.NetworkGateway = n.gateway(t.Waypoint), n.gateway(t.NetworkGateway)
	w.Traits = seen(&n.traits, t.hash(), t, (*Traits).equal)
}

func (n *Interner) gateway(g *GatewayAddress) *GatewayAddress {
	if g == nil {
		return nil
	}
	h := hamt.Mix(hashHostname(g.Host), hamt.HashAddr(g.Addr))
	return seen(&n.gateways, h, g, func(a, b *GatewayAddress) bool { return *a == *b })
}

// seen is what was remembered under h if it is equal; else v is remembered.
func seen[T any](in *map[uint64]T, h uint64, v T, equal func(a, b T) bool) T {
	was, have := (*in)[h]
	switch {
	case have && equal(was, v):
		return was
	case *in == nil || !have && len(*in) >= remembered:
		*in = map[uint64]T{}
	}
	(*in)[h] = v
	return v
}

// hash tells most traits apart: replicas differ in health and in zones, and what runs elsewhere has another name.
func (t *Traits) hash() uint64 {
	h := hamt.Mix(hamt.HashString(t.Namespace), hamt.HashString(t.CanonicalName))
	h = hamt.Mix(h, hamt.HashString(t.ServiceAccount))
	h = hamt.Mix(h, hamt.HashString(t.Locality.Zone))
	h = hamt.Mix(h, hamt.HashString(t.CanonicalRevision))
	h = hamt.Mix(h, hamt.HashString(t.Hostname))
	for host := range t.Services { // in any order
		h += hashHostname(host)
	}
	for _, p := range t.Policies {
		h = hamt.Mix(h, hamt.HashString(p))
	}
	if t.Healthy {
		h++
	}
	return h
}

// Says reports whether w says what o says, which is not nil.
func (w *Workload) Says(o *Workload) bool {
	return w != nil && w.UID == o.UID && w.Name == o.Name && w.Node == o.Node && w.WorkloadName == o.WorkloadName && slices.Equal(w.Addrs, o.Addrs) &&
		slices.Equal(w.DNSNames, o.DNSNames) && (w.Traits == o.Traits || w.Traits.equal(o.Traits))
}

// equal reports whether both say the same.
func (t *Traits) equal(o *Traits) bool {
	return t.Namespace == o.Namespace && t.ServiceAccount == o.ServiceAccount && t.TrustDomain == o.TrustDomain &&
		t.Network == o.Network && t.ClusterID == o.ClusterID && t.Identity == o.Identity && t.Hostname == o.Hostname &&
		t.Tunnel == o.Tunnel && t.NetworkMode == o.NetworkMode && t.WorkloadType == o.WorkloadType &&
		t.Capacity == o.Capacity && t.NativeTunnel == o.NativeTunnel && t.Healthy == o.Healthy &&
		t.CanonicalName == o.CanonicalName && t.CanonicalRevision == o.CanonicalRevision &&
		slices.Equal(t.Policies, o.Policies) && t.Locality == o.Locality &&
		maps.EqualFunc(t.Services, o.Services, slices.Equal) &&
		same(t.Waypoint, o.Waypoint) && same(t.NetworkGateway, o.NetworkGateway) && same(t.AppTunnel, o.AppTunnel) &&
		t.SameNode == o.SameNode && t.AccessLog == o.AccessLog && t.Terminating == o.Terminating && t.StrictBy == o.StrictBy
}

// same: both point to the same, or to equal things.
func same[T comparable](a, b *T) bool { return a == b || a != nil && b != nil && *a == *b }
