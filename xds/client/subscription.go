package client

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/turn"
)

const (
	// gRPC servers accept 4 MiB per message by default; the rest is for what
	// else is in the request.
	maxVersionBytes = 3584 << 10
	// confirmAfter is how long after the last response on a resumed stream the
	// server has said all it knows.
	confirmAfter = 10 * time.Second
)

// subscription is what is known of one type, over all streams. It is owned by
// Run.
type subscription struct {
	typeURL string
	demands *demands // of the type on demand
	rest    []string // of it: names that the first request had no room for
	applied bool     // a response was applied on any stream
	known   versions
	lists   sync.Pool // of *[]Resource

	// Names in force that the current stream was not told about: the server
	// sends them again, or has them no more. It cannot say so itself.
	unconfirmed map[string]bool
	lastHeard   time.Time // last response on this stream
}

func newSubscription(typeURL string) *subscription {
	return &subscription{typeURL: typeURL, known: newVersions()}
}

// begin makes the first request on a stream. Without names it subscribes to
// everything. Versions that do not fit into a message are left out.
func (s *subscription) begin(node *discovery.Node) *discovery.DeltaDiscoveryRequest {
	req := &discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: s.typeURL}
	s.unconfirmed, s.lastHeard, s.rest = nil, time.Time{}, nil
	if s.demands != nil {
		defer s.demands.begin(req)
	}
	if s.known.len() == 0 {
		return req
	}
	req.InitialResourceVersions = make(map[string]string, s.known.len())
	size := 0
	for k := range s.known.all() {
		name, version := k.name, k.version
		const overhead = 12 // tags and lengths of a map entry
		n := len(name) + len(version) + overhead
		if version == "" || size+n > maxVersionBytes {
			if s.demands != nil {
				s.rest = append(s.rest, name) // subscribed to by name, and answered anew
				continue
			}
			if s.unconfirmed == nil {
				s.unconfirmed = map[string]bool{}
			}
			s.unconfirmed[name] = true
			continue
		}
		size += n
		req.InitialResourceVersions[name] = version
	}
	return req
}

// take makes a delta of a response, of which it shares the values. What is known of a resource, its name and its
// version if that is the same, is not kept twice.
func (s *subscription) take(resp *response, h head, others *turn.Taker) (Delta, error) {
	d := Delta{Type: s.typeURL, Removed: h.removed, First: !s.applied}
	d.Added = s.room(h.resources)
	err := resp.each(others, func(raw *rawResource) {
		r := Resource{Value: raw.value}
		k := s.known.like(raw.name)
		if k == nil || k.version != string(raw.version) {
			anew := newInForce(raw.name, raw.version)
			k = &anew
		}
		r.Name, r.Version = k.name, k.version
		if r.TypeURL = s.typeURL; r.TypeURL != string(raw.typeURL) {
			r.TypeURL = string(raw.typeURL)
		}
		if s.demands != nil {
			for _, a := range raw.aliases {
				r.Aliases = append(r.Aliases, string(a))
			}
		}
		d.Added = append(d.Added, r)
	})
	return d, err
}

// many is how many resources a list has room for that is used again. A response of a whole mesh has a list of
// megabytes, and others follow soon or not at all: a collection takes it.
const many = 1024

func (s *subscription) room(n int) []Resource {
	if n >= many {
		if list, _ := s.lists.Get().(*[]Resource); list != nil && cap(*list) >= n {
			return *list
		}
	}
	if n == 0 {
		return nil
	}
	return make([]Resource, 0, n)
}

// done is called with a delta that nobody uses any more.
func (s *subscription) done(d Delta) {
	if cap(d.Added) < many {
		return
	}
	clear(d.Added)
	list := d.Added[:0]
	s.lists.Put(&list)
}

// apply gives a delta to the handler and remembers what is in force.
func (s *subscription) apply(d Delta, h Handler, others *turn.Taker) []Reject {
	rejects := h.Apply(d)
	refused := make(map[string]bool, len(rejects))
	for _, r := range rejects {
		refused[r.Name] = true
	}
	for i := range d.Added {
		s.note(&d.Added[i], refused)
		others.Next()
	}
	for _, name := range d.Removed {
		delete(s.unconfirmed, name)
		s.known.drop(name)
		others.Next()
	}
	s.applied, s.lastHeard = true, time.Now()
	if s.demands != nil {
		s.demands.answer(d, refused, s.lastHeard)
	}
	return rejects
}

// note remembers what became of a resource.
func (s *subscription) note(r *Resource, refused map[string]bool) {
	if len(s.unconfirmed) > 0 {
		delete(s.unconfirmed, r.Name)
	}
	k := s.known.get(r.Name)
	switch {
	case len(refused) == 0 || !refused[r.Name]:
		if k == nil || k.version != r.Version {
			s.known.set(inForce{r.Name, r.Version})
		}
	case k != nil:
		s.known.set(inForce{k.name, ""}) // so that it is sent again
	}
}

// sweep removes what the server of a resumed stream does not have any more.
func (s *subscription) sweep(now time.Time, h Handler) {
	if len(s.unconfirmed) == 0 || s.lastHeard.IsZero() || now.Sub(s.lastHeard) < confirmAfter {
		return
	}
	names := slices.Sorted(maps.Keys(s.unconfirmed))
	s.unconfirmed = nil
	for _, name := range names {
		s.known.drop(name)
	}
	h.Apply(Delta{Type: s.typeURL, Removed: names})
}
