package dir

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"

	"github.com/ambit-mesh/ambit/xds/crd"
)

// Table holds what every file says and what is in force because of it. Watch fills
// one from directories; fed by hand it is the same source without I/O. It belongs
// to one goroutine.
type Table struct {
	files   map[string]*file
	claims  map[id][]*Object // all files' versions of an object, in touch's order: the first wins
	inForce map[id]*Object
	dups    map[id]bool
	touched map[id]bool // since the last change
	fresh   []*Object   // of the last change: other versions, or at another place
}

// file is the last content of one file.
type file struct {
	docs     map[[32]byte]*content // decoded documents by hash, lines relative
	objects  map[id]*Object        // what the file contributes, last good versions included
	kept     map[id]bool           // of objects: last good versions
	failed   []id                  // objects that are there and cannot be used
	broken   bool                  // something is there that does not say what it is
	problems []Problem
	counted  []string
	cannot   *Problem // why the file could not be read at all
}

// NewTable returns a table without files.
func NewTable() *Table {
	return &Table{files: map[string]*file{}, claims: map[id][]*Object{}, inForce: map[id]*Object{}, dups: map[id]bool{}, touched: map[id]bool{}}
}

// Put takes a file's content into account. Documents that did not change are not
// decoded again.
func (t *Table) Put(path string, data []byte) {
	old := t.files[path]
	if old == nil {
		old = &file{}
	}
	f := &file{docs: map[[32]byte]*content{}, objects: map[id]*Object{}, kept: map[id]bool{}}
	var all content
	for _, ch := range split(data) {
		hash := sha256.Sum256(ch.data)
		doc := old.docs[hash]
		if doc == nil {
			c := decodeChunk(path, ch.data)
			for _, o := range c.objects {
				o.Line += ch.line - 1
			}
			doc = &c
		}
		f.docs[hash] = doc
		c := *doc
		c.problems = slices.Clone(c.problems)
		for i := range c.problems {
			c.problems[i].Line += ch.line - 1
		}
		all.add(c)
	}
	f.counted = all.unenforced
	f.problems, f.failed, f.broken = all.problems, all.failed, all.broken
	for i, o := range all.objects {
		if all.use[i] != enforced {
			continue
		}
		k := o.id()
		if first, dup := f.objects[k]; dup {
			f.problems = append(f.problems, duplicate(o, first))
			continue
		}
		f.objects[k] = o
	}
	for _, k := range all.failed {
		f.keep(old, k)
	}
	if all.broken {
		for k := range old.objects {
			f.keep(old, k)
		}
	}
	sortProblems(f.problems)
	t.replace(path, f)
}

// keep leaves the last good version of an object in force.
func (f *file) keep(old *file, k id) {
	if o, had := old.objects[k]; had && f.objects[k] == nil {
		f.objects[k] = o
		f.kept[k] = true
	}
}

// recall puts in force what was the last good version before a restart, of
// objects that are there and cannot be used, or may be: their file cannot be read
// as far as them. Current objects always win. It returns what it took.
func (t *Table) recall(past []*Object) (taken []*Object) {
	failed := map[id]string{} // → file
	for path, f := range t.files {
		for _, k := range f.failed {
			failed[k] = path
		}
	}
	for _, o := range past {
		k := o.id()
		path, isFailed := failed[k]
		if len(t.claims[k]) > 0 || !isFailed && !t.uncertain(o.File) {
			continue
		}
		if isFailed {
			o.File = path
		}
		f := file{}
		if was := t.files[o.File]; was != nil {
			f = *was
		}
		f.objects, f.kept = maps.Clone(f.objects), maps.Clone(f.kept)
		if f.objects == nil {
			f.objects, f.kept = map[id]*Object{}, map[id]bool{}
		}
		f.objects[k] = o
		f.kept[k] = true
		t.replace(o.File, &f)
		taken = append(taken, o)
	}
	return taken
}

// uncertain reports whether a file may say more than could be read.
func (t *Table) uncertain(path string) bool {
	if f := t.files[path]; f != nil {
		return f.broken || f.cannot != nil
	}
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		if f := t.files[dir]; f != nil && f.cannot != nil {
			return true
		}
		if dir == filepath.Dir(dir) {
			return false
		}
	}
}

// cannotRead reports a file that exists and cannot be read; what it said stays.
func (t *Table) cannotRead(path, msg, hint string) {
	f := file{}
	if old := t.files[path]; old != nil {
		f = *old
	}
	f.cannot = &Problem{File: path, Message: msg, Hint: hint}
	t.replace(path, &f)
}

// Remove takes into account that a file is gone.
func (t *Table) Remove(path string) {
	t.replace(path, &file{})
	delete(t.files, path)
}

func (t *Table) replace(path string, f *file) {
	old := t.files[path]
	t.files[path] = f
	if old != nil {
		for k, o := range old.objects {
			if f.objects[k] != o {
				t.claims[k] = slices.DeleteFunc(t.claims[k], func(c *Object) bool { return c == o })
				t.touch(k)
			}
		}
	}
	for k, o := range f.objects {
		if old == nil || old.objects[k] != o {
			t.claims[k] = append(t.claims[k], o)
			t.touch(k)
		} else if old.kept[k] != f.kept[k] {
			t.touch(k)
		}
	}
}

// touch puts an object's claims in order and marks it for the next change.
func (t *Table) touch(k id) {
	claims := t.claims[k]
	slices.SortStableFunc(claims, func(a, b *Object) int {
		switch {
		case t.isKept(a) == t.isKept(b):
			return cmp.Compare(a.File, b.File)
		case t.isKept(a):
			return 1
		}
		return -1
	})
	delete(t.dups, k)
	switch {
	case len(claims) == 0:
		delete(t.claims, k)
	case len(claims) > 1:
		t.dups[k] = true
	}
	t.touched[k] = true
}

// isKept reports whether a claim is a last good version: what a file says now,
// in another one, wins over it.
func (t *Table) isKept(o *Object) bool {
	f := t.files[o.File]
	return f != nil && f.kept[o.id()]
}

// Change returns what differs from the previous call, in a stable order.
func (t *Table) Change() Change {
	c := Change{Unenforced: map[string]int{}}
	t.fresh = nil
	for _, k := range slices.SortedFunc(maps.Keys(t.touched), id.compare) {
		was := t.inForce[k]
		claims := t.claims[k]
		switch {
		case len(claims) == 0 && was != nil:
			delete(t.inForce, k)
			c.Deletes = append(c.Deletes, was.Key())
		case len(claims) > 0:
			t.inForce[k] = claims[0]
			if was != claims[0] {
				t.fresh = append(t.fresh, claims[0])
			}
			if was == nil || !reflect.DeepEqual(was.Value, claims[0].Value) {
				c.Upserts = append(c.Upserts, claims[0])
			}
		}
	}
	clear(t.touched)
	for _, path := range slices.Sorted(maps.Keys(t.files)) {
		f := t.files[path]
		if f.cannot != nil {
			c.Problems = append(c.Problems, *f.cannot)
		}
		c.Problems = append(c.Problems, f.problems...)
		for _, name := range f.counted {
			c.Unenforced[name]++
		}
	}
	for k := range t.dups {
		for _, loser := range t.claims[k][1:] {
			if t.isKept(loser) {
				continue // what is wrong with it is said already
			}
			c.Problems = append(c.Problems, duplicate(loser, t.claims[k][0]))
		}
	}
	sortProblems(c.Problems)
	for k, o := range t.inForce {
		if k.kind != crd.MeshConfigKind {
			continue
		}
		for _, key := range o.Value.(*crd.Mesh).Config.Unenforced() {
			c.Unenforced[crd.MeshConfigKind+"."+key]++
		}
	}
	return c
}

func duplicate(loser, winner *Object) Problem {
	return Problem{
		File: loser.File, Line: loser.Line, Kind: loser.GVK.Kind, Namespace: loser.Namespace, Name: loser.Name,
		Message: fmt.Sprintf("is also defined in %s:%d, which is in force", winner.File, winner.Line),
		Hint:    "remove one of the two",
	}
}

func (o *Object) id() id { return id{o.GVK.Group, o.GVK.Kind, o.Namespace, o.Name} }

func (a id) compare(b id) int {
	return cmp.Or(cmp.Compare(a.group, b.group), cmp.Compare(a.kind, b.kind), cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
}
