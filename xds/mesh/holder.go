package mesh

import (
	"net/netip"

	"github.com/ambit-mesh/ambit/xds/hamt"
)

// holder is who has an address. The index does not keep the address itself where its workload does: nearly every
// workload has one address, for itself.
type holder struct {
	best   *Workload
	shared *shared // nil: best has no other address, and nobody else has this one
}

type shared struct {
	addr   netip.Addr
	others []*Workload // best first
}

func newHolder(a netip.Addr, best *Workload, others []*Workload) holder {
	h := holder{best: best}
	if len(others) > 0 || len(best.Addrs) != 1 {
		h.shared = &shared{a, others}
	}
	return h
}

// all is a new list of everybody, best first.
func (h *holder) all() []*Workload {
	list := []*Workload{h.best}
	if h.shared != nil {
		list = append(list, h.shared.others...)
	}
	return list
}

var (
	byUID  = &hamt.By[string, *Workload]{Hash: hamt.HashString, Key: func(w **Workload) string { return (*w).UID }}
	byAddr = &hamt.By[NetAddr, holder]{Hash: hashNetAddr, Key: func(h *holder) NetAddr {
		if h.shared != nil {
			return NetAddr{h.best.Network, h.shared.addr}
		}
		return NetAddr{h.best.Network, h.best.Addrs[0]}
	}}
)
