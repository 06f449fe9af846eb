package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

// TestDemandAnsweredBetweenLookAndWait: what comes for somebody else between the
// look for a key and the wait for it is not asked for again.
func TestDemandAnsweredBetweenLookAndWait(t *testing.T) {
	looks := 0
	d := newDemands(func(string) bool { looks++; return looks > 1 })
	if w, err := d.enter("n/10.0.0.1"); w != nil || err != nil || len(d.keys) != 0 {
		t.Errorf("waits for what is there: %v, %v", w, err)
	}
}

func TestDemandsAreBoundedInTimeAndNumber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		there := map[string]bool{}
		d := newDemands(func(k string) bool { return there[k] })
		begin := time.Now()
		err := d.wait(t.Context(), []string{"n/10.0.0.1"})
		if e, ok := errors.AsType[*DemandError](err); !ok || e.Key != "n/10.0.0.1" || time.Since(begin) != demandTimeout {
			t.Fatalf("%v after %v", err, time.Since(begin))
		}
		if len(d.keys) != 0 {
			t.Error("a key that nobody waits for and that was not sent stays")
		}
		// Absent: no answer is waited for again, until it is too old.
		answered := make(chan error, 1)
		go func() { answered <- d.wait(context.Background(), []string{"x"}) }()
		synctest.Wait()
		if req := d.next("t"); len(req.GetResourceNamesSubscribe()) != 1 {
			t.Fatalf("asked for %v", req)
		}
		d.answer(Delta{Removed: []string{"x"}}, nil, time.Now())
		if err := <-answered; err != nil {
			t.Fatal(err)
		}
		begin = time.Now()
		if err := d.wait(t.Context(), []string{"x"}); err != nil || time.Since(begin) != 0 {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		if d.expire(time.Now(), "t") != nil {
			t.Error("unsubscribed at once")
		}
		time.Sleep(absentFor)
		if req := d.expire(time.Now(), "t"); len(req.GetResourceNamesUnsubscribe()) != 1 || len(d.keys) != 0 {
			t.Errorf("unsubscribed %v, %d keys left", req, len(d.keys))
		}
		// Refused: the word is not known.
		go func() { answered <- d.wait(context.Background(), []string{"n/10.0.0.2"}) }()
		synctest.Wait()
		d.next("t")
		d.answer(Delta{Added: []Resource{{Name: "bad", Aliases: []string{"n/10.0.0.2"}}}}, map[string]bool{"bad": true}, time.Now())
		if err := <-answered; err == nil || !strings.Contains(err.Error(), "was refused") {
			t.Errorf("a refused answer: %v", err)
		}
		for i := range maxDemands {
			if _, err := d.enter(fmt.Sprint(i)); err != nil {
				t.Fatal(i, err)
			}
		}
		if _, err := d.enter("one more"); err == nil {
			t.Error("no bound")
		}
		seen := 0
		for req := d.next("t"); req != nil; req = d.next("t") {
			if seen += len(req.ResourceNamesSubscribe); len(req.ResourceNamesSubscribe) > maxDemandBatch {
				t.Fatalf("%d keys in one request", len(req.ResourceNamesSubscribe))
			}
		}
		if seen != maxDemands {
			t.Errorf("%d keys asked for, want %d", seen, maxDemands)
		}
		first := &discovery.DeltaDiscoveryRequest{}
		d.begin(first)
		if len(first.InitialResourceVersions) != maxDemandBatch {
			t.Errorf("%d pending keys in a first request", len(first.InitialResourceVersions))
		}
	})
}

// What is known to be absent makes room for what somebody needs: one pod that
// tries address after address must not stop the others of its node.
func TestAbsentKeysMakeRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDemands(func(string) bool { return false })
		var all []string
		for i := range maxDemands {
			all = append(all, fmt.Sprint(i))
		}
		donec := make(chan error, 1)
		go func() { donec <- d.wait(context.Background(), all) }()
		synctest.Wait()
		for req := d.next("t"); req != nil; req = d.next("t") {
		}
		d.answer(Delta{Removed: all}, nil, time.Now())
		if err := <-donec; err != nil {
			t.Fatal(err)
		}
		w, err := d.enter("one more")
		if err != nil {
			t.Fatal(err)
		}
		req := d.next("t")
		if len(d.keys) != maxDemands || len(req.ResourceNamesSubscribe) != 1 || len(req.ResourceNamesUnsubscribe) != 1 {
			t.Fatalf("%d keys, %d asked for and %d given up", len(d.keys), len(req.ResourceNamesSubscribe), len(req.ResourceNamesUnsubscribe))
		}
		// What was given up is asked for again, before the control plane heard of either.
		gone := req.ResourceNamesUnsubscribe[0]
		d.leave("one more", w)
		for _, key := range []string{gone, "two more"} {
			if _, err := d.enter(key); err != nil {
				t.Fatal(err)
			}
		}
		var kept string
		for _, key := range all {
			if d.keys[key] == nil {
				kept = key
			}
		}
		if _, err := d.enter(kept); err != nil {
			t.Fatal(err)
		}
		req = d.next("t")
		if slices.Contains(req.ResourceNamesUnsubscribe, kept) || !slices.Contains(req.ResourceNamesSubscribe, kept) {
			t.Errorf("%s is wanted again: asked for %v, given up %v", kept, req.ResourceNamesSubscribe, req.ResourceNamesUnsubscribe)
		}
		// All of them wait: there is no room to make.
		clear(d.keys)
		d.absent = 0
		for i := range maxDemands {
			if _, err := d.enter(fmt.Sprint(i)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := d.enter("one more"); err == nil {
			t.Error("no bound")
		}
	})
}

// A removal that was sent before the control plane heard of a key is no answer
// to it.
func TestRemovalBeforeTheQuestion(t *testing.T) {
	d := newDemands(func(string) bool { return false })
	if _, err := d.enter("x"); err != nil {
		t.Fatal(err)
	}
	d.answer(Delta{Removed: []string{"x"}}, nil, time.Now())
	if w := d.keys["x"]; w == nil || !w.until.IsZero() {
		t.Error("taken for absent before it was asked for")
	}
}

// On demand, what a client had in a version that it refused is asked for by
// name on the next stream; nobody would send it by itself.
func TestOnDemandAsksForWhatItRefused(t *testing.T) {
	s := newSubscription("t")
	s.demands = newDemands(func(string) bool { return true })
	s.known.set(newInForce([]byte("good"), []byte("1")))
	s.known.set(newInForce([]byte("refused"), nil))
	req := s.begin(nil)
	if len(req.InitialResourceVersions) != 1 || req.InitialResourceVersions["good"] != "1" || !slices.Equal(s.rest, []string{"refused"}) || len(s.unconfirmed) > 0 {
		t.Errorf("versions %v, by name %v, in doubt %v", req.InitialResourceVersions, s.rest, s.unconfirmed)
	}
}
