package derive

import (
	"cmp"
	"net/netip"
	"slices"
)

// Resources returns every current resource of a type, sorted by name. It waits
// for an Apply under way.
func (e *Engine) Resources(typeURL string) []Resource {
	e.mu.RLock()
	defer e.mu.RUnlock()
	var out []Resource
	for _, made := range e.made {
		for _, r := range made {
			if r.Type == typeURL {
				out = append(out, r)
			}
		}
	}
	slices.SortFunc(out, func(a, b Resource) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Status returns the condition of every object that has one, sorted, as of the
// latest Apply. It must not be modified.
func (e *Engine) Status() []Condition {
	if p := e.shown.Load(); p != nil {
		return *p
	}
	return nil
}

// alias is the name network/ip by which a proxy may ask for a resource.
func alias(network string, addr []byte) string {
	a, ok := netip.AddrFromSlice(addr)
	if !ok {
		panic("BUG: an address of a resource has neither 4 nor 16 bytes")
	}
	return network + "/" + a.String()
}
