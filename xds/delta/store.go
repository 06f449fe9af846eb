package delta

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

// Upsert is a resource as it is to be served.
type Upsert struct {
	Type string
	Name string
	// Aliases are other names that clients subscribe by; they are sent.
	Aliases []string
	// Via names resources whose subscribers want this one too, such as the
	// services of a workload; not sent.
	Via     []string
	Message proto.Message
	// Bytes is Message, when it is encoded (deterministically) already.
	Bytes []byte
}

// Removal names a resource that is gone.
type Removal struct{ Type, Name string }

// maxRemovals is how many removals per type are remembered for clients that
// have not seen them: a namespace of sixty thousand pods may vanish at once
// without anyone having to resume. Some 10 MiB at worst.
const maxRemovals = 1 << 16

// Store holds the current resources of each type and the order in which they
// changed.
type Store struct {
	types  []string // immutable; dependencies first
	phases []phase  // immutable

	mu     sync.RWMutex
	seq    uint64            // guarded by mu; of the latest change
	tables map[string]*table // guarded by mu
}

// NewStore serves these types, in the order in which they depend on each
// other: a type may refer to those before it.
func NewStore(types ...string) *Store {
	s := &Store{types: types, phases: phasesOf(types), tables: make(map[string]*table, len(types))}
	for _, t := range types {
		s.tables[t] = newTable()
	}
	return s
}

// phase is one step of the sending order.
type phase struct {
	typ               string
	upserts, removals bool
}

func phasesOf(types []string) []phase {
	var out []phase
	last := len(types) - 1
	for i, t := range types {
		out = append(out, phase{typ: t, upserts: true, removals: i == last})
	}
	for i := last - 1; i >= 0; i-- {
		out = append(out, phase{typ: types[i], removals: true})
	}
	return out
}

// change is the latest thing that happened to a name. Immutable but for stale,
// which is guarded by Store.mu.
type change struct {
	seq   uint64
	name  string
	wire  *discovery.Resource // shared by all streams, never written; nil for a removal
	size  int                 // bytes on the wire, roughly
	via   []string
	stale bool // a later change of this name exists
}

func (c *change) version() string { return c.wire.GetVersion() }

// history is the changes in order, without those that a later one hides (but
// for the few that wait for compaction).
type history struct {
	changes []*change
	stale   int
}

func (h *history) add(c *change) { h.changes = append(h.changes, c) }

func (h *history) retire(c *change) {
	c.stale = true
	h.stale++
	if h.stale > 64 && h.stale > len(h.changes)/2 {
		h.changes = slices.DeleteFunc(h.changes, func(c *change) bool { return c.stale })
		h.stale = 0
	}
}

// after returns the changes later than seq; stale ones may be among them.
func (h *history) after(seq uint64) []*change {
	i, _ := slices.BinarySearchFunc(h.changes, seq, func(c *change, seq uint64) int {
		if c.seq <= seq {
			return -1
		}
		return 1
	})
	return h.changes[i:]
}

// table is one type's resources.
type table struct {
	live     map[string]*change
	gone     map[string]*change // removals still remembered
	upserts  history
	removals history
	// horizon is the seq of the latest removal that is forgotten.
	horizon uint64
	alias   map[string][]string            // alias → names
	via     map[string]map[string]struct{} // via → names
}

func newTable() *table {
	return &table{live: map[string]*change{}, gone: map[string]*change{}, alias: map[string][]string{}, via: map[string]map[string]struct{}{}}
}

// Apply makes the changes visible at once. Resources whose content is the same
// as before are left alone. It reports how many changed; resources that cannot
// be encoded are in the error and the others are applied.
func (s *Store) Apply(upserts []Upsert, removals []Removal) (changed int, err error) {
	var errs []error
	encoded := make([]*change, len(upserts))
	for i := range upserts {
		c, err := encode(&upserts[i])
		if err != nil {
			errs = append(errs, err)
			continue
		}
		encoded[i] = c
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range encoded {
		if c == nil {
			continue
		}
		t, ok := s.tables[upserts[i].Type]
		if !ok {
			errs = append(errs, fmt.Errorf("resource %q: type %q is not served", c.name, upserts[i].Type))
			continue
		}
		if t.unchanged(c) {
			continue
		}
		s.seq++
		c.seq = s.seq
		t.put(c)
		changed++
	}
	for _, r := range removals {
		t, ok := s.tables[r.Type]
		if !ok {
			errs = append(errs, fmt.Errorf("resource %q: type %q is not served", r.Name, r.Type))
			continue
		}
		if t.live[r.Name] == nil {
			continue
		}
		s.seq++
		t.remove(&change{seq: s.seq, name: r.Name, size: len(r.Name) + 4})
		changed++
	}
	return changed, errors.Join(errs...)
}

// encode gives a resource its wire form. The version is a hash of the content,
// so that two replicas and a restarted one agree on what is unchanged.
func encode(u *Upsert) (*change, error) {
	body := u.Bytes
	if body == nil {
		var err error
		if body, err = (proto.MarshalOptions{Deterministic: true}).Marshal(u.Message); err != nil {
			return nil, fmt.Errorf("encode %s %q: %w", u.Type, u.Name, err)
		}
	}
	sum := sha256.Sum256(body)
	wire := &discovery.Resource{
		Name:     u.Name,
		Aliases:  u.Aliases,
		Version:  base64.RawURLEncoding.EncodeToString(sum[:12]),
		Resource: &anypb.Any{TypeUrl: u.Type, Value: body},
	}
	return &change{name: u.Name, wire: wire, size: proto.Size(wire) + 4, via: u.Via}, nil
}

func (t *table) unchanged(c *change) bool {
	old := t.live[c.name]
	return old != nil && old.version() == c.version() &&
		slices.Equal(old.wire.Aliases, c.wire.Aliases) && slices.Equal(old.via, c.via)
}

func (t *table) put(c *change) {
	if old := t.live[c.name]; old != nil {
		t.unindex(old)
		t.upserts.retire(old)
	}
	if old := t.gone[c.name]; old != nil {
		delete(t.gone, c.name)
		t.removals.retire(old)
	}
	t.live[c.name] = c
	t.upserts.add(c)
	for _, a := range c.wire.Aliases {
		t.alias[a] = append(t.alias[a], c.name)
	}
	for _, v := range c.via {
		if t.via[v] == nil {
			t.via[v] = map[string]struct{}{}
		}
		t.via[v][c.name] = struct{}{}
	}
}

func (t *table) remove(c *change) {
	old := t.live[c.name]
	t.unindex(old)
	t.upserts.retire(old)
	delete(t.live, c.name)
	t.gone[c.name] = c
	t.removals.add(c)
	if len(t.gone) > maxRemovals {
		t.forget(len(t.gone) - maxRemovals*3/4)
	}
}

// forget drops the n oldest removals.
func (t *table) forget(n int) {
	for i, c := range t.removals.changes {
		if n == 0 {
			t.removals.changes = slices.Clone(t.removals.changes[i:])
			return
		}
		t.horizon = c.seq
		if c.stale {
			t.removals.stale--
			continue
		}
		delete(t.gone, c.name)
		n--
	}
	t.removals.changes = nil
}

func (t *table) unindex(c *change) {
	for _, a := range c.wire.Aliases {
		if names := slices.DeleteFunc(t.alias[a], func(n string) bool { return n == c.name }); len(names) > 0 {
			t.alias[a] = names
		} else {
			delete(t.alias, a)
		}
	}
	for _, v := range c.via {
		delete(t.via[v], c.name)
		if len(t.via[v]) == 0 {
			delete(t.via, v)
		}
	}
}

// reach lists what a subscription to key means: its namesake, those with it
// as an alias, and those reached through one of these.
func (t *table) reach(key string) []*change {
	var out []*change
	if c := t.live[key]; c != nil {
		out = append(out, c)
	}
	for _, n := range t.alias[key] {
		if n == key {
			continue
		}
		out = append(out, t.live[n])
		for v := range t.via[n] {
			out = append(out, t.live[v])
		}
	}
	for n := range t.via[key] {
		out = append(out, t.live[n])
	}
	return out
}

// Len counts the resources of a type.
func (s *Store) Len(typ string) int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if t := s.tables[typ]; t != nil {
		return len(t.live)
	}
	return 0
}

// Types lists what is served.
func (s *Store) Types() []string { return slices.Clone(s.types) }

// Resources lists the current resources of a type, oldest change first. They
// are shared: do not write to them.
func (s *Store) Resources(typ string) []*discovery.Resource {
	s.mu.RLock()
	defer s.mu.RUnlock()
	t := s.tables[typ]
	if t == nil {
		return nil
	}
	out := make([]*discovery.Resource, 0, len(t.live))
	for _, c := range t.upserts.changes {
		if !c.stale {
			out = append(out, c.wire)
		}
	}
	return out
}

// Seq numbers the changes so far.
func (s *Store) Seq() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.seq
}

func versionInfo(seq uint64) string { return strconv.FormatUint(seq, 10) }
