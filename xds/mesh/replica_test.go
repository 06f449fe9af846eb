package mesh

import (
	"reflect"
	"slices"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
)

// decodeAddress is the workload that b is, decoded as a whole; nil if it is none.
func decodeAddress(b []byte) *Workload {
	var a workload.Address
	if proto.Unmarshal(b, &a) != nil || a.GetWorkload() == nil {
		return nil
	}
	w, err := DecodeWorkload(a.GetWorkload())
	if err != nil {
		return nil
	}
	return w
}

func encodeAddress(t testing.TB, w *workload.Workload) []byte {
	t.Helper()
	b, err := proto.Marshal(&workload.Address{Type: &workload.Address_Workload{Workload: w}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func podOf(name, ip string) *workload.Workload {
	return &workload.Workload{Uid: "c//Pod/shop/" + name, Name: name, Namespace: "shop", Node: "n-" + ip, Addresses: [][]byte{{10, 0, 0, ip[0]}},
		ServiceAccount: "web", WorkloadName: "web", AuthorizationPolicies: []string{"shop/a"}, TunnelProtocol: workload.TunnelProtocol_HBONE,
		Services: map[string]*workload.PortList{"shop/web.shop.svc": {Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080}}}}}
}

func TestReplica(t *testing.T) {
	var n Interner
	first := encodeAddress(t, podOf("web-1", "1"))
	if n.Replica(first, "x") != nil {
		t.Fatal("a replica of nothing")
	}
	w := decodeAddress(first)
	n.Intern(w)
	n.Remember(first, w)
	for _, tt := range []struct {
		name   string
		change func(*workload.Workload)
		want   bool
	}{
		{"another pod", func(*workload.Workload) {}, true},
		{"two addresses", func(w *workload.Workload) { w.Addresses = append(w.Addresses, make([]byte, 16)) }, true},
		{"on no node, without an address", func(w *workload.Workload) { w.Node, w.Addresses = "", nil }, true},
		{"a name that its uid does not end with", func(w *workload.Workload) { w.Name = "other" }, true},
		{"of another workload", func(w *workload.Workload) { w.WorkloadName = "other" }, true},
		{"on its own", func(w *workload.Workload) { w.WorkloadName = "web-2" }, true},
		{"an address of three bytes", func(w *workload.Workload) { w.Addresses = [][]byte{{1, 2, 3}} }, false},
		{"without a uid", func(w *workload.Workload) { w.Uid = "" }, false},
		{"another policy", func(w *workload.Workload) { w.AuthorizationPolicies = []string{"shop/b"} }, false},
		{"no policy", func(w *workload.Workload) { w.AuthorizationPolicies = nil }, false},
		{"unhealthy", func(w *workload.Workload) { w.Status = workload.WorkloadStatus_UNHEALTHY }, false},
		{"another service account", func(w *workload.Workload) { w.ServiceAccount = "db" }, false},
		{"another port", func(w *workload.Workload) { w.Services["shop/web.shop.svc"].Ports[0].TargetPort = 1 }, false},
	} {
		in := podOf("web-2", "2")
		tt.change(in)
		b := encodeAddress(t, in)
		got := n.Replica(b, in.Uid)
		if (got != nil) != tt.want {
			t.Errorf("%s: %+v, want a replica: %v", tt.name, got, tt.want)
		}
		if got != nil && (!got.Says(decodeAddress(b)) || got.Traits != w.Traits) {
			t.Errorf("%s: %+v, want %+v", tt.name, got, decodeAddress(b))
		}
	}
	inner := encodeAddress(t, podOf("web-2", "2"))
	if n.Replica(slices.Concat(inner, inner), "x") != nil || n.Replica(nil, "x") != nil || n.Replica([]byte{0x12, 0}, "x") != nil {
		t.Error("what is not one workload is a replica")
	}
}

// What pods of a headless service are called is for each alone.
func TestNoReplicaHasDNSNames(t *testing.T) {
	var n Interner
	x, err := proto.Marshal(&ambit.WorkloadExtension{DnsNames: []string{"web-0.web.shop.svc.cluster.local"}})
	if err != nil {
		t.Fatal(err)
	}
	in := podOf("web-0", "1")
	in.Extensions = []*workload.Extension{{Name: api.WorkloadExtension, Config: &anypb.Any{TypeUrl: api.WorkloadExtensionType, Value: x}}}
	b := encodeAddress(t, in)
	w := decodeAddress(b)
	n.Intern(w)
	n.Remember(b, w)
	if got := n.Replica(b, w.UID); got != nil {
		t.Errorf("%+v", got)
	}
}

// FuzzReplica: whatever was remembered, a replica is what decoding gives.
func FuzzReplica(f *testing.F) {
	one, two := encodeAddress(f, podOf("web-1", "1")), encodeAddress(f, podOf("web-2", "2"))
	f.Add(one, two, "web-3", []byte{10, 0, 0, 3})
	f.Add(two, encodeAddress(f, &workload.Workload{Uid: "u"}), "\xff", []byte{1})
	f.Add([]byte{0x12, 0}, slices.Concat(one, two), "", make([]byte, 16))
	f.Add(encodeAddress(f, &workload.Workload{Uid: "u", Extensions: []*workload.Extension{{Name: "x"}}}), []byte{0x0a, 2, 0x0b, 0x0c}, "u", []byte(nil))
	f.Fuzz(func(t *testing.T, a, b []byte, s string, ip []byte) {
		var n Interner
		same := func(b []byte) {
			t.Helper()
			got, want := n.Replica(b, s), decodeAddress(b)
			switch {
			case got == nil:
			case want == nil:
				t.Fatalf("%x: %+v is no workload", b, got)
			case !got.Says(want) || !reflect.DeepEqual(got.Addrs, want.Addrs):
				t.Fatalf("%x: %+v with %+v, want %+v with %+v", b, got, got.Traits, want, want.Traits)
			}
		}
		w := decodeAddress(a)
		if w == nil {
			return
		}
		n.Intern(w)
		n.Remember(a, w)
		same(a)
		same(b)
		for _, num := range []protowire.Number{fieldName, fieldNode, fieldWorkloadName, fieldUID} {
			same(extended(a, num, []byte(s)))
		}
		same(extended(a, fieldAddresses, ip))
		same(extended(a, fieldWorkload, b))
		same(extended(extended(b, fieldUID, []byte(s)), fieldAddresses, ip))
	})
}

// extended is an address with one more field of its workload.
func extended(b []byte, num protowire.Number, v []byte) []byte {
	_, _, k := protowire.ConsumeTag(b)
	if k < 0 {
		return nil
	}
	in, l := protowire.ConsumeBytes(b[k:])
	if l < 0 {
		return nil
	}
	in = protowire.AppendBytes(protowire.AppendTag(slices.Clone(in), num, protowire.BytesType), v)
	return protowire.AppendBytes(protowire.AppendTag(nil, fieldWorkload, protowire.BytesType), in)
}
