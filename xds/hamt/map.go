// Package hamt holds persistent containers: a hash array mapped trie and a
// radix vector. A version is immutable and shares structure with the versions
// before it, so one change copies a path of a few small nodes whatever the
// size, and readers of older versions are not disturbed.
//
// Many changes in a row are made with an Edit token: nodes created under the
// token are changed in place until the token is dropped. A token belongs to
// one goroutine; versions made without a token, or after it was dropped, are
// safe for any goroutine.
package hamt

import (
	"iter"
	"math/bits"
)

// Edit marks nodes that its holder may change in place. It is not empty, so
// that two tokens never share an address.
type Edit struct{ _ byte }

const (
	fan      = 5 // bits per level: 32 children keep a copied node below 1 KiB
	fanMask  = 1<<fan - 1
	hashBits = 64
)

// Map is a persistent hash map. The zero value needs Hash to be set.
type Map[K comparable, V any] struct {
	hash func(K) uint64
	root *node[K, V]
	n    int
}

type entry[K comparable, V any] struct {
	key K
	val V
}

// node holds entries and children side by side, each in the order of its
// bitmap; below the last hash bit it is a plain list of colliding entries.
type node[K comparable, V any] struct {
	edit     *Edit
	data     uint32 // slots with an entry
	sub      uint32 // slots with a child
	entries  []entry[K, V]
	children []*node[K, V]
}

// NewMap returns an empty map. hash must be a pure function of the key.
func NewMap[K comparable, V any](hash func(K) uint64) Map[K, V] {
	return Map[K, V]{hash: hash}
}

// Len is the number of keys.
func (m Map[K, V]) Len() int { return m.n }

// Get returns the value of k. It does not allocate.
func (m Map[K, V]) Get(k K) (V, bool) {
	n := m.root
	if n != nil {
		h := m.hash(k)
		for shift := uint(0); shift < hashBits; shift += fan {
			bit := uint32(1) << (h >> shift & fanMask)
			if n.data&bit != 0 {
				e := &n.entries[bits.OnesCount32(n.data&(bit-1))]
				if e.key == k {
					return e.val, true
				}
				break
			}
			if n.sub&bit == 0 {
				break
			}
			n = n.children[bits.OnesCount32(n.sub&(bit-1))]
			if shift+fan >= hashBits {
				return n.collided(k)
			}
		}
	}
	var zero V
	return zero, false
}

func (n *node[K, V]) collided(k K) (V, bool) {
	for i := range n.entries {
		if n.entries[i].key == k {
			return n.entries[i].val, true
		}
	}
	var zero V
	return zero, false
}

// Set returns the map with k set to v. With a token the receiver must not be
// used any more.
func (m Map[K, V]) Set(ed *Edit, k K, v V) Map[K, V] {
	if m.root == nil {
		m.root = &node[K, V]{edit: ed}
	}
	var added bool
	m.root, added = m.set(m.root, ed, m.hash(k), 0, k, v)
	if added {
		m.n++
	}
	return m
}

// owned returns n itself when the token may change it, else a copy.
func (n *node[K, V]) owned(ed *Edit) *node[K, V] {
	if ed != nil && n.edit == ed {
		return n
	}
	c := &node[K, V]{edit: ed, data: n.data, sub: n.sub}
	c.entries = append(make([]entry[K, V], 0, len(n.entries)+1), n.entries...)
	c.children = append(make([]*node[K, V], 0, len(n.children)+1), n.children...)
	return c
}

func (m Map[K, V]) set(n *node[K, V], ed *Edit, h uint64, shift uint, k K, v V) (*node[K, V], bool) {
	if shift >= hashBits {
		n = n.owned(ed)
		for i := range n.entries {
			if n.entries[i].key == k {
				n.entries[i].val = v
				return n, false
			}
		}
		n.entries = append(n.entries, entry[K, V]{k, v})
		return n, true
	}
	bit := uint32(1) << (h >> shift & fanMask)
	di, si := bits.OnesCount32(n.data&(bit-1)), bits.OnesCount32(n.sub&(bit-1))
	switch {
	case n.sub&bit != 0:
		child, added := m.set(n.children[si], ed, h, shift+fan, k, v)
		n = n.owned(ed)
		n.children[si] = child
		return n, added
	case n.data&bit == 0:
		n = n.owned(ed)
		n.data |= bit
		n.entries = insert(n.entries, di, entry[K, V]{k, v})
		return n, true
	case n.entries[di].key == k:
		n = n.owned(ed)
		n.entries[di].val = v
		return n, false
	}
	// The slot is taken by another key: both go one level down.
	old := n.entries[di]
	child := &node[K, V]{edit: ed}
	child, _ = m.set(child, ed, m.hash(old.key), shift+fan, old.key, old.val)
	child, _ = m.set(child, ed, h, shift+fan, k, v)
	n = n.owned(ed)
	n.data &^= bit
	n.entries = remove(n.entries, di)
	n.sub |= bit
	n.children = insert(n.children, si, child)
	return n, true
}

// Delete returns the map without k. With a token the receiver must not be
// used any more.
func (m Map[K, V]) Delete(ed *Edit, k K) Map[K, V] {
	if m.root == nil {
		return m
	}
	root, ok := m.del(m.root, ed, m.hash(k), 0, k)
	if !ok {
		return m
	}
	m.root = root
	m.n--
	if m.n == 0 {
		m.root = nil
	}
	return m
}

func (m Map[K, V]) del(n *node[K, V], ed *Edit, h uint64, shift uint, k K) (*node[K, V], bool) {
	if shift >= hashBits {
		for i := range n.entries {
			if n.entries[i].key == k {
				n = n.owned(ed)
				n.entries = remove(n.entries, i)
				return n, true
			}
		}
		return n, false
	}
	bit := uint32(1) << (h >> shift & fanMask)
	di, si := bits.OnesCount32(n.data&(bit-1)), bits.OnesCount32(n.sub&(bit-1))
	if n.data&bit != 0 {
		if n.entries[di].key != k {
			return n, false
		}
		n = n.owned(ed)
		n.data &^= bit
		n.entries = remove(n.entries, di)
		return n, true
	}
	if n.sub&bit == 0 {
		return n, false
	}
	child, ok := m.del(n.children[si], ed, h, shift+fan, k)
	if !ok {
		return n, false
	}
	n = n.owned(ed)
	if len(child.children) > 0 || len(child.entries) > 1 {
		n.children[si] = child
		return n, true
	}
	// A child with one entry is pulled up, so that the shape depends on the
	// content only and never grows with the number of edits.
	n.sub &^= bit
	n.children = remove(n.children, si)
	if len(child.entries) == 1 {
		n.data |= bit
		n.entries = insert(n.entries, di, child.entries[0])
	}
	return n, true
}

// All iterates in an order that is stable for one version.
func (m Map[K, V]) All() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		if m.root != nil {
			m.root.walk(yield)
		}
	}
}

func (n *node[K, V]) walk(yield func(K, V) bool) bool {
	for i := range n.entries {
		if !yield(n.entries[i].key, n.entries[i].val) {
			return false
		}
	}
	for _, c := range n.children {
		if !c.walk(yield) {
			return false
		}
	}
	return true
}

// insert and remove change s, which the caller owns.
func insert[T any](s []T, i int, v T) []T {
	var zero T
	s = append(s, zero)
	copy(s[i+1:], s[i:])
	s[i] = v
	return s
}

func remove[T any](s []T, i int) []T {
	var zero T
	copy(s[i:], s[i+1:])
	s[len(s)-1] = zero
	return s[:len(s)-1]
}
