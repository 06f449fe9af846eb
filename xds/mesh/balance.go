package mesh

import (
	"math/bits"
	"net/netip"

	"github.com/ambit-mesh/ambit/xds/api/workload"
)

// Choice is where a connection to a service goes.
type Choice struct {
	Endpoint Endpoint
	// Addr is the endpoint's address; invalid when it is to be resolved from
	// Workload.Hostname or reached through Workload.NetworkGateway.
	Addr netip.Addr
	Port uint16
}

// Reasons of Pick, part of the access log.
const (
	ReasonNoEndpoints  = "service has no endpoints"
	ReasonNoHealthy    = "service has no healthy endpoints"
	ReasonNoPort       = "no endpoint of the service serves the port"
	ReasonNoAddress    = "no endpoint of the service has a usable address"
	ReasonNoPreference = "no endpoint of the service matches its routing preference"
	ReasonNoCapacity   = "no endpoint of the service has capacity"
	ReasonNoOther      = "no other endpoint of the service"
)

// Skip says which workloads are not to be chosen; nil skips none.
type Skip func(*Workload) bool

// Pick chooses an endpoint of svc for a connection of from to dst, whose
// address tells the family and whose port is the service's. rnd is any random
// number: the same one gives the same choice. When nothing can be chosen, the
// sentence says why; otherwise it is empty.
//
// Endpoints are drawn in proportion to their capacity among the healthy ones
// that the service's mode allows. Of a PASSTHROUGH service nothing is to be
// picked: the caller keeps the original destination.
func (s *Snapshot) Pick(svc *Service, from *Workload, dst netip.AddrPort, rnd uint64) (Choice, string) {
	return s.pick(svc, from, dst, rnd, false, nil)
}

// PickOther is Pick among the endpoints that are not skipped. The service's
// mode holds for them as for all: STRICT stays strict, and FAILOVER goes to the
// best rank that is left.
func (s *Snapshot) PickOther(svc *Service, from *Workload, dst netip.AddrPort, rnd uint64, skip Skip) (Choice, string) {
	return s.pick(svc, from, dst, rnd, false, skip)
}

// PickWaypoint is Pick for a service that is a waypoint: an endpoint without a
// mapping for the port serves the port itself.
func (s *Snapshot) PickWaypoint(svc *Service, from *Workload, dst netip.AddrPort, rnd uint64, skip Skip) (Choice, string) {
	return s.pick(svc, from, dst, rnd, true, skip)
}

func (s *Snapshot) pick(svc *Service, from *Workload, dst netip.AddrPort, rnd uint64, waypoint bool, skip Skip) (Choice, string) {
	p := picker{svc: svc, from: from, set: s.Endpoints(svc.Host), dst: dst, rnd: rnd, waypoint: waypoint, skip: skip}
	p.target, _ = svc.Port(dst.Port())
	switch {
	case p.set.Len() == 0:
		return Choice{}, ReasonNoEndpoints
	case p.set.Healthy() == 0 && !svc.AllowUnhealthy:
		return Choice{}, ReasonNoHealthy
	}
	if c, ok := p.probe(); ok {
		return c, ""
	}
	return p.scan()
}

type picker struct {
	svc      *Service
	from     *Workload
	set      *EndpointSet
	dst      netip.AddrPort
	target   Port // of the service
	rnd      uint64
	waypoint bool
	skip     Skip

	// of the endpoint looked at last, which the next one's replica has too
	traits *Traits
	ports  []Port
}

// below draws a number in [0, n). (splitmix64)
func (p *picker) below(n uint64) uint64 {
	p.rnd += 0x9e3779b97f4a7c15
	z := p.rnd
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	hi, _ := bits.Mul64(z^z>>31, n)
	return hi
}

// probes bounds the tries before all endpoints are looked at. With half of the
// endpoints unfit, one connection in 65536 pays for the scan.
const probes = 16

// probe draws endpoints at random and takes the first fit one. It refuses in
// proportion to capacity, which keeps the draw unbiased, also when the scan
// comes after it.
func (p *picker) probe() (Choice, bool) {
	if p.ranked() {
		return Choice{}, false
	}
	for range probes {
		e := p.set.at(int(p.below(uint64(p.set.Len()))))
		c, why := p.fit(e)
		if why != "" {
			continue
		}
		if limit := uint64(p.set.maxCap); limit > 1 && p.below(limit) >= uint64(e.Capacity) {
			continue
		}
		return c, true
	}
	return Choice{}, false
}

func (p *picker) ranked() bool {
	return p.svc.Mode == workload.LoadBalancing_STRICT || p.svc.Mode == workload.LoadBalancing_FAILOVER
}

// scan looks at every endpoint twice: for the best rank and its total
// capacity, then for the one drawn.
func (p *picker) scan() (Choice, string) {
	best, total := -1, uint64(0)
	why := ReasonNoHealthy
	for i := range p.set.Len() {
		e := p.set.at(i)
		rank, reason := p.rank(e)
		if reason != "" {
			why = furthest(why, reason)
			continue
		}
		if rank > best {
			best, total = rank, 0
		}
		if rank == best {
			total += uint64(e.Capacity)
		}
	}
	if best < 0 {
		return Choice{}, why
	}
	if total == 0 {
		return Choice{}, ReasonNoCapacity
	}
	draw := p.below(total)
	for i := range p.set.Len() {
		e := p.set.at(i)
		rank, reason := p.rank(e)
		if reason != "" || rank != best {
			continue
		}
		if c := uint64(e.Capacity); draw >= c {
			draw -= c
			continue
		}
		c, _ := p.fit(e)
		return c, ""
	}
	panic("BUG: balance: drew beyond the total capacity")
}

// furthest is the reason of the endpoint that came closest to being chosen.
func furthest(a, b string) string {
	for _, r := range [...]string{ReasonNoOther, ReasonNoCapacity, ReasonNoPreference, ReasonNoAddress, ReasonNoPort} {
		if a == r || b == r {
			return r
		}
	}
	return a
}

// fit applies what does not depend on the other endpoints.
func (p *picker) fit(e *Workload) (Choice, string) {
	if !e.Healthy && !p.svc.AllowUnhealthy {
		return Choice{}, ReasonNoHealthy
	}
	port, ok := p.port(e)
	if !ok {
		return Choice{}, ReasonNoPort
	}
	a, ok := p.addr(e)
	if !ok {
		return Choice{}, ReasonNoAddress
	}
	if e.Capacity == 0 {
		return Choice{}, ReasonNoCapacity
	}
	if p.skip != nil && p.skip(e) {
		return Choice{}, ReasonNoOther
	}
	return Choice{Endpoint{e, p.ports}, a, port}, ""
}

// port: the endpoint's own mapping, the service's, and the service port itself
// where the endpoint is known to serve it.
func (p *picker) port(e *Workload) (uint16, bool) {
	if e.Traits != p.traits {
		p.traits, p.ports = e.Traits, e.Services[p.set.host]
	}
	serves := p.waypoint || e.AppTunnel != nil
	for i := range p.ports {
		if p.ports[i].Service == p.dst.Port() {
			if p.ports[i].Target > 0 {
				return p.ports[i].Target, true
			}
			serves = true
			break
		}
	}
	if p.target.Target > 0 {
		return p.target.Target, true
	}
	return p.dst.Port(), serves
}

// addr: a family that the service serves, if possible the destination's.
func (p *picker) addr(w *Workload) (netip.Addr, bool) {
	var other netip.Addr
	for _, a := range w.Addrs {
		switch {
		case p.svc.Families == workload.IPFamilies_IPV4_ONLY && !a.Is4(),
			p.svc.Families == workload.IPFamilies_IPV6_ONLY && a.Is4():
		case a.Is4() == p.dst.Addr().Unmap().Is4():
			return a, true
		case !other.IsValid():
			other = a
		}
	}
	if other.IsValid() || len(w.Addrs) > 0 {
		return other, other.IsValid()
	}
	// The gateway of a network is for those outside of it.
	viaGateway := w.NetworkGateway != nil && p.from != nil && p.from.Network != w.Network
	return other, w.Hostname != "" || viaGateway
}

// rank is higher for endpoints that match more of the routing preference.
func (p *picker) rank(e *Workload) (int, string) {
	if _, why := p.fit(e); why != "" {
		return 0, why
	}
	if !p.ranked() {
		return 0, ""
	}
	prefs := p.svc.Preference
	if p.svc.Mode == workload.LoadBalancing_STRICT {
		if p.matched(prefs, e) < len(prefs) {
			return 0, ReasonNoPreference
		}
		return 0, ""
	}
	// NETWORK in first place is preferred, not required: the others rank
	// within the same and within other networks.
	if len(prefs) > 0 && prefs[0] == workload.LoadBalancing_NETWORK {
		rank := p.matched(prefs[1:], e)
		if p.matches(prefs[0], e) {
			rank += len(prefs)
		}
		return rank, ""
	}
	return p.matched(prefs, e), ""
}

// matched counts the leading preferences that an endpoint matches.
func (p *picker) matched(prefs []Scope, w *Workload) int {
	for i, scope := range prefs {
		if !p.matches(scope, w) {
			return i
		}
	}
	return len(prefs)
}

func (p *picker) matches(scope Scope, w *Workload) bool {
	if p.from == nil {
		return false
	}
	switch scope {
	case workload.LoadBalancing_REGION:
		return p.from.Locality.Region == w.Locality.Region
	case workload.LoadBalancing_ZONE:
		return p.from.Locality.Zone == w.Locality.Zone
	case workload.LoadBalancing_SUBZONE:
		return p.from.Locality.Subzone == w.Locality.Subzone
	case workload.LoadBalancing_NODE:
		return p.from.Node == w.Node
	case workload.LoadBalancing_CLUSTER:
		return p.from.ClusterID == w.ClusterID
	case workload.LoadBalancing_NETWORK:
		return p.from.Network == w.Network
	}
	return false
}
