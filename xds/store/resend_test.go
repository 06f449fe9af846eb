package store

import (
	"fmt"
	"runtime"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
)

// wholeMesh is every resource of a mesh of n workloads, as a control plane sends
// it that knows nothing of what its proxies have.
func wholeMesh(t testing.TB, n int) (addresses, policies client.Delta) {
	t.Helper()
	addresses, policies = client.Delta{Type: api.AddressType}, client.Delta{Type: api.AuthorizationType}
	add := func(d *client.Delta, name string, m proto.Message) {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		d.Added = append(d.Added, client.Resource{Name: name, TypeURL: d.Type, Value: b})
	}
	for i := range n / 50 {
		host := fmt.Sprintf("s%d.shop.svc", i)
		add(&addresses, "shop/"+host, &workload.Address{Type: &workload.Address_Service{Service: &workload.Service{
			Namespace: "shop", Name: fmt.Sprint("s", i), Hostname: host, Addresses: []*workload.NetworkAddress{{Address: []byte{10, 96, byte(i >> 8), byte(i)}}},
			Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080}}}}})
	}
	for i := range n {
		uid := fmt.Sprintf("c//Pod/shop/p%d", i)
		add(&addresses, uid, &workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{
			Uid: uid, Namespace: "shop", Name: fmt.Sprint("p", i), Node: fmt.Sprint("n", i%100), Addresses: [][]byte{{10, byte(i >> 16), byte(i >> 8), byte(i)}},
			AuthorizationPolicies: []string{fmt.Sprint("shop/a", i%10)}, Locality: &workload.Locality{Region: "r", Zone: "z"},
			Services: map[string]*workload.PortList{fmt.Sprintf("shop/s%d.shop.svc", i%(n/50)): {Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080}}}}}}})
	}
	for i := range 10 {
		key := fmt.Sprint("shop/a", i)
		add(&policies, key, &security.Authorization{Namespace: "shop", Name: fmt.Sprint("a", i), Scope: security.Scope_WORKLOAD_SELECTOR,
			Rules: []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{{DestinationPorts: []uint32{80}}}}}}}})
	}
	return addresses, policies
}

// TestResendingEverythingChangesNothing: 70,000 workloads that come again as they
// were are no change. Lookups go on, nobody is told, no connection is decided
// anew, and nothing more is kept; what did change among them is all that changes.
func TestResendingEverythingChangesNothing(t *testing.T) {
	const n = meshSize
	s := newTestStore(t)
	addresses, policies := wholeMesh(t, n)
	for _, d := range []client.Delta{policies, addresses} {
		if r := s.Apply(d); len(r) > 0 {
			t.Fatal(r[0])
		}
	}
	before, told, heap := s.View(), len(s.changes), inUse()

	stopc, donec := make(chan struct{}), make(chan int)
	go func() {
		lookups := 0
		for i := 0; ; i = (i + 7919) % n {
			select {
			case <-stopc:
				donec <- lookups
				return
			default:
			}
			v, uid := s.View(), fmt.Sprintf("c//Pod/shop/p%d", i)
			if w := v.Mesh.Workload(uid); w == nil || v.Mesh.WorkloadByAddr("", w.Addrs[0]) != w {
				t.Errorf("%s is not found while everything comes again", uid)
			}
			lookups++
		}
	}()
	for _, d := range []client.Delta{addresses, policies} {
		if r := s.Apply(d); len(r) > 0 {
			t.Fatal(r[0])
		}
	}
	close(stopc)
	if <-donec == 0 {
		t.Error("no lookup came through")
	}
	if s.View() != before || len(s.changes) != told {
		t.Error("what came again as it was has moved the view")
	}
	if now := inUse(); now > heap+heap/10 {
		t.Errorf("%d MiB are in use, %d before", now>>20, heap>>20)
	}

	one := addresses.Added[len(addresses.Added)-1]
	var a workload.Address
	if err := proto.Unmarshal(one.Value, &a); err != nil {
		t.Fatal(err)
	}
	a.GetWorkload().Status = workload.WorkloadStatus_UNHEALTHY
	b, err := proto.Marshal(&a)
	if err != nil {
		t.Fatal(err)
	}
	addresses.Added[len(addresses.Added)-1].Value = b
	s.Apply(addresses)
	if ch := s.changes[len(s.changes)-1]; len(s.changes) != told+1 || len(ch.Workloads) != 1 || ch.Workloads[0].UID != one.Name || len(ch.Services)+len(ch.Policies) > 0 {
		t.Errorf("%d changes, the last of %d workloads and %d services, want one of %s", len(s.changes)-told, len(ch.Workloads), len(ch.Services), one.Name)
	}
}

func inUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A policy that is sent again while it was about to go stays, and a held version
// of a workload goes when the one in force comes again.
func TestComingAgainTakesBack(t *testing.T) {
	s := newTestStore(t)
	s.policy("shop/a")
	s.workload("w", 1, "shop/a")
	s.Apply(client.Delta{Type: api.AuthorizationType, Removed: []string{"shop/a"}})
	s.policy("shop/a")
	if len(s.dying) > 0 || s.named["shop/a"] != 1 {
		t.Errorf("dying %v, named %v", s.dying, s.named)
	}
	s.workload("w", 1, "shop/a", "shop/b")
	s.workload("w", 1, "shop/a")
	if len(s.held) > 0 || s.named["shop/a"] != 1 || s.named["shop/b"] != 0 {
		t.Errorf("held %v, named %v", s.held, s.named)
	}
	s.refs("w", "shop/a")
}
