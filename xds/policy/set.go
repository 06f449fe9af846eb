package policy

import (
	"iter"
	"slices"

	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/hamt"
)

// Set is a version of all policies. A nil Set is empty.
type Set struct {
	policies hamt.Map[string, *Policy]
	global   *group
	spaces   hamt.Map[string, *group] // policies of NAMESPACE scope
	memo     memo
}

// group is the policies of one scope that are considered together.
type group struct{ class [classes]*index }

// Policies of a group are kept apart by what they do.
const (
	allowClass = iota
	denyClass
	dryAllowClass
	dryDenyClass
	classes
)

func (p *Policy) class() int {
	c := int(p.Action)
	if p.DryRun {
		c += dryAllowClass
	}
	return c
}

func (p *Policy) refs() []ref {
	out := make([]ref, len(p.rules))
	for i := range out {
		out[i] = ref{p, i}
	}
	return out
}

var (
	noRules    = newIndex()
	emptyGroup = &group{[classes]*index{noRules, noRules, noRules, noRules}}
)

// Empty returns a Set without policies.
func Empty() *Set {
	return &Set{
		policies: hamt.NewMap[string, *Policy](hamt.HashString),
		global:   emptyGroup,
		spaces:   hamt.NewMap[string, *group](hamt.HashString),
	}
}

var none = Empty()

func (s *Set) orEmpty() *Set {
	if s == nil {
		return none
	}
	return s
}

// Get returns a policy, nil if it is not known.
func (s *Set) Get(key string) *Policy {
	p, _ := s.orEmpty().policies.Get(key)
	return p
}

// Len is the number of policies.
func (s *Set) Len() int { return s.orEmpty().policies.Len() }

// All iterates the policies.
func (s *Set) All() iter.Seq[*Policy] {
	return func(yield func(*Policy) bool) {
		for _, p := range s.orEmpty().policies.All() {
			if !yield(p) {
				return
			}
		}
	}
}

// Txn collects changes on top of a Set. It belongs to one goroutine.
type Txn struct {
	base    *Set
	changes map[string]*Policy // nil: removed
}

// Edit starts a transaction; the Set itself does not change.
func (s *Set) Edit() *Txn { return &Txn{base: s.orEmpty(), changes: map[string]*Policy{}} }

// Put compiles and adds or replaces a policy. A Problem that is Rejected means
// that the version before stays in force.
func (t *Txn) Put(a *security.Authorization) []Problem {
	p, err := Compile(a)
	if err != nil {
		problem, ok := err.(Problem)
		if !ok {
			panic("BUG: policy: Compile failed without a Problem")
		}
		return []Problem{problem}
	}
	t.PutPolicy(p)
	return p.Problems
}

// PutPolicy adds or replaces a compiled policy.
func (t *Txn) PutPolicy(p *Policy) { t.changes[p.Key] = p }

// Get reads a policy within the transaction.
func (t *Txn) Get(key string) *Policy {
	if p, changed := t.changes[key]; changed {
		return p
	}
	return t.base.Get(key)
}

// Remove removes a policy and reports whether there was one.
func (t *Txn) Remove(key string) bool {
	had := t.Get(key) != nil
	t.changes[key] = nil
	return had
}

// Commit returns the new Set. The transaction must not be used again.
func (t *Txn) Commit() *Set {
	s := &Set{policies: t.base.policies, global: t.base.global, spaces: t.base.spaces}
	ed := &hamt.Edit{}
	groups := map[string]*regroup{} // by namespace, "" is global
	at := func(p *Policy) *regroup {
		ns := ""
		if p.Scope == Namespace {
			ns = p.Namespace
		}
		g := groups[ns]
		if g == nil {
			g = &regroup{}
			groups[ns] = g
		}
		return g
	}
	for key, p := range t.changes {
		old := t.base.Get(key)
		if old != nil && old.Scope != Selector {
			at(old).remove(old)
		}
		if p != nil && p.Scope != Selector {
			at(p).add(p)
		}
		if p != nil {
			s.policies = s.policies.Set(ed, key, p)
		} else {
			s.policies = s.policies.Delete(ed, key)
		}
	}
	for ns, edit := range groups {
		if ns == "" {
			s.global = edit.on(s.global)
			continue
		}
		old, known := s.spaces.Get(ns)
		if !known {
			old = emptyGroup
		}
		if g := edit.on(old); g.policies() > 0 {
			s.spaces = s.spaces.Set(ed, ns, g)
		} else {
			s.spaces = s.spaces.Delete(ed, ns)
		}
	}
	return s
}

// regroup is the changes to one group.
type regroup struct {
	gone, come [classes][]ref
	goneKeys   [classes]map[string]bool
	comeKeys   [classes][]string
	count      [classes]int
	touched    [classes]bool
}

func (e *regroup) add(p *Policy) {
	c := p.class()
	e.come[c] = append(e.come[c], p.refs()...)
	e.comeKeys[c] = append(e.comeKeys[c], p.Key)
	e.count[c]++
	e.touched[c] = true
}

func (e *regroup) remove(p *Policy) {
	c := p.class()
	e.gone[c] = append(e.gone[c], p.refs()...)
	if e.goneKeys[c] == nil {
		e.goneKeys[c] = map[string]bool{}
	}
	e.goneKeys[c][p.Key] = true
	e.count[c]--
	e.touched[c] = true
}

func (e *regroup) on(old *group) *group {
	g := *old
	for c := range classes {
		if !e.touched[c] {
			continue
		}
		x := *g.class[c]
		x.policies += e.count[c]
		x.keys = e.keys(c, x.keys)
		x.apply(e.gone[c], e.come[c])
		g.class[c] = &x
	}
	return &g
}

// keys is what the sorted keys of a class become.
func (e *regroup) keys(c int, old []string) []string {
	out := make([]string, 0, len(old)+len(e.comeKeys[c]))
	for _, k := range old {
		if !e.goneKeys[c][k] {
			out = append(out, k)
		}
	}
	out = append(out, e.comeKeys[c]...)
	slices.Sort(out)
	return out
}

func (g *group) policies() int {
	n := 0
	for _, x := range g.class {
		n += x.policies
	}
	return n
}

// groupOf compiles selector policies into one group.
func groupOf(list []*Policy) *group {
	var e regroup
	for _, p := range list {
		e.add(p)
	}
	return e.on(emptyGroup)
}

// first returns the lowest rule of one policy that matches.
func (p *Policy) first(f *facts) (ref, bool) {
	if p.own != nil {
		return p.own.first(f)
	}
	i := slices.IndexFunc(p.rules, func(r rule) bool { return r.matches(f) })
	return ref{p, i}, i >= 0
}
