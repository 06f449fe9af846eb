package hamt

// Vector is a persistent sequence with cheap access by index; elements are
// appended, replaced, and removed at the end.
type Vector[T any] struct {
	root  *block[T]
	depth uint // levels above the leaves
	n     int
}

type block[T any] struct {
	edit *Edit
	sub  []*block[T]
	vals []T
}

// Len is the number of elements.
func (v Vector[T]) Len() int { return v.n }

// At returns a pointer to element i, which must not be written to.
func (v Vector[T]) At(i int) *T {
	b := v.root
	for d := v.depth; d > 0; d-- {
		b = b.sub[i>>(d*fan)&fanMask]
	}
	return &b.vals[i&fanMask]
}

// Set replaces element i, or appends when i is Len.
func (v Vector[T]) Set(ed *Edit, i int, x T) Vector[T] {
	if v.root == nil {
		v.root = &block[T]{edit: ed}
	}
	if i == 1<<((v.depth+1)*fan) { // full: one more level
		v.root = &block[T]{edit: ed, sub: []*block[T]{v.root}}
		v.depth++
	}
	v.root = v.root.set(ed, v.depth, i, x)
	v.n = max(v.n, i+1)
	return v
}

func (b *block[T]) owned(ed *Edit) *block[T] {
	if ed != nil && b.edit == ed {
		return b
	}
	c := &block[T]{edit: ed}
	if len(b.sub) > 0 {
		c.sub = append(make([]*block[T], 0, len(b.sub)+1), b.sub...)
	}
	if len(b.vals) > 0 {
		c.vals = append(make([]T, 0, len(b.vals)+1), b.vals...)
	}
	return c
}

func (b *block[T]) set(ed *Edit, d uint, i int, x T) *block[T] {
	b = b.owned(ed)
	j := i >> (d * fan) & fanMask
	if d == 0 {
		if j == len(b.vals) {
			b.vals = append(b.vals, x)
		} else {
			b.vals[j] = x
		}
		return b
	}
	if j == len(b.sub) {
		b.sub = append(b.sub, &block[T]{edit: ed})
	}
	b.sub[j] = b.sub[j].set(ed, d-1, i, x)
	return b
}

// Pop removes the last element.
func (v Vector[T]) Pop(ed *Edit) Vector[T] {
	v.n--
	if v.n == 0 {
		return Vector[T]{}
	}
	v.root = v.root.pop(ed, v.depth, v.n)
	for v.depth > 0 && len(v.root.sub) == 1 {
		v.root = v.root.sub[0]
		v.depth--
	}
	return v
}

func (b *block[T]) pop(ed *Edit, d uint, i int) *block[T] {
	b = b.owned(ed)
	j := i >> (d * fan) & fanMask
	if d == 0 {
		b.vals = remove(b.vals, j)
		return b
	}
	if i&(1<<(d*fan)-1) == 0 { // the child would become empty
		b.sub = remove(b.sub, j)
		return b
	}
	b.sub[j] = b.sub[j].pop(ed, d-1, i)
	return b
}
