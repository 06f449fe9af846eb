package client

import (
	"maps"
	"slices"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
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
	demands *demands          // of the type on demand
	rest    []string          // of it: names that the first request had no room for
	applied bool              // a response was applied on any stream
	known   map[string]string // name → version in force, "" when the last one was refused

	// Names in force that the current stream was not told about: the server
	// sends them again, or has them no more. It cannot say so itself.
	unconfirmed map[string]bool
	lastHeard   time.Time // last response on this stream
}

func newSubscription(typeURL string) *subscription {
	return &subscription{typeURL: typeURL, known: map[string]string{}}
}

// begin makes the first request on a stream. Without names it subscribes to
// everything. Versions that do not fit into a message are left out.
func (s *subscription) begin(node *discovery.Node) *discovery.DeltaDiscoveryRequest {
	req := &discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: s.typeURL}
	s.unconfirmed, s.lastHeard, s.rest = nil, time.Time{}, nil
	if s.demands != nil {
		defer s.demands.begin(req)
	}
	if len(s.known) == 0 {
		return req
	}
	req.InitialResourceVersions = make(map[string]string, len(s.known))
	size := 0
	for name, version := range s.known {
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

// apply gives a response to the handler and remembers what is in force.
func (s *subscription) apply(resp *discovery.DeltaDiscoveryResponse, h Handler) []Reject {
	d := Delta{Type: s.typeURL, Removed: resp.GetRemovedResources(), First: !s.applied}
	for _, r := range resp.GetResources() {
		d.Added = append(d.Added, Resource{
			Name: r.GetName(), Version: r.GetVersion(), Aliases: r.GetAliases(),
			TypeURL: r.GetResource().GetTypeUrl(), Value: r.GetResource().GetValue(),
		})
	}
	rejects := h.Apply(d)
	refused := make(map[string]bool, len(rejects))
	for _, r := range rejects {
		refused[r.Name] = true
	}
	for _, r := range d.Added {
		delete(s.unconfirmed, r.Name)
		if !refused[r.Name] {
			s.known[r.Name] = r.Version
		} else if _, have := s.known[r.Name]; have {
			s.known[r.Name] = "" // so that it is sent again
		}
	}
	for _, name := range d.Removed {
		delete(s.unconfirmed, name)
		delete(s.known, name)
	}
	s.applied, s.lastHeard = true, time.Now()
	if s.demands != nil {
		s.demands.answer(resp, refused, s.lastHeard)
	}
	return rejects
}

// sweep removes what the server of a resumed stream does not have any more.
func (s *subscription) sweep(now time.Time, h Handler) {
	if len(s.unconfirmed) == 0 || s.lastHeard.IsZero() || now.Sub(s.lastHeard) < confirmAfter {
		return
	}
	names := slices.Sorted(maps.Keys(s.unconfirmed))
	s.unconfirmed = nil
	for _, name := range names {
		delete(s.known, name)
	}
	h.Apply(Delta{Type: s.typeURL, Removed: names})
}
