package client_test

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/test/fakexds"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/store"
)

// TestNonsense: whatever a control plane says, what was good stays in force, the
// stream lives on, and each answer to a subscription is answered.
func TestNonsense(t *testing.T) {
	r := newRig(t)
	r.server.Set("a", address("a", 1))
	r.server.Set("default/p", &security.Authorization{Namespace: "default", Name: "p", Action: security.Action_DENY})
	r.run()
	value := func(typeURL string, b []byte) *anypb.Any { return &anypb.Any{TypeUrl: typeURL, Value: b} }
	good := func(name string, ip byte) *anypb.Any {
		v, err := anypb.New(address(name, ip))
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	port := &workload.Port{ServicePort: 80, TargetPort: 8080}
	huge := address("huge", 9)
	huge.GetWorkload().Name = strings.Repeat("x", 1<<20)
	huge.GetWorkload().Services = map[string]*workload.PortList{"default/huge": {}}
	for range 100000 {
		huge.GetWorkload().Services["default/huge"].Ports = append(huge.GetWorkload().Services["default/huge"].Ports, port)
	}
	hugeValue, err := anypb.New(huge)
	if err != nil {
		t.Fatal(err)
	}
	for i, tt := range []struct {
		name   string
		resp   *discovery.DeltaDiscoveryResponse
		nack   string // contained in the answer, "" is an ACK
		silent bool   // not a subscription's
	}{
		{name: "a type that nobody asked for", silent: true, resp: &discovery.DeltaDiscoveryResponse{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster",
			Resources: []*discovery.Resource{{Name: "a", Resource: good("a", 66)}}}},
		{name: "no type", silent: true, resp: &discovery.DeltaDiscoveryResponse{}},
		{name: "nothing", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType}},
		{name: "no value", nack: "value has type", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType,
			Resources: []*discovery.Resource{{Name: "a"}, {}}}},
		{name: "bytes", nack: "a: decode address", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType,
			Resources: []*discovery.Resource{{Name: "a", Resource: value(api.AddressType, []byte{0xff, 0xff, 0xff})}}}},
		{name: "an empty address", nack: "a: address is neither", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType,
			Resources: []*discovery.Resource{{Name: "a", Resource: value(api.AddressType, nil)}}}},
		{name: "a policy among addresses", nack: "default/p: value has type", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType,
			Resources: []*discovery.Resource{{Name: "default/p", Resource: value(api.AuthorizationType, nil)}}}},
		{name: "an address among policies", nack: "default/p: value has type", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AuthorizationType,
			Resources: []*discovery.Resource{{Name: "default/p", Resource: good("a", 66)}}}},
		{name: "a policy of nothing", nack: "default/p: ", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AuthorizationType,
			Resources: []*discovery.Resource{{Name: "default/p", Resource: value(api.AuthorizationType, nil)}}}},
		{name: "removal of what never was", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType,
			RemovedResources: []string{"", "/", "////", "a/b/c", "\x00", strings.Repeat("x/", 10000), "default/p"}}},
		{name: "one name twice", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType,
			Resources: []*discovery.Resource{{Name: "twice", Resource: good("twice", 7)}, {Name: "twice", Resource: good("twice", 8)}}}},
		{name: "added and removed at once", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType,
			Resources: []*discovery.Resource{{Name: "brief", Resource: good("brief", 10)}}, RemovedResources: []string{"brief"}}},
		{name: "a large workload", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType,
			Resources: []*discovery.Resource{{Name: "huge", Resource: hugeValue}}}},
		{name: "a long list of bad ones", nack: "more", resp: &discovery.DeltaDiscoveryResponse{TypeUrl: api.AddressType,
			Resources: slicesOf(5000, func(i int) *discovery.Resource {
				return &discovery.Resource{Name: fmt.Sprint("bad", i), Resource: value("x", nil)}
			})}},
	} {
		nonce := fmt.Sprintf("n%d", i)
		tt.resp.Nonce = nonce
		if err := r.server.Say(r.ctx, tt.resp); err != nil {
			t.Fatal(err)
		}
		if !tt.silent {
			q := r.request(tt.name, func(q fakexds.Request) bool { return q.GetResponseNonce() == nonce })
			if got := q.GetErrorDetail().GetMessage(); (got == "") != (tt.nack == "") || !strings.Contains(got, tt.nack) || len(got) > 8<<10 {
				t.Errorf("%s: answered %.300q, want %q", tt.name, got, tt.nack)
			}
		}
		v := r.store.View()
		if w := v.Mesh.Workload("a"); w == nil || w.Addrs[0].As4()[3] != 1 {
			t.Fatalf("%s: workload a is %v", tt.name, w)
		}
		if v.Policies.Get("default/p") == nil {
			t.Fatalf("%s: the policy is gone", tt.name)
		}
	}
	v := r.store.View().Mesh
	if w := v.Workload("twice"); w == nil || w.Addrs[0].As4()[3] != 8 {
		t.Errorf("of one name twice %v is in force, want the last", w)
	}
	if v.Workload("brief") != nil {
		t.Error("what was added and removed at once is in force")
	}
	r.server.Set("b", address("b", 2))
	r.until("a change after all this", func(v *store.View) bool { return v.Mesh.Workload("b") != nil })
	if last := r.server.Requests()[len(r.server.Requests())-1]; last.Stream != 1 {
		t.Errorf("on stream %d, want the first one still", last.Stream)
	}
}

func slicesOf[T any](n int, f func(int) T) []T {
	out := make([]T, n)
	for i := range out {
		out[i] = f(i)
	}
	return out
}
