//go:build !race

package client

import (
	"fmt"
	"runtime"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/turn"
)

// A resource that comes again as it was costs no allocation, however many there are, but where it lies in two pieces.
func TestKnownResourcesAllocs(t *testing.T) {
	resp := &discovery.DeltaDiscoveryResponse{TypeUrl: "t", Nonce: "n"}
	for i := range 1000 {
		resp.Resources = append(resp.Resources, &discovery.Resource{Name: fmt.Sprint("c//Pod/shop/p", i), Version: fmt.Sprint("v", i),
			Aliases: []string{fmt.Sprint("n/10.0.0.", i)}, Resource: &anypb.Any{TypeUrl: "t", Value: make([]byte, 300)}})
	}
	b, err := proto.Marshal(resp)
	if err != nil {
		t.Fatal(err)
	}
	s, r := newSubscription("t"), &response{cutUp(b, 0)}
	h := handlerFunc(func(Delta) []Reject { return nil })
	again := func() {
		var others turn.Taker
		head, err := r.head(&others)
		if err != nil {
			t.Fatal(err)
		}
		d, err := s.take(r, head, &others)
		if err != nil {
			t.Fatal(err)
		}
		s.apply(d, h, &others)
	}
	again()
	heap := inUse()
	first := s.known
	s.known = newVersions()
	again()
	if got := (inUse() - heap) / 1000; got > 110 {
		t.Errorf("the name and the version of a resource take %d bytes, want 110 at most", got)
	}
	runtime.KeepAlive(first)
	if n := testing.AllocsPerRun(10, again); n > 8 {
		t.Errorf("%v allocations for 1000 known resources, want 8 at most", n)
	}
}

func inUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
