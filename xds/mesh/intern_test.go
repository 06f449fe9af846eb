package mesh

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"
)

// Interning changes nothing that a workload says, and what is equal is kept once.
func TestIntern(t *testing.T) {
	var n Interner
	make := func(i int) *Workload {
		return &Workload{
			UID: fmt.Sprint(i), Policies: []string{"a", fmt.Sprint("p", i/2)},
			Services:       map[Hostname][]Port{{"ns", fmt.Sprint("s", i/2)}: {{80, uint16(8080 + i/4), 0}}, {"ns", "all"}: nil},
			Waypoint:       &GatewayAddress{Host: Hostname{"ns", "w"}, HBONEPort: uint16(15000 + i/2)},
			NetworkGateway: &GatewayAddress{Network: "n", Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(i / 2)})},
		}
	}
	var before *Workload
	for i := range 20_000 { // more than are remembered
		w, want := make(i), make(i)
		if n.Intern(w); !reflect.DeepEqual(w, want) {
			t.Fatalf("%+v became %+v", want, w)
		}
		if i%2 == 1 && (reflect.ValueOf(w.Services).Pointer() != reflect.ValueOf(before.Services).Pointer() || &w.Policies[0] != &before.Policies[0] ||
			w.Waypoint != before.Waypoint || w.NetworkGateway != before.NetworkGateway) {
			t.Fatalf("%+v shares nothing with %+v", w, before)
		}
		before = w
	}
	bare := &Workload{UID: "bare"}
	if n.Intern(bare); !reflect.DeepEqual(bare, &Workload{UID: "bare"}) {
		t.Errorf("%+v", bare)
	}
}
