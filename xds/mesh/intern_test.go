package mesh

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// Interning changes nothing that a workload says, and what is equal is kept once.
func TestIntern(t *testing.T) {
	var n Interner
	make := func(i int) *Workload {
		return &Workload{UID: fmt.Sprint(i), Traits: &Traits{Policies: []string{"a", fmt.Sprint("p", i/2)}, Services: map[Hostname][]Port{{"ns", fmt.Sprint("s", i/2)}: {{80, uint16(8080 + i/4), 0}}, {"ns", "all"}: nil}, Waypoint: &GatewayAddress{Host: Hostname{"ns", "w"}, HBONEPort: uint16(15000 + i/2)}, NetworkGateway: &GatewayAddress{Network: "n", Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(i / 2)})}}}
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
	bare := &Workload{UID: "bare", Traits: &Traits{}}
	if n.Intern(bare); !reflect.DeepEqual(bare, &Workload{UID: "bare", Traits: &Traits{}}) {
		t.Errorf("%+v", bare)
	}
}

// Whatever differs between two workloads, they do not say the same.
func TestSays(t *testing.T) {
	full := func() *Workload {
		return &Workload{UID: "a", Name: "a", Node: "a", Addrs: []netip.Addr{ip("10.0.0.1")}, DNSNames: []string{"a"}, Source: [2]uint64{1, 2}, Traits: &Traits{
			Policies: []string{"a"}, Services: map[Hostname][]Port{{"a", "a"}: {{1, 1, 1}}}, Waypoint: &GatewayAddress{}, NetworkGateway: &GatewayAddress{}, AppTunnel: &ApplicationTunnel{},
		}}
	}
	fields := 0
	var alter func(v reflect.Value, f func())
	alter = func(v reflect.Value, f func()) {
		keep := reflect.ValueOf(v.Interface())
		defer v.Set(keep)
		switch v.Interface().(type) {
		case netip.Addr:
			v.Set(reflect.ValueOf(ip("10.0.0.2")))
			f()
			return
		case identity.ID:
			v.Set(reflect.ValueOf(identity.MustParse("spiffe://a/ns/b/sa/c")))
			f()
			return
		}
		switch v.Kind() {
		case reflect.String:
			v.SetString("b")
		case reflect.Bool:
			v.SetBool(true)
		case reflect.Int32:
			v.SetInt(3)
		case reflect.Uint16, reflect.Uint32:
			v.SetUint(3)
		case reflect.Slice:
			v.Set(reflect.Zero(v.Type()))
			f()
			v.Set(reflect.AppendSlice(reflect.Zero(v.Type()), keep)) // an array of its own
			alter(v.Index(0), f)
			return
		case reflect.Map:
			v.Set(reflect.Zero(v.Type()))
			f()
			v.Set(reflect.ValueOf(map[Hostname][]Port{{"a", "a"}: {{1, 2, 1}}}))
		case reflect.Pointer:
			of := reflect.New(v.Type().Elem())
			of.Elem().Set(v.Elem())
			v.Set(reflect.Zero(v.Type()))
			if v.Type() != reflect.TypeFor[*Traits]() {
				f()
			}
			v.Set(of)
			alter(of.Elem(), f)
			return
		case reflect.Struct:
			for i := range v.NumField() {
				alter(v.Field(i), f)
			}
			return
		default:
			t.Fatalf("a field of kind %s", v.Kind())
		}
		f()
	}
	a, b := full(), full()
	if !a.Says(b) || a.Traits.hash() != b.Traits.hash() || (*Workload)(nil).Says(a) {
		t.Fatal("what is equal does not say the same")
	}
	for i := range reflect.TypeFor[Workload]().NumField() {
		name := reflect.TypeFor[Workload]().Field(i).Name
		if name == "Source" {
			continue
		}
		alter(reflect.ValueOf(b).Elem().Field(i), func() {
			if fields++; a.Says(b) || b.Says(a) {
				t.Errorf("%s: %+v says what %+v says; traits %+v, %+v", name, b, a, b.Traits, a.Traits)
			}
		})
	}
	if !a.Says(b) || fields < 40 {
		t.Errorf("%d alterations, and then %+v", fields, b)
	}
}
