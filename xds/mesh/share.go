package mesh

import (
	"iter"
	"net/netip"
)

// Shares are the endpoints among which PickOther draws for a connection, each with
// the share of draws that it gets: together 1. Nothing comes of a service of which
// nothing can be picked.
func (s *Snapshot) Shares(svc *Service, from *Workload, dst netip.AddrPort, skip Skip) iter.Seq2[Choice, float64] {
	return func(yield func(Choice, float64) bool) {
		p := picker{svc: svc, from: from, set: s.Endpoints(svc.Host), dst: dst, skip: skip}
		p.target, _ = svc.Port(dst.Port())
		if p.set.Len() == 0 || p.set.Healthy() == 0 && !svc.AllowUnhealthy {
			return
		}
		best, total := p.best()
		for i := range p.set.Len() {
			e := p.set.at(i)
			if rank, why := p.rank(e); why != "" || rank != best {
				continue
			}
			c, _ := p.fit(e)
			if !yield(c, float64(e.Capacity)/float64(total)) {
				return
			}
		}
	}
}

// best is the highest rank and its total capacity; -1 without a fit endpoint.
func (p *picker) best() (best int, total uint64) {
	best = -1
	for i := range p.set.Len() {
		e := p.set.at(i)
		rank, why := p.rank(e)
		if why != "" {
			continue
		}
		if rank > best {
			best, total = rank, 0
		}
		if rank == best {
			total += uint64(e.Capacity)
		}
	}
	return best, total
}
