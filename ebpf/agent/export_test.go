package agent

import "hash/maphash"

// ByPath has pods at different paths be in different namespaces.
func (a *Agent) ByPath() {
	seed := maphash.MakeSeed()
	a.number = func(_ uint64, path string) uint64 { return maphash.String(seed, path) }
}
