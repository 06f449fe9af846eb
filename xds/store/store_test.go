package store

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/test/golden"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
)

// testStore is a store with short verbs.
type testStore struct {
	*testing.T
	*Store
	changes []Change
}

func newTestStore(t *testing.T) *testStore {
	s := &testStore{T: t, Store: New(Config{Registerer: prometheus.NewRegistry()})}
	t.Cleanup(s.Close)
	s.Subscribe(func(old, current *View, ch Change) {
		if current.Generation != old.Generation+1 || s.View() != current {
			t.Errorf("subscriber called before publication or out of order")
		}
		s.changes = append(s.changes, ch)
	})
	return s
}

func (s *testStore) put(name string, m proto.Message) []client.Reject {
	s.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		s.Fatal(err)
	}
	t := api.AddressType
	if _, ok := m.(*security.Authorization); ok {
		t = api.AuthorizationType
	}
	return s.Apply(client.Delta{Type: t, Added: []client.Resource{{Name: name, Version: "1", TypeURL: t, Value: b}}})
}

func (s *testStore) workload(uid string, ip byte, policies ...string) {
	s.Helper()
	if r := s.put(uid, &workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{
		Uid: uid, Namespace: "shop", Name: uid, Addresses: [][]byte{{10, 0, 0, ip}}, AuthorizationPolicies: policies}}}); len(r) > 0 {
		s.Fatal(r)
	}
}

func (s *testStore) policy(key string) {
	s.Helper()
	ns, name, _ := strings.Cut(key, "/")
	if r := s.put(key, &security.Authorization{Namespace: ns, Name: name, Scope: security.Scope_WORKLOAD_SELECTOR, Action: security.Action_DENY}); len(r) > 0 {
		s.Fatal(r)
	}
}

// refs are the policies of the version in force.
func (s *testStore) refs(uid, want string) {
	s.Helper()
	w := s.View().Mesh.Workload(uid)
	if w == nil {
		s.Fatalf("workload %s is not known", uid)
	}
	if got := strings.Join(w.Policies, " "); got != want {
		s.Errorf("policies in force %q, want %q", got, want)
	}
}

func (s *testStore) verdict(uid, want string) {
	s.Helper()
	v := s.View()
	w := v.Mesh.Workload(uid)
	if got := v.Policies.Authorize(w.Namespace, w.Policies, policy.Conn{}).Why(); got != want {
		s.Errorf("verdict %q, want %q", got, want)
	}
}

func TestSyncedAfterBothTypes(t *testing.T) {
	s := newTestStore(t)
	s.Apply(client.Delta{Type: api.AddressType})
	if s.View().Synced {
		t.Error("synced without policies")
	}
	s.Apply(client.Delta{Type: api.AuthorizationType})
	if !s.View().Synced {
		t.Error("not synced")
	}
	g := s.View().Generation
	s.Apply(client.Delta{Type: api.AddressType})
	if s.View().Generation != g {
		t.Error("a delta without a change moved the generation")
	}
}

func TestWorkloadWaitsForItsPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestStore(t)
		s.policy("shop/a")
		s.workload("w", 1, "shop/a")
		s.workload("w", 1, "shop/a", "shop/b")
		s.refs("w", "shop/a")
		time.Sleep(HoldBack - time.Millisecond)
		s.refs("w", "shop/a")
		s.policy("shop/b")
		s.refs("w", "shop/a shop/b")
		if last := s.changes[len(s.changes)-1]; len(last.Workloads) != 1 || len(last.Policies) != 1 {
			t.Errorf("change %+v, want the policy and the workload together", last)
		}
	})
}

func TestWorkloadDeniesWhenItsPolicyDoesNotCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestStore(t)
		s.workload("w", 1)
		s.workload("w", 1, "shop/b")
		s.verdict("w", "no ALLOW policy applies")
		time.Sleep(HoldBack)
		synctest.Wait()
		s.refs("w", "shop/b")
		s.verdict("w", "policy shop/b not yet known")
		if last := s.changes[len(s.changes)-1]; len(last.Workloads) != 1 || !last.AffectsPolicy(s.View().Mesh.Workload("w")) {
			t.Errorf("change %+v", last)
		}
	})
}

func TestHeldVersionIsReplacedAndRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestStore(t)
		s.workload("w", 1)
		s.workload("w", 1, "shop/b")
		s.workload("w", 1) // taken back
		s.refs("w", "")
		s.workload("w", 1, "shop/b")
		s.Apply(client.Delta{Type: api.AddressType, Removed: []string{"w"}})
		time.Sleep(2 * HoldBack)
		synctest.Wait()
		if s.View().Mesh.Workload("w") != nil {
			t.Error("a held version came back after removal")
		}
		if len(s.named) != 0 || len(s.held) != 0 {
			t.Errorf("left behind: %v %v", s.named, s.held)
		}
	})
}

func TestAnotherPodIsNotHeldBack(t *testing.T) {
	s := newTestStore(t)
	s.workload("first", 1, "shop/b")
	s.verdict("first", "policy shop/b not yet known")
	s.workload("w", 2)
	s.workload("w", 3, "shop/b") // recreated with another address
	s.refs("w", "shop/b")
	if s.View().Mesh.WorkloadByAddr("", s.View().Mesh.Workload("w").Addrs[0]) == nil {
		t.Error("address is not known")
	}
}

func TestRemovedPolicyStaysWhileNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestStore(t)
		s.policy("shop/a")
		s.policy("shop/b")
		s.workload("w", 1, "shop/a")
		s.workload("v", 2, "shop/b")
		s.Apply(client.Delta{Type: api.AuthorizationType, Removed: []string{"shop/a", "shop/b", "shop/none"}})
		s.verdict("w", "no ALLOW policy applies")
		s.workload("w", 1) // names it no more
		if s.View().Policies.Get("shop/a") != nil {
			t.Error("policy is still there")
		}
		if s.View().Policies.Get("shop/b") == nil {
			t.Error("named policy went at once")
		}
		time.Sleep(HoldBack)
		synctest.Wait()
		s.verdict("v", "policy shop/b not yet known")
	})
}

func TestRejectsNameTheResource(t *testing.T) {
	s := newTestStore(t)
	s.policy("shop/a")
	for _, tt := range []struct {
		name string
		m    proto.Message
		want string
	}{
		{"w", &workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{Uid: "w", TunnelProtocol: workload.TunnelProtocol_LEGACY_ISTIO_MTLS}}}, "LEGACY_ISTIO_MTLS"},
		{"x", &workload.Address{}, "neither a workload nor a service"},
		{"shop/a", &security.Authorization{Namespace: "shop", Name: "a", Action: 9}, "action: value 9"},
	} {
		r := s.put(tt.name, tt.m)
		if len(r) != 1 || r[0].Name != tt.name || !strings.Contains(r[0].Reason, tt.want) {
			t.Errorf("%v, want %s: %s", r, tt.name, tt.want)
		}
	}
	if p := s.View().Policies.Get("shop/a"); p == nil || p.Action != policy.Deny {
		t.Error("the version before did not stay in force")
	}
	if r := s.Apply(client.Delta{Type: "other", Added: []client.Resource{{Name: "n"}}}); len(r) != 1 {
		t.Errorf("unknown type: %v", r)
	}
	r := s.Apply(client.Delta{Type: api.AddressType, Added: []client.Resource{{Name: "n", TypeURL: api.AddressType, Value: []byte{0xff}}}})
	if len(r) != 1 || !strings.Contains(r[0].Reason, "decode address") {
		t.Errorf("garbage: %v", r)
	}
}

func TestServicesAndScopeOfChanges(t *testing.T) {
	s := newTestStore(t)
	s.put("shop/x.svc", &workload.Address{Type: &workload.Address_Service{Service: &workload.Service{Namespace: "shop", Hostname: "x.svc"}}})
	if s.View().Mesh.Service(mesh.Hostname{Namespace: "shop", Name: "x.svc"}) == nil {
		t.Fatal("service is not known")
	}
	s.Apply(client.Delta{Type: api.AddressType, Removed: []string{"shop/x.svc/more"}})
	if s.View().Mesh.Services() != 0 {
		t.Error("service was not removed by its name with a further part")
	}
	s.put("shop/p", &security.Authorization{Namespace: "shop", Name: "p", Scope: security.Scope_NAMESPACE})
	ch := s.changes[len(s.changes)-1]
	if !ch.AffectsPolicy(&mesh.Workload{Traits: &mesh.Traits{Namespace: "shop"}}) || ch.AffectsPolicy(&mesh.Workload{Traits: &mesh.Traits{Namespace: "away"}}) {
		t.Error("scope of a changed policy")
	}
	cancel := s.Subscribe(func(*View, *View, Change) { t.Error("called after cancel") })
	cancel()
	s.workload("w", 1)
}

func FuzzApply(f *testing.F) {
	b, err := proto.Marshal(&workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{Uid: "w", AuthorizationPolicies: []string{"a/b"}}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, true, "w")
	f.Add([]byte{}, false, "a/b")
	f.Fuzz(func(t *testing.T, b []byte, address bool, name string) {
		s := New(Config{})
		defer s.Close()
		typ := api.AuthorizationType
		if address {
			typ = api.AddressType
		}
		for range 2 {
			for _, r := range s.Apply(client.Delta{Type: typ, Added: []client.Resource{{Name: name, TypeURL: typ, Value: b}}}) {
				if r.Name != name || r.Reason == "" {
					t.Fatalf("reject %+v", r)
				}
			}
		}
		s.Apply(client.Delta{Type: typ, Removed: []string{name}})
	})
}

// Dashboards and alerts depend on these names.
func TestExportedMetrics(t *testing.T) {
	golden.Run(t, "testdata/metrics.txtar", func(t *testing.T, ar *golden.Archive) {
		reg := prometheus.NewRegistry()
		New(Config{Registerer: reg})
		ar.Want("metrics", golden.Metrics(reg))
	})
}
