package delta

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

// Limits bound a stream. The zero value means the defaults below.
type Limits struct {
	// FirstBytes bounds the first response of a type. Proxies take that
	// response for the whole state and become ready on it, so it is large;
	// the reference reads 200 MiB.
	FirstBytes int
	// Bytes bounds every other response.
	Bytes int
	// Window is how many responses of a type may be unacknowledged.
	Window int
	// Names bounds the subscriptions by name, per type.
	Names int
	// Types bounds the types of one stream.
	Types int
}

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.FirstBytes, 128<<20)
	def(&l.Bytes, 3<<20) // below gRPC's default of 4 MiB, whatever the client set
	def(&l.Window, 4)
	def(&l.Names, 200_000)
	def(&l.Types, 16)
	return l
}

// wildcard subscribes to everything.
const wildcard = "*"

// Stream is what one client was told.
type Stream struct {
	store  *Store
	limits Limits
	subs   map[string]*subscription
	order  []*subscription // in the order of first requests, for status
	nonce  uint64
}

// NewStream begins a stream that knows nothing.
func (s *Store) NewStream(l Limits) *Stream {
	return &Stream{store: s, limits: l.withDefaults(), subs: map[string]*subscription{}}
}

// subscription is one type on one stream.
type subscription struct {
	typ    string
	served bool // false: a type this store does not have
	begun  bool // the first response was made
	all    bool // wildcard

	// upserts and removals are the cursors: all changes up to them were sent
	// or did not matter.
	upserts, removals uint64
	// resume is what a reconnecting client said it has, as far as the cursor
	// has not passed it. Wildcard only.
	resume map[string]string
	// lost is what it said it has and no longer exists.
	lost []string

	names map[string]struct{} // subscribed by name
	asked []string            // of those, what is still to be answered
	due   []string            // the resources that answer it, to be sent whatever the client has
	isDue map[string]struct{} // due as a set
	held  map[string]string   // name → version sent; only while not wildcard

	unacked  []sent
	rejected map[string]struct{} // what the client refused and was not replaced since
	status   TypeStatus
}

// sent is a response without an answer yet.
type sent struct {
	nonce     string
	seq       uint64
	resources []*discovery.Resource
	removed   []string
}

// TypeStatus is how far a client is with one type.
type TypeStatus struct {
	Type      string `json:"type"`
	Wildcard  bool   `json:"wildcard"`
	Names     int    `json:"names,omitempty"`
	Sent      uint64 `json:"sent"`  // store's Seq at the latest response
	Acked     uint64 `json:"acked"` // and at the latest one acknowledged
	Unacked   int    `json:"unacked"`
	Responses uint64 `json:"responses"`
	Resources uint64 `json:"resources"` // sent, counting repeats
	Nacks     uint64 `json:"nacks"`
	// Rejected is how many resources the client holds in another form than
	// served, because it refused the latest one; LastNack says why.
	Rejected int    `json:"rejected"`
	LastNack string `json:"last_nack,omitempty"`
}

// Status lists the types, in the order the client asked for them.
func (st *Stream) Status() []TypeStatus {
	out := make([]TypeStatus, 0, len(st.order))
	for _, s := range st.order {
		t := s.status
		t.Type, t.Wildcard, t.Names, t.Unacked = s.typ, s.all, len(s.names), len(s.unacked)
		t.Rejected = len(s.rejected)
		out = append(out, t)
	}
	return out
}

// Event is what a request meant.
type Event struct {
	Type  string
	First bool // first of its type on this stream
	// Resumed is how many resources a reconnecting client said it has.
	Resumed int
	Ack     bool
	// Nack is the client's reason for rejecting a response, with Rejected set.
	Rejected bool
	Nack     string
}

// maxNackText bounds what a client can make status pages and logs show.
const maxNackText = 1024

// Request takes in a client's message. It keeps req's map of versions. After an
// error the stream must end.
func (st *Stream) Request(req *discovery.DeltaDiscoveryRequest) (Event, error) {
	if req.TypeUrl == "" {
		return Event{}, &RequestError{"no type_url"}
	}
	sub := st.subs[req.TypeUrl]
	if sub == nil {
		return st.subscribeFirst(req)
	}
	ev := Event{Type: req.TypeUrl}
	sub.answer(req, &ev)
	sub.subscribe(req.ResourceNamesSubscribe)
	st.unsubscribe(sub, req.ResourceNamesUnsubscribe)
	if len(sub.names) > st.limits.Names || len(sub.asked) > st.limits.Names {
		return ev, &RequestError{fmt.Sprintf("more than %d names of %s: subscribe to * instead", st.limits.Names, sub.typ)}
	}
	return ev, nil
}

// subscribeFirst handles the first request of a type. A nonce in it is of an
// earlier stream and means nothing here.
func (st *Stream) subscribeFirst(req *discovery.DeltaDiscoveryRequest) (Event, error) {
	ev := Event{Type: req.TypeUrl, First: true, Resumed: len(req.InitialResourceVersions)}
	switch {
	case len(st.subs) >= st.limits.Types:
		return ev, &RequestError{fmt.Sprintf("more than %d types on one stream", st.limits.Types)}
	case len(req.ResourceNamesSubscribe) > st.limits.Names:
		return ev, &RequestError{fmt.Sprintf("more than %d names of %s: subscribe to * instead", st.limits.Names, req.TypeUrl)}
	}
	sub := &subscription{typ: req.TypeUrl, names: map[string]struct{}{}, isDue: map[string]struct{}{}, held: map[string]string{}, rejected: map[string]struct{}{}}
	// Empty means everything, but only in the first request ("legacy
	// wildcard"). A node proxy on demand says ["*"] minus ["*"]: nothing yet.
	sub.all = len(req.ResourceNamesSubscribe) == 0 || slices.Contains(req.ResourceNamesSubscribe, wildcard)
	if slices.Contains(req.ResourceNamesUnsubscribe, wildcard) {
		sub.all = false
	}
	for _, n := range req.ResourceNamesSubscribe {
		sub.names[n] = struct{}{}
	}
	for _, n := range req.ResourceNamesUnsubscribe {
		delete(sub.names, n)
	}
	delete(sub.names, wildcard)
	st.subs[req.TypeUrl] = sub
	st.order = append(st.order, sub)

	st.store.mu.RLock()
	defer st.store.mu.RUnlock()
	t := st.store.tables[req.TypeUrl]
	sub.served = t != nil
	if t == nil {
		sub.asked = keysOf(sub.names)
		return ev, nil
	}
	sub.removals = st.store.seq // what vanished before is known by absence from here on
	if sub.all {
		sub.resume = req.InitialResourceVersions
		for n := range sub.resume {
			if t.live[n] == nil {
				sub.lost = append(sub.lost, n)
				delete(sub.resume, n)
			}
		}
		slices.Sort(sub.lost)
		return ev, nil
	}
	return ev, st.resumeNamed(sub, t, req.InitialResourceVersions)
}

// resumeNamed takes the names that a client had on its last stream for
// subscriptions of this one, as istiod does: a node proxy on demand sends them
// nowhere else.
func (st *Stream) resumeNamed(sub *subscription, t *table, versions map[string]string) error {
	if len(versions) == 0 {
		sub.upserts = st.store.seq // nothing is held, names are answered one by one
	}
	for n, v := range versions {
		sub.names[n] = struct{}{}
		switch {
		case v == "":
			continue // wanted, never received: answered below
		case t.live[n] == nil:
			sub.lost = append(sub.lost, n)
		default:
			sub.held[n] = v // the cursor starts at 0 and compares
		}
	}
	slices.Sort(sub.lost)
	for n := range sub.names {
		if versions[n] == "" {
			sub.asked = append(sub.asked, n)
		}
	}
	slices.Sort(sub.asked)
	if len(sub.names) > st.limits.Names {
		return &RequestError{fmt.Sprintf("more than %d names of %s: subscribe to * instead", st.limits.Names, sub.typ)}
	}
	return nil
}

// answer matches an ACK or NACK to its response. Responses before it count as
// answered too: they were processed in order.
func (s *subscription) answer(req *discovery.DeltaDiscoveryRequest, ev *Event) {
	if req.ResponseNonce == "" {
		return
	}
	i := slices.IndexFunc(s.unacked, func(r sent) bool { return r.nonce == req.ResponseNonce })
	if i < 0 {
		return // answered before, or not ours
	}
	accepted := s.unacked[:i+1]
	if req.ErrorDetail == nil {
		ev.Ack = true
		s.status.Acked = s.unacked[i].seq
	} else {
		// What was rejected is not sent again until it changes: the client
		// has said all it can, repeating would only make it say so again.
		ev.Rejected, ev.Nack = true, req.ErrorDetail.Message
		if len(ev.Nack) > maxNackText {
			ev.Nack = ev.Nack[:maxNackText]
		}
		s.status.Nacks++
		s.status.LastNack = ev.Nack
		accepted = s.unacked[:i]
	}
	for _, r := range accepted {
		for _, res := range r.resources {
			delete(s.rejected, res.Name)
		}
		for _, n := range r.removed {
			delete(s.rejected, n)
		}
	}
	if ev.Rejected {
		s.reject(s.unacked[i], req.ErrorDetail.Message)
	}
	s.unacked = slices.Delete(s.unacked, 0, i+1)
}

// reject notes which resources of a response the client refused: those that
// its message names, as proxies write it ("name: reason; ..."), or all.
func (s *subscription) reject(r sent, message string) {
	var named []*discovery.Resource
	if len(r.resources) <= maxNamed && len(message) <= maxNamedText {
		for _, res := range r.resources {
			if strings.Contains(message, res.Name) {
				named = append(named, res)
			}
		}
	}
	if len(named) == 0 {
		named = r.resources
	}
	for _, res := range named {
		s.rejected[res.Name] = struct{}{}
	}
}

// maxNamed and maxNamedText bound the search for names in a rejection: many
// names in a long text would be an attack.
const (
	maxNamed     = 4096
	maxNamedText = 64 << 10
)

func (s *subscription) subscribe(names []string) {
	for _, n := range names {
		if n != wildcard {
			// Answered even when it was sent before: a client that asks again
			// has lost it, and one that waits must not wait for ever.
			s.names[n] = struct{}{}
			s.asked = append(s.asked, n)
			continue
		}
		if !s.all {
			s.all, s.upserts = true, 0
			s.resume, s.held = s.held, map[string]string{}
		}
	}
}

func (st *Stream) unsubscribe(sub *subscription, names []string) {
	if len(names) == 0 {
		return
	}
	st.store.mu.RLock()
	defer st.store.mu.RUnlock()
	t := st.store.tables[sub.typ]
	left := make(map[string]struct{}, len(names))
	for _, n := range names {
		left[n] = struct{}{}
		delete(sub.names, n)
	}
	sub.asked = slices.DeleteFunc(sub.asked, func(n string) bool { _, ok := left[n]; return ok })
	if _, ok := left[wildcard]; ok && sub.all {
		// The client forgets what it did not ask for by name, and which of
		// those it got is not recorded under a wildcard: answer them again.
		sub.all, sub.resume, sub.upserts = false, nil, st.store.seq
		sub.asked = keysOf(sub.names)
		return
	}
	if t == nil || sub.all {
		return
	}
	for n := range left {
		for _, c := range t.reach(n) {
			if !sub.wants(t, c) {
				delete(sub.held, c.name)
			}
		}
	}
}

// wants reports whether a live resource is subscribed to: by name, by alias, or
// through a resource that is subscribed to in one of these ways.
func (s *subscription) wants(t *table, c *change) bool {
	if s.all {
		return true
	}
	has := func(n string) bool { _, ok := s.names[n]; return ok }
	through := func(n string) bool {
		v := t.live[n]
		return has(n) || v != nil && slices.ContainsFunc(v.wire.Aliases, has)
	}
	return has(c.name) || slices.ContainsFunc(c.wire.Aliases, has) || slices.ContainsFunc(c.via, through)
}

// Next returns the next response to send, or nil when the client has all it
// may have until it answers or the store changes.
func (st *Stream) Next() (*discovery.DeltaDiscoveryResponse, error) {
	st.store.mu.RLock()
	defer st.store.mu.RUnlock()
	for _, sub := range st.order {
		if !sub.served && (!sub.begun || len(sub.asked) > 0) {
			// Not a reason to end the stream, nor to leave the client waiting.
			return st.respond(sub, &batch{removed: take(&sub.asked)}), nil
		}
	}
	for _, p := range st.store.phases {
		sub := st.subs[p.typ]
		if sub == nil {
			continue
		}
		t := st.store.tables[p.typ]
		if p.removals && sub.removals < t.horizon {
			return nil, ErrBehind
		}
		if !sub.pending(t, p) {
			continue
		}
		if len(sub.unacked) >= st.limits.Window {
			return nil, nil // later phases wait too: that is the order's point
		}
		b := &batch{limit: st.limits.Bytes}
		if !sub.begun {
			b.limit = st.limits.FirstBytes
		}
		if p.removals {
			sub.collectRemovals(t, b, st.store.seq)
		}
		if p.upserts {
			sub.collect(t, b, st.store.seq)
		}
		if sub.begun && b.empty() {
			continue // all that changed was none of this client's business
		}
		return st.respond(sub, b), nil
	}
	return nil, nil
}

func (s *subscription) pending(t *table, p phase) bool {
	if p.upserts && (!s.begun || len(s.asked) > 0 || len(s.due) > 0 || len(t.upserts.after(s.upserts)) > 0) {
		return true
	}
	return p.removals && (len(s.lost) > 0 || len(t.removals.after(s.removals)) > 0)
}

// batch is a response in the making.
type batch struct {
	limit     int
	size      int
	resources []*discovery.Resource
	removed   []string
	full      bool
}

func (b *batch) empty() bool { return len(b.resources) == 0 && len(b.removed) == 0 }

// room reports whether size more bytes fit; the first item always does, or a
// large one would never be sent.
func (b *batch) room(size int) bool {
	if b.size > 0 && b.size+size > b.limit {
		b.full = true
		return false
	}
	b.size += size
	return true
}

func (b *batch) remove(name string) bool {
	if !b.room(len(name) + 4) {
		return false
	}
	b.removed = append(b.removed, name)
	return true
}

func (s *subscription) collectRemovals(t *table, b *batch, seq uint64) {
	for len(s.lost) > 0 {
		// A lost name may have come back meanwhile; then it is an upsert.
		if t.live[s.lost[0]] == nil && !b.remove(s.lost[0]) {
			return
		}
		s.lost = s.lost[1:]
	}
	for _, c := range t.removals.after(s.removals) {
		if !c.stale {
			_, held := s.held[c.name]
			if (s.all || held) && !b.remove(c.name) {
				return
			}
			delete(s.held, c.name)
			delete(s.resume, c.name)
		}
		s.removals = c.seq
	}
	s.removals = seq
}

func (s *subscription) collect(t *table, b *batch, seq uint64) {
	answered := s.collectAsked(t, b)
	for _, c := range t.upserts.after(s.upserts) {
		if b.full {
			return
		}
		if _, done := answered[c.name]; !done && !c.stale && !s.collectOne(t, c, b) {
			return
		}
		s.upserts = c.seq
	}
	if !b.full {
		s.upserts = seq
		s.resume = nil
	}
}

// collectAsked answers explicit subscriptions: with the resource and those
// reached through it, or as removed when there is none. It returns what it put
// into the batch, which the walk must not repeat.
func (s *subscription) collectAsked(t *table, b *batch) map[string]struct{} {
	for len(s.asked) > 0 {
		found := t.reach(s.asked[0])
		if len(found) == 0 && !b.remove(s.asked[0]) {
			return nil
		}
		for _, c := range found {
			s.owe(c.name)
		}
		s.asked = s.asked[1:]
	}
	var answered map[string]struct{}
	for len(s.due) > 0 {
		if c := t.live[s.due[0]]; c != nil && s.wants(t, c) {
			if !b.room(c.size) {
				return answered
			}
			if answered == nil {
				answered = map[string]struct{}{}
			}
			answered[c.name] = struct{}{}
			b.resources = append(b.resources, c.wire)
			s.sent(c)
		}
		delete(s.isDue, s.due[0])
		s.due = s.due[1:]
	}
	return answered
}

func (s *subscription) owe(name string) {
	if _, ok := s.isDue[name]; !ok {
		s.isDue[name] = struct{}{}
		s.due = append(s.due, name)
	}
}

// collectOne adds one change of the walk; false means it did not fit.
func (s *subscription) collectOne(t *table, c *change, b *batch) bool {
	if !s.wants(t, c) {
		if _, held := s.held[c.name]; !held {
			return true
		}
		// It lost the alias it was subscribed by: the client must not go on
		// using the old form.
		if !b.remove(c.name) {
			return false
		}
		delete(s.held, c.name)
		return true
	}
	if s.resume[c.name] == c.version() || s.held[c.name] == c.version() {
		delete(s.resume, c.name)
		return true
	}
	if !b.room(c.size) {
		return false
	}
	b.resources = append(b.resources, c.wire)
	_, had := s.held[c.name]
	s.sent(c)
	if !s.all && !had {
		// It is new to the client, and so may be what is reached through it:
		// the workloads of a service that got its name or address late.
		for v := range t.via[c.name] {
			if _, held := s.held[v]; !held {
				s.owe(v)
			}
		}
	}
	return true
}

func (s *subscription) sent(c *change) {
	// Or a change back to the version before would be taken for known.
	delete(s.resume, c.name)
	if !s.all {
		s.held[c.name] = c.version()
	}
}

func (st *Stream) respond(sub *subscription, b *batch) *discovery.DeltaDiscoveryResponse {
	st.nonce++
	nonce := strconv.FormatUint(st.nonce, 10)
	seq := st.store.seq
	sub.begun = true
	sub.unacked = append(sub.unacked, sent{nonce: nonce, seq: seq, resources: b.resources, removed: b.removed})
	if !sub.served && len(sub.unacked) > st.limits.Window {
		sub.unacked = sub.unacked[1:]
	}
	sub.status.Sent = seq
	sub.status.Responses++
	sub.status.Resources += uint64(len(b.resources))
	return &discovery.DeltaDiscoveryResponse{
		SystemVersionInfo: versionInfo(seq),
		TypeUrl:           sub.typ,
		Nonce:             nonce,
		Resources:         b.resources,
		RemovedResources:  b.removed,
	}
}

func take(p *[]string) []string {
	v := *p
	*p = nil
	return v
}

func keysOf(m map[string]struct{}) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// Synced reports whether the client has acknowledged all it asked for as it is
// now.
func (st *Stream) Synced() bool {
	st.store.mu.RLock()
	defer st.store.mu.RUnlock()
	for _, sub := range st.order {
		if t := st.store.tables[sub.typ]; !sub.begun || len(sub.unacked) > 0 ||
			t != nil && sub.pending(t, phase{upserts: true, removals: true}) {
			return false
		}
	}
	return len(st.order) > 0
}
