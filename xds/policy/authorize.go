package policy

// Authorize decides about a connection to a workload of namespace ns that
// names the policies refs. Policies of global scope, of the namespace and
// those named are considered:
//
//  1. a named policy that is not known denies;
//  2. any DENY that matches denies;
//  3. without any ALLOW policy the connection is allowed;
//  4. any ALLOW that matches allows, else the connection is denied.
//
// Of several matching rules the one with the lowest policy key, then rule, is
// reported. refs must not be changed afterwards.
func (s *Set) Authorize(ns string, refs []string, c Conn) Verdict {
	s = s.orEmpty()
	v := Verdict{ns: ns, plaintext: c.Peer.IsZero()}
	d := decision{set: s, ns: ns}
	d.facts.set(c)
	d.space = emptyGroup
	if g, ok := s.spaces.Get(ns); ok {
		d.space = g
	}
	if missing := d.resolve(refs); missing != "" {
		v.Policy, v.why = missing, unknownPolicy
		return v
	}
	v.DryRun = d.dryRun()
	if r, ok := d.first(denyClass); ok {
		v.Policy, v.Rule, v.why = r.p.Key, r.i+1, matched
		return v
	}
	v.allows = d.policies(allowClass)
	if v.allows == 0 {
		v.Allowed = true
		return v
	}
	if r, ok := d.first(allowClass); ok {
		v.Allowed, v.Policy, v.Rule, v.why = true, r.p.Key, r.i+1, matched
		return v
	}
	v.why, v.names = noneMatched, d.lowest(allowClass)
	return v
}

// decision is the working state of one Authorize.
type decision struct {
	set   *Set
	facts facts
	ns    string
	space *group
	refs  []string // evaluated one by one, or
	named *group   // together
}

// resolve returns the lowest named policy that is not known.
func (d *decision) resolve(refs []string) (missing string) {
	if len(refs) >= many {
		if c := d.set.memo.get(d.set, d.ns, refs); c != nil {
			d.named = c.group
			return c.missing
		}
	}
	d.refs = refs
	return lowestMissing(d.set, refs)
}

func lowestMissing(s *Set, refs []string) (missing string) {
	for _, key := range refs {
		if _, ok := s.policies.Get(key); !ok && (missing == "" || key < missing) {
			missing = key
		}
	}
	return missing
}

// considered: a named policy of another scope counts once, with its scope.
func (d *decision) considered(key string, class int) (*Policy, bool) {
	p, ok := d.set.policies.Get(key)
	if !ok || p.class() != class || p.inGroup(d.ns) {
		return nil, false
	}
	return p, true
}

// inGroup reports whether the policy counts for the namespace by its scope.
func (p *Policy) inGroup(ns string) bool {
	return p.Scope == Global || p.Scope == Namespace && p.Namespace == ns
}

func (d *decision) policies(class int) int {
	n := d.set.global.class[class].policies + d.space.class[class].policies
	if d.named != nil {
		n += d.named.class[class].policies
	}
	for _, key := range d.refs {
		if _, ok := d.considered(key, class); ok {
			n++
		}
	}
	return n
}

// maxNames is how many policies a verdict names that none of them matched.
const maxNames = 3

// lowest are the first policies of a class by key, "" where there are fewer.
func (d *decision) lowest(class int) (names [maxNames]string) {
	add := func(key string) {
		for i, have := range names {
			switch {
			case have == key:
				return
			case have == "" || key < have:
				copy(names[i+1:], names[i:])
				names[i] = key
				return
			}
		}
	}
	for _, g := range [...]*group{d.set.global, d.space, d.named} {
		if g == nil {
			continue
		}
		keys := g.class[class].keys
		for _, key := range keys[:min(len(keys), maxNames)] {
			add(key)
		}
	}
	for _, key := range d.refs {
		if _, ok := d.considered(key, class); ok {
			add(key)
		}
	}
	return names
}

func (d *decision) first(class int) (ref, bool) {
	best, found := d.set.global.class[class].first(&d.facts)
	better := func(r ref, ok bool) {
		if ok && (!found || compareRefs(r, best) < 0) {
			best, found = r, true
		}
	}
	better(d.space.class[class].first(&d.facts))
	if d.named != nil {
		better(d.named.class[class].first(&d.facts))
	}
	for _, key := range d.refs {
		if p, ok := d.considered(key, class); ok {
			better(p.first(&d.facts))
		}
	}
	return best, found
}

// dryRunNone is what ALLOW policies in dry run would do together.
const dryRunNone = "no ALLOW policy in dry run matched, they would deny"

func (d *decision) dryRun() string {
	if r, ok := d.first(dryDenyClass); ok {
		return r.p.dry[r.i]
	}
	if d.policies(dryAllowClass) == 0 {
		return ""
	}
	if r, ok := d.first(dryAllowClass); ok {
		return r.p.dry[r.i]
	}
	return dryRunNone
}
