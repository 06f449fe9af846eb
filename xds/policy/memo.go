package policy

import (
	"sync"
	"sync/atomic"
)

const (
	// many is from how many named policies on it can pay to compile them together.
	many = 32
	// payback is how often a list is evaluated one by one before it is compiled,
	// which costs as much as some 50 evaluations. So a decision costs twice an
	// evaluation one by one at most, on average, whatever changes how often: policies
	// (each Set starts a memo of its own) or lists.
	payback = 64
	// maxMemo and maxMemoRules bound what is kept; the next list starts afresh.
	// A rule takes some 200 bytes.
	maxMemo      = 1024
	maxMemoRules = 1 << 18
)

// memo keeps what long lists of named policies compile to. Lists are immutable,
// so a list is known by where it is; an entry keeps its list alive.
type memo struct {
	mu    sync.RWMutex
	m     map[memoKey]*memoEntry // guarded by mu
	rules int                    // guarded by mu; compiled in m
}

type memoKey struct {
	ns    string
	first *string
	n     int
}

type memoEntry struct {
	refs     []string
	uses     atomic.Int32
	compiled atomic.Pointer[compiled]
}

// compiled is a list of named policies as one group.
type compiled struct {
	group   *group
	missing string // the lowest name that is not known
}

// get returns what the list compiles to, nil when it did not pay yet.
func (m *memo) get(s *Set, ns string, refs []string) *compiled {
	key := memoKey{ns, &refs[0], len(refs)}
	m.mu.RLock()
	e := m.m[key]
	m.mu.RUnlock()
	if e == nil {
		m.add(key, &memoEntry{refs: refs})
		return nil
	}
	if c := e.compiled.Load(); c != nil {
		return c
	}
	if e.uses.Add(1) != payback { // one caller compiles, others do not wait for it
		return nil
	}
	list, rules := s.choose(ns, refs)
	if rules > maxMemoRules {
		return nil
	}
	c := &compiled{groupOf(list), lowestMissing(s, refs)}
	e.compiled.Store(c)
	m.count(key, e, rules)
	return c
}

func (m *memo) add(key memoKey, e *memoEntry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.m[key] != nil {
		return // another goroutine was first
	}
	if m.m == nil || len(m.m) >= maxMemo {
		m.m, m.rules = map[memoKey]*memoEntry{}, 0
	}
	m.m[key] = e
}

// count takes the size of a compiled list into account.
func (m *memo) count(key memoKey, e *memoEntry, rules int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.m[key] != e {
		return // dropped meanwhile
	}
	if m.rules += rules; m.rules > maxMemoRules {
		m.m, m.rules = map[memoKey]*memoEntry{key: e}, rules
	}
}

// choose finds the named policies that count by their name alone, and the number
// of their rules.
func (s *Set) choose(ns string, refs []string) (list []*Policy, rules int) {
	seen := make(map[string]bool, len(refs))
	for _, key := range refs {
		if p := s.Get(key); p != nil && !p.inGroup(ns) && !seen[key] {
			seen[key] = true
			list = append(list, p)
			rules += len(p.rules)
		}
	}
	return list, rules
}
