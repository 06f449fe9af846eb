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
	services map[uint64]map[Hostname][]Port
	policies map[uint64][]string
	gateways map[uint64]*GatewayAddress
}

// remembered of each kind, with room for the services of a large mesh: some hundreds of KiB.
const remembered = 8192

// Intern replaces parts of w, which nobody else has seen yet, by equal ones.
func (n *Interner) Intern(w *Workload) {
	if len(w.Services) > 0 {
		var h uint64
		for host, ports := range w.Services { // in any order
			h += hamt.Mix(hashHostname(host), uint64(len(ports)))
		}
		w.Services = seen(&n.services, h, w.Services, func(a, b map[Hostname][]Port) bool { return maps.EqualFunc(a, b, slices.Equal) })
	}
	if len(w.Policies) > 0 {
		var h uint64
		for _, p := range w.Policies {
			h = hamt.Mix(h, hamt.HashString(p))
		}
		w.Policies = seen(&n.policies, h, w.Policies, slices.Equal)
	}
	w.Waypoint, w.NetworkGateway = n.gateway(w.Waypoint), n.gateway(w.NetworkGateway)
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
