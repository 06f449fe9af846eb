package lease

import (
	"net/netip"
	"reflect"
	"testing"

	"google.golang.org/protobuf/proto"

	wire "github.com/ambit-mesh/ambit/xds/api/lease"
)

// FuzzGrant has what an agent reads of a proxy: never a panic, and what is read is
// what would be written.
func FuzzGrant(f *testing.F) {
	a := netip.MustParseAddrPort("10.0.0.1:80")
	seed, err := proto.Marshal(Grant{Key: Key{1, a}, Targets: []Target{{2, a, 3}}}.message())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		req := &wire.Request{}
		if proto.Unmarshal(data, req) != nil {
			return
		}
		g, err := grantOf(req.GetGrant())
		if err != nil {
			return
		}
		again, err := grantOf(g.message().GetGrant())
		if err != nil || !reflect.DeepEqual(g, again) {
			t.Errorf("%+v became %+v, %v", g, again, err)
		}
		_ = g.Check()
	})
}
