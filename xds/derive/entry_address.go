package derive

import (
	"net/netip"
	"slices"

	"github.com/ambit-mesh/ambit/xds/crd"
)

// inputAddresses notes which object has which addresses as a service, and marks
// the entries that share one: proxies choose by the client's namespace, then a
// Kubernetes service, then any, which is seldom what somebody meant.
func (e *Engine) inputAddresses(src source, before, after []netip.Prefix) {
	for _, p := range before {
		if !slices.Contains(after, p) {
			e.entries.owners.remove(p, src)
			e.markOwners(p)
		}
	}
	for _, p := range after {
		if !slices.Contains(before, p) {
			e.markOwners(p)
			e.entries.owners.add(p, src)
		}
	}
}

// markOwners marks the entries that have an address, with those that name the
// same hosts: another one may become canonical.
func (e *Engine) markOwners(p netip.Prefix) {
	for src := range e.entries.owners[p] {
		for _, own := range hostsIn(src.ns, e.entries.services[src.nn]) {
			if src.kind != "ServiceEntry" {
				break
			}
			for h := range e.entries.hosts[own.name] {
				e.touchHost(h)
			}
		}
	}
}

// sharedAddress finds the first other object that has an address, a Kubernetes
// service before entries.
func (e *Engine) sharedAddress(k nn, p netip.Prefix) (source, bool) {
	var best source
	for src := range e.entries.owners[p] {
		if src == (source{"ServiceEntry", k}) {
			continue
		}
		if best.kind == "" || src.kind < best.kind || src.kind == best.kind && src.nn.compare(best.nn) < 0 {
			best = src // "Service" < "ServiceEntry"
		}
	}
	return best, best.kind != ""
}

// takesAddress reports whether an entry declares an address of a Kubernetes
// service: it must never be what clients of other namespaces mean.
func (e *Engine) takesAddress(k nn, s *crd.ServiceEntrySpec) bool {
	return slices.ContainsFunc(addressesOf(s), func(p netip.Prefix) bool {
		by, shared := e.sharedAddress(k, p)
		return shared && by.kind == "Service"
	})
}

// judgeShared notes the addresses that others have too.
func (e *Engine) judgeShared(j *judgement, s *crd.ServiceEntrySpec) {
	for _, p := range addressesOf(s) {
		if by, shared := e.sharedAddress(j.nn, p); shared {
			j.add(ReasonConflict, "address %s is one of %s %s too: clients of other namespaces may reach that one", text(p), by.kind, by.nn)
		}
	}
}

func text(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}
