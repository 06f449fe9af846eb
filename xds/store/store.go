// Package store holds the proxy's current view of the mesh and its policies.
//
//	client → Apply (one writer at a time) → *View, published atomically → readers
//
// View never blocks and never returns nil. Writers are serialised by a lock:
// the client's goroutine, and the timer that ends a hold-back. Subscribers are
// called by the writer, in order, after the view was published.
//
// Workloads and policies come in separate responses, so for a moment a workload
// may name a policy that has not come yet, or that has just gone. Then the
// version before stays in force, for at most HoldBack; after that the workload
// denies, naming the policy. A workload without a version before, or whose
// addresses or identity changed, is published at once (and denies until the
// policy is there): unknown, it would be reached in plaintext.
package store

import (
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
)

// HoldBack is how long a workload waits for the policies it names.
const HoldBack = 5 * time.Second

// View is one version of everything; it is immutable.
type View struct {
	Mesh       *mesh.Snapshot
	Policies   *policy.Set
	Generation uint64 // grows with each published change
	Synced     bool   // a first response of each type was applied
}

// Config of a Store. The zero value is usable.
type Config struct {
	Node       string // whose pods are asked for by name; "" for every node
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Subscriber is told of each change. It must be quick and must not call Apply.
type Subscriber func(old, current *View, ch Change)

// Store holds the current View.
type Store struct {
	log *slog.Logger
	cur atomic.Pointer[View]

	mu     sync.Mutex
	subs   []*Subscriber
	synced map[string]bool
	held   map[string]held      // by uid: waits for policies
	dying  map[string]time.Time // policies removed but still named, with deadlines
	named  map[string]int       // policy key → workloads in force or held that name it
	raws   raws                 // what came last under each name
	shared mesh.Interner
	timer  *time.Timer
	closed bool
}

type held struct {
	w        *mesh.Workload
	deadline time.Time
}

// New returns an empty store.
func New(cfg Config) *Store {
	s := &Store{
		log: cfg.Logger, synced: map[string]bool{}, held: map[string]held{},
		dying: map[string]time.Time{}, named: map[string]int{}, raws: newRaws(),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.cur.Store(&View{Mesh: mesh.EmptyOn(cfg.Node), Policies: policy.Empty()})
	s.register(cfg.Registerer)
	return s
}

// View returns the current view. It is never nil.
func (s *Store) View() *View { return s.cur.Load() }

// Subscribe has f called for each later change, until the returned function is
// called.
func (s *Store) Subscribe(f Subscriber) (cancel func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &f
	s.subs = append(s.subs, p)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.subs = slices.DeleteFunc(slices.Clone(s.subs), func(q *Subscriber) bool { return q == p })
	}
}

// Close stops the timer of held-back workloads; what is in force stays.
func (s *Store) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
}

// Apply puts a delta in force and returns what it refused, with reasons.
// Whatever is not refused is visible when Apply returns, except for workloads
// that are held back.
func (s *Store) Apply(d client.Delta) []client.Reject {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.begin()
	var rejects []client.Reject
	switch d.Type {
	case api.AddressType:
		rejects = e.addresses(d)
	case api.AuthorizationType:
		rejects = e.authorizations(d)
	default:
		for _, r := range d.Added {
			rejects = append(rejects, client.Reject{Name: r.Name, Reason: "type " + d.Type + " is unknown to this version"})
		}
		return rejects
	}
	s.synced[d.Type] = true
	e.commit()
	return rejects
}

// expire is called by the timer.
func (s *Store) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.begin().commit()
}
