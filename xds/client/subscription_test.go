package client

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/xds/turn"
)

type handlerFunc func(Delta) []Reject

func (f handlerFunc) Apply(d Delta) []Reject { return f(d) }

func added(names ...string) (d Delta) {
	for _, n := range names {
		d.Added = append(d.Added, Resource{Name: n, Version: "1"})
	}
	return d
}

// TestSweepRemovesWhatTheServerForgot: a name that did not fit into the resume
// request and is not sent again does not exist any more.
func TestSweepRemovesWhatTheServerForgot(t *testing.T) {
	var removed []string
	refuse := ""
	h := handlerFunc(func(d Delta) []Reject {
		removed = append(removed, d.Removed...)
		if refuse != "" {
			return []Reject{{refuse, "no"}}
		}
		return nil
	})
	s := newSubscription("t")
	s.begin(nil)
	s.apply(added("a", "b", "c"), h, new(turn.Taker))
	refuse = "b"
	s.apply(added("b"), h, new(turn.Taker)) // a new version of b, which is refused
	refuse = "c"
	s.apply(added("c"), h, new(turn.Taker))
	refuse = ""

	req := s.begin(nil)
	if len(req.GetInitialResourceVersions()) != 1 || req.GetInitialResourceVersions()["a"] != "1" {
		t.Fatalf("initial versions %v, want only a", req.GetInitialResourceVersions())
	}
	s.sweep(time.Now().Add(time.Hour), h)
	if len(removed) > 0 {
		t.Fatalf("%q removed before the server answered", removed)
	}
	s.apply(added("c"), h, new(turn.Taker))
	s.sweep(s.lastHeard.Add(confirmAfter-1), h)
	if len(removed) > 0 {
		t.Fatalf("%q removed too early", removed)
	}
	s.sweep(s.lastHeard.Add(confirmAfter), h)
	if !slices.Equal(removed, []string{"b"}) {
		t.Errorf("%q removed, want b", removed)
	}
	if req := s.begin(nil); len(req.GetInitialResourceVersions()) != 2 {
		t.Errorf("initial versions %v, want a and c", req.GetInitialResourceVersions())
	}
}

func TestNackMessageIsBounded(t *testing.T) {
	var rejects []Reject
	for i := range 10000 {
		rejects = append(rejects, Reject{fmt.Sprint("name\xff", i), strings.Repeat("x", 50)})
	}
	if got := nackMessage(rejects); len(got) > maxNackMessage+200 || !strings.Contains(got, "more") || strings.ContainsRune(got, '\xff') {
		t.Errorf("%d bytes: %.80q", len(got), got)
	}
}

func TestConfigProblemsAreAllNamed(t *testing.T) {
	_, err := New(Config{})
	for _, want := range []string{"target is empty", "TLS is not set", "no types"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
}

// TestReconnectsAreSpread: proxies that lost their control plane together do not
// come back together.
func TestReconnectsAreSpread(t *testing.T) {
	for _, d := range []time.Duration{minBackoff, time.Second, maxBackoff} {
		lowest, highest := d, time.Duration(0)
		for range 1000 {
			w := jittered(d)
			lowest, highest = min(lowest, w), max(highest, w)
		}
		if lowest < d/2 || highest >= d || highest-lowest < d/3 {
			t.Errorf("after %v waits are between %v and %v", d, lowest, highest)
		}
	}
}
