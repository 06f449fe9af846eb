package hamt

import "iter"

// Map is a persistent hash map, made with NewMap.
type Map[K comparable, V any] struct{ x Index[K, entry[K, V]] }

type entry[K comparable, V any] struct {
	key K
	val V
}

// NewMap returns an empty map. hash must be a pure function of the key.
func NewMap[K comparable, V any](hash func(K) uint64) Map[K, V] {
	return Map[K, V]{NewIndex(&By[K, entry[K, V]]{hash, func(e *entry[K, V]) K { return e.key }})}
}

// Len is the number of keys.
func (m Map[K, V]) Len() int { return m.x.n }

// Get returns the value of k. It does not allocate.
func (m Map[K, V]) Get(k K) (V, bool) {
	if e := m.x.Get(k); e != nil {
		return e.val, true
	}
	var zero V
	return zero, false
}

// Set returns the map with k set to v. With a token the receiver must not be
// used any more.
func (m Map[K, V]) Set(ed *Edit, k K, v V) Map[K, V] {
	return Map[K, V]{m.x.Set(ed, k, entry[K, V]{k, v})}
}

// Delete returns the map without k. With a token the receiver must not be
// used any more.
func (m Map[K, V]) Delete(ed *Edit, k K) Map[K, V] { return Map[K, V]{m.x.Delete(ed, k)} }

// All iterates in an order that is stable for one version.
func (m Map[K, V]) All() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for e := range m.x.All() {
			if !yield(e.key, e.val) {
				return
			}
		}
	}
}
