package store

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
)

// Bytes that are known are passed over only while what became of them is in force: after a removal, after another name
// took the uid's place, and within a response that changes and changes back, they count again.
func TestKnownBytesCountAgain(t *testing.T) {
	s := newTestStore(t)
	res := func(name, uid string, ip byte) client.Resource {
		b, err := proto.Marshal(&workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{Uid: uid, Name: uid, Addresses: [][]byte{{10, 0, 0, ip}}}}})
		if err != nil {
			t.Fatal(err)
		}
		return client.Resource{Name: name, TypeURL: api.AddressType, Value: b}
	}
	want := func(after string, ip byte) {
		t.Helper()
		w := s.View().Mesh.Workload("w")
		if (ip == 0) != (w == nil) || w != nil && w.Addrs[0].As4()[3] != ip {
			t.Errorf("%s: %+v is in force, want 10.0.0.%d", after, w, ip)
		}
	}
	apply := func(d client.Delta) []client.Reject {
		d.Type = api.AddressType
		return s.Apply(d)
	}
	one, two := res("w", "w", 1), res("w", "w", 2)
	apply(client.Delta{Added: []client.Resource{one}})
	want("the first", 1)
	apply(client.Delta{Removed: []string{"w"}})
	want("its removal", 0)
	apply(client.Delta{Added: []client.Resource{one}})
	want("the same again", 1)
	apply(client.Delta{Added: []client.Resource{two, one}})
	want("a change and back", 1)
	apply(client.Delta{Added: []client.Resource{one, two}})
	want("as it was and a change", 2)
	apply(client.Delta{Added: []client.Resource{res("x", "w", 3)}})
	want("another name's", 3)
	apply(client.Delta{Added: []client.Resource{two}})
	want("its own name's again", 2)

	bad := two
	bad.TypeURL = "another"
	for range 2 {
		if r := apply(client.Delta{Added: []client.Resource{bad}}); len(r) != 1 {
			t.Errorf("a value of another type is refused %d times", len(r))
		}
		broken := client.Resource{Name: "w", TypeURL: api.AddressType, Value: []byte{0xff}}
		if r := apply(client.Delta{Added: []client.Resource{broken}}); len(r) != 1 {
			t.Errorf("bytes that nobody can decode are refused %d times", len(r))
		}
	}
	want("refusals", 2)
	if apply(client.Delta{Removed: []string{"w", "x"}}); len(s.raws.known) > 0 {
		t.Errorf("%d values are remembered of nothing", len(s.raws.known))
	}
}

// A version that is held back stays so when it comes again, until its own time is up, and goes when the one in force
// comes again.
func TestHeldBytesComeAgain(t *testing.T) {
	s := newTestStore(t)
	s.policy("shop/a")
	s.workload("w", 1, "shop/a")
	s.workload("w", 1, "shop/a", "shop/b")
	deadline := s.held["w"].deadline
	s.workload("w", 1, "shop/a", "shop/b")
	if s.held["w"].deadline != deadline || s.named["shop/b"] != 1 {
		t.Errorf("held %v, named %v", s.held, s.named)
	}
	s.workload("w", 1, "shop/a")
	s.workload("w", 1, "shop/a")
	if len(s.held) > 0 || s.named["shop/a"] != 1 || s.named["shop/b"] != 0 {
		t.Errorf("held %v, named %v", s.held, s.named)
	}
	s.workload("w", 1, "shop/a", "shop/b")
	if len(s.held) != 1 {
		t.Error("a version that was held before is not held again")
	}
	s.policy("shop/b")
	s.refs("w", "shop/a shop/b")
}
