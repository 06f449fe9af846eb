package policy

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/ambit-mesh/ambit/xds/hamt"
)

// kind is what an anchor demands of the client.
type kind uint8

const (
	anyClient kind = iota // nothing
	noPeer                // no identity
	principalExact
	principalPrefix
	principalSuffix
	accountExact
	namespaceExact
	namespacePrefix
	namespaceSuffix
	source
	kinds
)

// anchor is a necessary condition of a rule: one demand on the client, and a
// port or 0 for any. Each rule stands in the lists of all its anchors, and a
// connection looks only into the lists of the anchors it fulfils.
type anchor struct {
	kind   kind
	port   uint16
	a, b   string
	prefix netip.Prefix
}

func hashAnchor(k anchor) uint64 {
	h := uint64(k.kind)<<16 | uint64(k.port)
	switch k.kind {
	case source:
		return hamt.Mix(h+uint64(k.prefix.Bits())<<32, hamt.HashAddr(k.prefix.Addr()))
	case accountExact:
		return hamt.Mix(h, hamt.Mix(hamt.HashString(k.a), hamt.HashString(k.b)))
	}
	return hamt.Mix(h, hamt.HashString(k.a))
}

// ref is a rule of a policy.
type ref struct {
	p *Policy
	i int // index of the rule
}

func compareRefs(a, b ref) int {
	if c := strings.Compare(a.p.Key, b.p.Key); c != 0 {
		return c
	}
	return a.i - b.i
}

// usage counts the anchors of a kind, so that a lookup only probes what
// occurs: with and without a port, and for prefixes and suffixes by length.
type usage struct {
	anyPort, withPort int
	lengths           []lengthUse
}

type lengthUse struct{ length, n int } // IPv6 prefixes count as length+1000

// index is the rules of one group of policies by anchor.
type index struct {
	lists    hamt.Map[anchor, []ref] // sorted by policy key and rule
	use      [kinds]usage
	policies int
	keys     []string // of the policies, sorted; never changed
}

func newIndex() *index { return &index{lists: hamt.NewMap[anchor, []ref](hashAnchor)} }

// apply removes and adds rules. Changes to one list are made together, so that
// filling a list with n rules costs n log n.
func (x *index) apply(gone, come []ref) {
	type edit struct {
		gone map[*Policy]bool
		come []ref
	}
	edits := map[anchor]*edit{}
	at := func(a anchor) *edit {
		e := edits[a]
		if e == nil {
			e = &edit{}
			edits[a] = e
		}
		return e
	}
	for _, r := range gone {
		for _, a := range r.p.rules[r.i].anchors() {
			e := at(a)
			if e.gone == nil {
				e.gone = map[*Policy]bool{}
			}
			e.gone[r.p] = true
		}
	}
	for _, r := range come {
		for _, a := range r.p.rules[r.i].anchors() {
			e := at(a)
			e.come = append(e.come, r)
		}
	}
	ed := &hamt.Edit{}
	for a, e := range edits {
		have, known := x.lists.Get(a)
		list := make([]ref, 0, len(have)+len(e.come))
		for _, r := range have {
			if !e.gone[r.p] {
				list = append(list, r)
			}
		}
		list = append(list, e.come...)
		slices.SortFunc(list, compareRefs)
		list = slices.Compact(list)
		switch {
		case len(list) > 0:
			x.lists = x.lists.Set(ed, a, list)
			if !known {
				x.use[a.kind].count(a, 1)
			}
		case known:
			x.lists = x.lists.Delete(ed, a)
			x.use[a.kind].count(a, -1)
		}
	}
}

func (u *usage) count(a anchor, by int) {
	if a.port == 0 {
		u.anyPort += by
	} else {
		u.withPort += by
	}
	length := len(a.a)
	switch a.kind {
	case source:
		length = a.prefix.Bits()
		if a.prefix.Addr().Is6() {
			length += v6Length
		}
	case principalPrefix, principalSuffix, namespacePrefix, namespaceSuffix:
	default:
		return
	}
	u.lengths = slices.Clone(u.lengths) // shared with the index before
	i := slices.IndexFunc(u.lengths, func(l lengthUse) bool { return l.length == length })
	if i < 0 {
		u.lengths = append(u.lengths, lengthUse{length, 0})
		i = len(u.lengths) - 1
	}
	if u.lengths[i].n += by; u.lengths[i].n == 0 {
		u.lengths = slices.Delete(u.lengths, i, i+1)
	}
}

const v6Length = 1000 // beyond any IPv4 length

// first returns the lowest policy key and rule that match.
func (x *index) first(f *facts) (ref, bool) {
	if x.lists.Len() == 0 {
		return ref{}, false
	}
	l := lookup{x: x, f: f}
	l.probe(anchor{kind: anyClient})
	if !f.peer {
		l.probe(anchor{kind: noPeer})
	} else {
		l.probe(anchor{kind: principalExact, a: f.principal})
		l.prefixes(principalPrefix, f.principal)
		l.suffixes(principalSuffix, f.principal)
		l.probe(anchor{kind: accountExact, a: f.ns, b: f.sa})
	}
	l.probe(anchor{kind: namespaceExact, a: f.ns})
	l.prefixes(namespacePrefix, f.ns)
	l.suffixes(namespaceSuffix, f.ns)
	l.sources()
	return l.best, l.best.p != nil
}

// lookup is one search through an index.
type lookup struct {
	x    *index
	f    *facts
	best ref
}

func (l *lookup) probe(a anchor) {
	u := &l.x.use[a.kind]
	if u.anyPort > 0 {
		l.walk(a)
	}
	if u.withPort > 0 && l.f.port != 0 {
		a.port = l.f.port
		l.walk(a)
	}
}

func (l *lookup) walk(a anchor) {
	list, _ := l.x.lists.Get(a)
	for _, r := range list {
		if l.best.p != nil && compareRefs(r, l.best) >= 0 {
			return
		}
		if r.p.rules[r.i].matches(l.f) {
			l.best = r
			return
		}
	}
}

func (l *lookup) prefixes(k kind, s string) {
	for _, u := range l.x.use[k].lengths {
		if u.length <= len(s) {
			l.probe(anchor{kind: k, a: s[:u.length]})
		}
	}
}

func (l *lookup) suffixes(k kind, s string) {
	for _, u := range l.x.use[k].lengths {
		if u.length <= len(s) {
			l.probe(anchor{kind: k, a: s[len(s)-u.length:]})
		}
	}
}

func (l *lookup) sources() {
	for _, u := range l.x.use[source].lengths {
		n := u.length
		if (n >= v6Length) != l.f.src.Is6() {
			continue
		}
		n %= v6Length
		if p, err := l.f.src.Prefix(n); err == nil {
			l.probe(anchor{kind: source, prefix: p})
		}
	}
}

// maxAnchors bounds the lists that one rule stands in; beyond, a coarser
// anchor is as good.
const maxAnchors = 4096

// anchors are the anchors of a rule: one of them holds whenever the rule
// matches. A rule that never matches has none.
func (r *rule) anchors() []anchor {
	clients := []anchor{{kind: anyClient}}
	ports := []uint16{0}
	best := 0
	for i := range r.clauses {
		c := &r.clauses[i]
		if len(c.alternatives) == 0 {
			return nil
		}
		if list, score := c.clients(); score > best {
			clients, best = list, score
		}
		if list := c.ports(); list != nil && (ports[0] == 0 || len(list) < len(ports)) {
			ports = list
		}
	}
	if len(clients)*len(ports) > maxAnchors {
		if len(clients) <= maxAnchors {
			ports = []uint16{0}
		} else if clients = []anchor{{kind: anyClient}}; len(ports) > maxAnchors {
			ports = []uint16{0}
		}
	}
	out := make([]anchor, 0, len(clients)*len(ports))
	for _, a := range clients {
		for _, p := range ports {
			a.port = p
			out = append(out, a)
		}
	}
	return out
}

// clients are the anchors of a clause, and how selective the weakest is; 0 is
// not at all.
func (c *clause) clients() ([]anchor, int) {
	var all []anchor
	weakest := -1
	for i := range c.alternatives {
		list, score := c.alternatives[i].clients()
		if score == 0 {
			return nil, 0
		}
		if weakest < 0 || score < weakest {
			weakest = score
		}
		all = append(all, list...)
	}
	return all, weakest
}

func (m *match) clients() ([]anchor, int) {
	var out []anchor
	switch {
	case m.principals != nil && m.principals.anchorable():
		return m.principals.anchors(principalExact, principalPrefix, principalSuffix), 5
	case m.accounts != nil:
		for _, a := range m.accounts.list {
			out = append(out, anchor{kind: accountExact, a: a.ns, b: a.name})
		}
		return out, 4
	case m.src != nil:
		for _, p := range m.src.list {
			out = append(out, anchor{kind: source, prefix: p})
		}
		return out, 3
	case m.namespaces != nil && m.namespaces.anchorable():
		return m.namespaces.anchors(namespaceExact, namespacePrefix, namespaceSuffix), 2
	case m.notPrincipals != nil && m.notPrincipals.presence:
		return []anchor{{kind: noPeer}}, 1
	}
	return nil, 0
}

// anchorable: presence is a demand that nearly every client fulfils.
func (t *stringTerm) anchorable() bool { return !t.presence }

func (t *stringTerm) anchors(exact, prefix, suffix kind) []anchor {
	var out []anchor
	for _, s := range t.exact {
		out = append(out, anchor{kind: exact, a: s})
	}
	for _, s := range t.prefix {
		out = append(out, anchor{kind: prefix, a: s})
	}
	for _, s := range t.suffix {
		out = append(out, anchor{kind: suffix, a: s})
	}
	return out
}

// ports are the ports that a clause demands, nil if it does not.
func (c *clause) ports() []uint16 {
	var all []uint16
	for i := range c.alternatives {
		t := c.alternatives[i].ports
		if t == nil {
			return nil
		}
		all = append(all, t.list...)
	}
	if len(all) == 0 || slices.Contains(all, 0) {
		return nil
	}
	slices.Sort(all)
	return slices.Compact(all)
}
