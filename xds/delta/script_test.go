package delta

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/golden"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

// TestScripts runs testdata/*.txtar. Each command is repeated in want/transcript
// with what came of it below. Commands:
//
//	serve TYPE...                  a store of these types, dependencies first; again: a restarted one
//	limits KEY=N...                of streams from now on: window, bytes
//	put TYPE NAME=CONTENT... [also ALIAS] [via NAME]
//	remove TYPE NAME...
//	commit                         what was put and removed since becomes visible at once
//	connect                        the client begins a stream; it keeps what it has
//	request TYPE [+NAME] [-NAME]   subscribe and unsubscribe; `resume` names the versions the
//	                               client has, and NAME? wants one that it never got
//	next                           the next response, not answered
//	ack TYPE, nack TYPE MESSAGE    answers the oldest response of the type
//	drain                          takes and acknowledges every response there is
//	status                         how far the client is
func TestScripts(t *testing.T) {
	golden.Run(t, "testdata/*.txtar", func(t *testing.T, a *golden.Archive) {
		s := &script{t: t}
		for _, c := range a.Commands {
			fmt.Fprintln(&s.out, strings.Join(c, " "))
			s.run(c[0], c[1:])
		}
		a.Want("transcript", s.out.String())
	})
}

// script is a server, and a client that does what it is told.
type script struct {
	t        *testing.T
	out      strings.Builder
	store    *Store
	limits   Limits
	upserts  []Upsert
	removals []Removal
	stream   *Stream
	has      map[string]map[string]string // type → name → version
	unacked  []*discovery.DeltaDiscoveryResponse
}

func (s *script) say(format string, args ...any) { fmt.Fprintf(&s.out, "    "+format+"\n", args...) }

func (s *script) run(verb string, args []string) {
	switch verb {
	case "serve":
		s.store = NewStore(args...)
	case "limits":
		for _, a := range args {
			key, n, _ := strings.Cut(a, "=")
			field := map[string]*int{"window": &s.limits.Window, "bytes": &s.limits.Bytes}[key]
			if _, err := fmt.Sscan(n, field); err != nil {
				s.t.Fatalf("limits %s: %v", a, err)
			}
		}
	case "put":
		s.put(args[0], args[1:])
	case "remove":
		for _, name := range args[1:] {
			s.removals = append(s.removals, Removal{args[0], name})
		}
	case "commit":
		n, err := s.store.Apply(s.upserts, s.removals)
		if err != nil {
			s.t.Fatal(err)
		}
		s.upserts, s.removals = nil, nil
		s.say("%d changed", n)
	case "connect":
		s.stream, s.unacked = s.store.NewStream(s.limits), nil
	case "request":
		s.request(args[0], args[1:])
	case "next":
		if s.next() == nil {
			s.say("nothing")
		}
	case "ack", "nack":
		s.answer(args[0], strings.Join(args[1:], " "))
	case "drain":
		for r := s.next(); r != nil; r = s.next() {
			s.answer(r.TypeUrl, "")
		}
	case "status":
		for _, ty := range s.stream.Status() {
			s.say("%s: %d resources sent, %d unacked, %d nacks, %d rejected, last nack %q; synced %v",
				ty.Type, ty.Resources, ty.Unacked, ty.Nacks, ty.Rejected, ty.LastNack, s.stream.Synced())
		}
	default:
		s.t.Fatalf("unknown command %q", verb)
	}
}

func (s *script) put(typ string, args []string) {
	for i := 0; i < len(args); i++ {
		last := len(s.upserts) - 1
		switch name, content, _ := strings.Cut(args[i], "="); name {
		case "also":
			i++
			s.upserts[last].Aliases = append(s.upserts[last].Aliases, args[i])
		case "via":
			i++
			s.upserts[last].Via = append(s.upserts[last].Via, args[i])
		default:
			s.upserts = append(s.upserts, up(typ, name, content))
		}
	}
}

func (s *script) request(typ string, args []string) {
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: typ, InitialResourceVersions: map[string]string{}}
	for _, a := range args {
		if name, ok := strings.CutPrefix(a, "+"); ok {
			req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, name)
		} else if name, ok := strings.CutPrefix(a, "-"); ok {
			req.ResourceNamesUnsubscribe = append(req.ResourceNamesUnsubscribe, name)
		} else if name, ok := strings.CutSuffix(a, "?"); ok {
			req.InitialResourceVersions[name] = ""
		} else if a == "resume" {
			for name, version := range s.has[typ] {
				req.InitialResourceVersions[name] = version
			}
		} else {
			s.t.Fatalf("request %s: %q", typ, a)
		}
	}
	ev, err := s.stream.Request(req)
	if err != nil {
		s.say("%v", err)
	} else if ev.Resumed > 0 {
		s.say("resumed with %d", ev.Resumed)
	}
}

// next shows the next response; order within it is of no meaning but for
// resources, which come in the order they changed.
func (s *script) next() *discovery.DeltaDiscoveryResponse {
	r, err := s.stream.Next()
	if err != nil {
		s.say("%v", err)
		return nil
	}
	if r == nil {
		return nil
	}
	s.unacked = append(s.unacked, r)
	s.say("%s", show(r))
	return r
}

func (s *script) answer(typ, fault string) {
	i := slices.IndexFunc(s.unacked, func(r *discovery.DeltaDiscoveryResponse) bool { return r.TypeUrl == typ })
	if i < 0 {
		s.t.Fatalf("no response of %s to answer", typ)
	}
	r := s.unacked[i]
	s.unacked = slices.Delete(s.unacked, i, i+1)
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: typ, ResponseNonce: r.Nonce}
	if fault != "" {
		req.ErrorDetail = &discovery.Status{Message: fault}
	}
	s.keep(r, fault)
	if _, err := s.stream.Request(req); err != nil {
		s.say("%v", err)
	}
}

// keep remembers what the client has: all but what its complaint begins with.
func (s *script) keep(r *discovery.DeltaDiscoveryResponse, fault string) {
	if s.has == nil {
		s.has = map[string]map[string]string{}
	}
	if s.has[r.TypeUrl] == nil {
		s.has[r.TypeUrl] = map[string]string{}
	}
	for _, res := range r.Resources {
		if !strings.HasPrefix(fault, res.Name+":") {
			s.has[r.TypeUrl][res.Name] = res.Version
		}
	}
	for _, name := range r.RemovedResources {
		delete(s.has[r.TypeUrl], name)
	}
}
