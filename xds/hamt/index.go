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

// Index is a persistent set of elements that are found by a key of theirs, which is not kept beside them.
type Index[K comparable, E any] struct {
	by   *By[K, E]
	root *node[E]
	n    int
}

// By says how elements are found. Both must be pure functions, and that of an element's key must say the same for as
// long as the element is in an index.
type By[K comparable, E any] struct {
	Hash func(K) uint64
	Key  func(*E) K
}

// node holds entries and children side by side, each in the order of its
// bitmap; below the last hash bit it is a plain list of colliding entries.
type node[E any] struct {
	edit     *Edit
	data     uint32 // slots with an entry
	sub      uint32 // slots with a child
	entries  []E
	children []*node[E]
}

// NewIndex returns an empty index.
func NewIndex[K comparable, E any](by *By[K, E]) Index[K, E] { return Index[K, E]{by: by} }

// Len is the number of elements.
func (m Index[K, E]) Len() int { return m.n }

// Get returns the element with key k, nil if there is none. It must not be written to. It does not allocate.
func (m Index[K, E]) Get(k K) *E {
	if m.root == nil {
		return nil
	}
	slot := m.root.slot(m.by.Hash(k))
	for i := range slot {
		if m.by.Key(&slot[i]) == k {
			return &slot[i]
		}
	}
	return nil
}

// Find is Get for who has the key in another form: with the hash of the key, and what tells that an element has it.
func (m Index[K, E]) Find(h uint64, is func(*E) bool) *E {
	if m.root == nil {
		return nil
	}
	slot := m.root.slot(h)
	for i := range slot {
		if is(&slot[i]) {
			return &slot[i]
		}
	}
	return nil
}

// slot are the elements among which those with hash h are: seldom more than one.
func (n *node[E]) slot(h uint64) []E {
	for shift := uint(0); shift < hashBits; shift += fan {
		bit := uint32(1) << (h >> shift & fanMask)
		if n.data&bit != 0 {
			i := bits.OnesCount32(n.data & (bit - 1))
			return n.entries[i : i+1]
		}
		if n.sub&bit == 0 {
			return nil
		}
		n = n.children[bits.OnesCount32(n.sub&(bit-1))]
	}
	return n.entries
}

// collided is where k is among entries whose hashes are equal, else -1.
func (m Index[K, E]) collided(n *node[E], k K) int {
	for i := range n.entries {
		if m.by.Key(&n.entries[i]) == k {
			return i
		}
	}
	return -1
}

// Set returns the index with e, whose key is k, in place of the element with
// that key. With a token the receiver must not be used any more.
func (m Index[K, E]) Set(ed *Edit, k K, e E) Index[K, E] {
	if m.root == nil {
		m.root = &node[E]{edit: ed}
	}
	var added bool
	m.root, added = m.set(m.root, ed, m.by.Hash(k), 0, k, e)
	if added {
		m.n++
	}
	return m
}

// owned returns n itself when the token may change it, else a copy.
func (n *node[E]) owned(ed *Edit) *node[E] {
	if ed != nil && n.edit == ed {
		return n
	}
	c := &node[E]{edit: ed, data: n.data, sub: n.sub}
	if len(n.entries) > 0 {
		c.entries = append(make([]E, 0, len(n.entries)+1), n.entries...)
	}
	if len(n.children) > 0 {
		c.children = append(make([]*node[E], 0, len(n.children)+1), n.children...)
	}
	return c
}

func (m Index[K, E]) set(n *node[E], ed *Edit, h uint64, shift uint, k K, e E) (*node[E], bool) {
	if shift >= hashBits {
		n = n.owned(ed)
		if i := m.collided(n, k); i >= 0 {
			n.entries[i] = e
			return n, false
		}
		n.entries = append(n.entries, e)
		return n, true
	}
	bit := uint32(1) << (h >> shift & fanMask)
	di, si := bits.OnesCount32(n.data&(bit-1)), bits.OnesCount32(n.sub&(bit-1))
	switch {
	case n.sub&bit != 0:
		child, added := m.set(n.children[si], ed, h, shift+fan, k, e)
		n = n.owned(ed)
		n.children[si] = child
		return n, added
	case n.data&bit == 0:
		n = n.owned(ed)
		n.data |= bit
		n.entries = insert(n.entries, di, e)
		return n, true
	}
	oldKey := m.by.Key(&n.entries[di])
	if oldKey == k {
		n = n.owned(ed)
		n.entries[di] = e
		return n, false
	}
	// The slot is taken by another key: both go one level down.
	child := &node[E]{edit: ed}
	child, _ = m.set(child, ed, m.by.Hash(oldKey), shift+fan, oldKey, n.entries[di])
	child, _ = m.set(child, ed, h, shift+fan, k, e)
	n = n.owned(ed)
	n.data &^= bit
	n.entries = remove(n.entries, di)
	n.sub |= bit
	n.children = insert(n.children, si, child)
	return n, true
}

// Delete returns the index without the element with key k. With a token the
// receiver must not be used any more.
func (m Index[K, E]) Delete(ed *Edit, k K) Index[K, E] {
	if m.root == nil {
		return m
	}
	root, ok := m.del(m.root, ed, m.by.Hash(k), 0, k)
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

func (m Index[K, E]) del(n *node[E], ed *Edit, h uint64, shift uint, k K) (*node[E], bool) {
	if shift >= hashBits {
		i := m.collided(n, k)
		if i < 0 {
			return n, false
		}
		n = n.owned(ed)
		n.entries = remove(n.entries, i)
		return n, true
	}
	bit := uint32(1) << (h >> shift & fanMask)
	di, si := bits.OnesCount32(n.data&(bit-1)), bits.OnesCount32(n.sub&(bit-1))
	if n.data&bit != 0 {
		if m.by.Key(&n.entries[di]) != k {
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
func (m Index[K, E]) All() iter.Seq[*E] {
	return func(yield func(*E) bool) {
		if m.root != nil {
			m.root.walk(yield)
		}
	}
}

func (n *node[E]) walk(yield func(*E) bool) bool {
	for i := range n.entries {
		if !yield(&n.entries[i]) {
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

// insert and remove change s, which the caller owns. It grows by little, since most nodes never become full.
func insert[T any](s []T, i int, v T) []T {
	if len(s) == cap(s) {
		s = append(make([]T, 0, len(s)+1+len(s)/4), s...)
	}
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
