package derive

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/crd"
	"github.com/ambit-mesh/ambit/xds/dir"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

// snapshot is what a node proxy makes of the engine's resources.
func snapshot(t *testing.T, e *Engine) *mesh.Snapshot {
	t.Helper()
	tx := mesh.Empty().Edit()
	for _, r := range e.Resources(api.AddressType) {
		a := r.Message.(*workload.Address)
		if w := a.GetWorkload(); w != nil {
			d, err := mesh.DecodeWorkload(w)
			if err != nil {
				t.Fatal(err)
			}
			tx.PutWorkload(d)
			continue
		}
		d, err := mesh.DecodeService(a.GetService())
		if err != nil {
			t.Fatal(err)
		}
		tx.PutService(d)
	}
	return tx.Commit()
}

// TestProxiesFindTheWayIntoANetwork follows what a workload of another network
// says to the gateway's workload, for addresses and for names.
func TestProxiesFindTheWayIntoANetwork(t *testing.T) {
	for _, at := range []crd.GatewayAddress{{Value: "198.51.100.1"}, {Value: "2001:db8::1"}, {Type: crd.AddressHostname, Value: "Far.Example.com."}} {
		way := testWayInto("gateways", "far")
		way.Value.(*crd.Gateway).Spec.Addresses = []crd.GatewayAddress{at}
		far := labelled(testPod("n", "far", "", "sa", "a", 1), networkLabel, "far")
		e := New(Config{Network: "near"})
		e.Apply(dir.Change{Upserts: []*dir.Object{way, far, testPod("n", "near", "node", "sa", "a", 2), testService("n", "s", "a", 1)}})
		m := snapshot(t, e)
		gw := m.Workload("Kubernetes//Pod/n/far").NetworkGateway
		if gw == nil || gw.HBONEPort != 15008 {
			t.Fatalf("%s: the gateway is %+v", at.Value, gw)
		}
		var found *mesh.Workload
		if gw.Addr.IsValid() {
			found = m.WorkloadByAddr(gw.Network, gw.Addr)
		} else if svc := m.Service(gw.Host); svc != nil {
			c, why := m.PickWaypoint(svc, m.Workload("Kubernetes//Pod/n/near"), netip.MustParseAddrPort("172.16.0.1:15008"), 0, nil)
			if why != "" {
				t.Errorf("%s: %s", at.Value, why)
			}
			if found = c.Endpoint.Workload; found != nil && (found.Hostname != "far.example.com" || c.Port != 15008) {
				t.Errorf("%s: found %s, port %d", at.Value, found.Hostname, c.Port)
			}
		}
		if found == nil || found.Identity.String() != "spiffe://cluster.local/ns/gateways/sa/to-far" || found.Tunnel != workload.TunnelProtocol_HBONE {
			t.Errorf("%s: found %+v", at.Value, found)
		}
		if sans := m.Service(mesh.Hostname{Namespace: "n", Name: "s.n.svc.cluster.local"}).SANs; len(sans) != 1 || sans[0].String() != "spiffe://cluster.local/ns/n/sa/sa" {
			t.Errorf("%s: the service may be served by %v", at.Value, sans)
		}
	}
}

// TestProxiesFindWaypoints: a waypoint is found by its service's name, with its
// pods as endpoints, whoever reported the address.
func TestProxiesFindWaypoints(t *testing.T) {
	pod := labelled(testPod("n", "wp-1", "node", "wp", "wp", 1), tunnelLabel, "http")
	svc := testService("n", "wp", "wp", 1)
	reported := testWaypoint("n", "wp", 15008)
	plain := testWaypoint("n", "wp", 15008)
	plain.Value.(*crd.Gateway).Status = crd.GatewayStatus{}
	for name, gateway := range map[string]*dir.Object{"reported": reported, "plain file": plain} {
		e := New(Config{})
		e.Apply(dir.Change{Upserts: []*dir.Object{pod, svc, gateway, labelled(testService("n", "web", "web", 2), useWaypointLabel, "wp")}})
		m := snapshot(t, e)
		web := m.Service(mesh.Hostname{Namespace: "n", Name: "web.n.svc.cluster.local"})
		if web.Waypoint == nil {
			t.Fatalf("%s: no waypoint", name)
		}
		if ends := m.Endpoints(web.Waypoint.Host); !ends.Contains("Kubernetes//Pod/n/wp-1") {
			t.Errorf("%s: waypoint %v has no endpoints", name, web.Waypoint.Host)
		}
	}
}

// TestGatewayAddress: where a Gateway is, by what is known of it.
func TestGatewayAddress(t *testing.T) {
	both := []crd.GatewayAddress{{Type: crd.AddressIP, Value: "10.0.0.9"}, {Type: crd.AddressHostname, Value: "GW.example."}}
	tests := []struct {
		name, class, service string
		status               []crd.GatewayAddress
		annotations          map[string]string
		want                 string // "" when not ready
	}{
		{"name before address", classWaypoint, "", both, nil, "n/gw.example"},
		{"address when asked for", classWaypoint, "", both, map[string]string{addressTypeAnnotation: crd.AddressIP}, "10.0.0.9"},
		{"only an address", classWaypoint, "", both[:1], nil, "10.0.0.9"},
		{"a service of its name", classWaypoint, "gw", nil, nil, "n/gw.n.svc.cluster.local"},
		{"its service's address when asked for", classWaypoint, "gw", nil, map[string]string{addressTypeAnnotation: crd.AddressIP}, "172.16.0.1"},
		{"a service of another name", classWaypoint, "other", nil, nil, ""},
		{"ingress class has a suffix", classIngress, "gw-istio", nil, nil, "n/gw-istio.n.svc.cluster.local"},
		{"a name of its choosing", classIngress, "mine", nil, map[string]string{nameOverrideAnnotation: "mine"}, "n/mine.n.svc.cluster.local"},
		{"a name of its choosing, not there", classIngress, "gw-istio", nil, map[string]string{nameOverrideAnnotation: "mine"}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := testWaypoint("n", "gw", 15008)
			g := o.Value.(*crd.Gateway)
			g.Spec.GatewayClassName, g.Status.Addresses, g.Annotations = tt.class, tt.status, tt.annotations
			e := New(Config{})
			e.Apply(dir.Change{Upserts: []*dir.Object{o, labelled(testService("n", "web", "web", 2), useWaypointLabel, "gw")}})
			if tt.service != "" { // it may come later
				e.Apply(dir.Change{Upserts: []*dir.Object{testService("n", tt.service, "gw", 1)}})
			}
			got := ""
			if gw := snapshot(t, e).Service(mesh.Hostname{Namespace: "n", Name: "web.n.svc.cluster.local"}).Waypoint; gw != nil {
				if got = gw.Host.String(); gw.Addr.IsValid() {
					got = gw.Addr.String()
				}
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			sameAsFromScratch(t, e)
		})
	}
}

// A namespace shifts its services from one waypoint to another; a service with a
// waypoint of its own does not take part.
func TestCanaryOfANamespace(t *testing.T) {
	ns := labelled(labelled(object("Namespace", "", "n", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: "n", Annotations: map[string]string{canaryWeightAnnotation: "30"},
	}}), useWaypointLabel, "wp"), canaryLabel, "wp2")
	e := New(Config{})
	e.Apply(dir.Change{Upserts: []*dir.Object{
		ns, testWaypoint("n", "wp", 15008), testWaypoint("n", "wp2", 15008), testService("n", "a", "a", 1),
		labelled(testService("n", "own", "b", 2), useWaypointLabel, "wp2"),
	}})
	m := snapshot(t, e)
	weights := func(svc string) (out []uint32) {
		for _, w := range m.Service(mesh.Hostname{Namespace: "n", Name: svc + ".n.svc.cluster.local"}).WeightedWaypoints {
			out = append(out, w.Weight)
		}
		return out
	}
	if got := weights("a"); !slices.Equal(got, []uint32{70, 30}) {
		t.Errorf("weights of the namespace %v", got)
	}
	if got := weights("own"); got != nil {
		t.Errorf("weights of a service of its own mind %v", got)
	}
}

// A label that names the mesh's own network makes nobody an endpoint elsewhere.
func TestOwnNetworkIsNotElsewhere(t *testing.T) {
	e := New(Config{Network: "near"})
	e.Apply(dir.Change{Upserts: []*dir.Object{testService("n", "s", "a", 1), labelled(testPod("n", "p", "", "sa", "a", 1), networkLabel, "near")}})
	if s, _ := e.service(nn{"n", "s"}); len(s.SubjectAltNames) > 0 {
		t.Errorf("the service may be served by %v", s.SubjectAltNames)
	}
}

// Whatever acts as a waypoint must not be sent through itself by a label of its
// namespace, whoever made its class.
func TestWaypointsHaveNoWaypoint(t *testing.T) {
	sandwiched := testWaypoint("n", "wp", 15008)
	g := sandwiched.Value.(*crd.Gateway)
	g.Spec.GatewayClassName, g.Spec.Listeners[0].Protocol = "vendor", protocolPROXY
	g.Annotations = map[string]string{inboundBindingAnnotation: "PROXY"}
	terminates := testWaypoint("n", "wp", 15008)
	terminates.Value.(*crd.Gateway).Spec.GatewayClassName = "vendor"
	for name, gateway := range map[string]*dir.Object{"sandwiched": sandwiched, "terminates HBONE": terminates, "of Istio's class": testWaypoint("n", "wp", 15008)} {
		gateway.Value.(*crd.Gateway).Labels = map[string]string{waypointForLabel: trafficAll}
		e := New(Config{})
		e.Apply(dir.Change{Upserts: []*dir.Object{
			labelled(object("Namespace", "", "n", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "n"}}), useWaypointLabel, "wp"),
			testService("n", "wp", "wp", 1), labelled(testPod("n", "wp-1", "node", "wp", "wp", 1), gatewayNameLabel, "wp"),
			testPod("n", "other", "node", "sa", "other", 2),
		}})
		e.Apply(dir.Change{Upserts: []*dir.Object{gateway}})
		m := snapshot(t, e)
		if w := m.Service(mesh.Hostname{Namespace: "n", Name: "wp.n.svc.cluster.local"}).Waypoint; w != nil {
			t.Errorf("%s: its service goes to %v", name, w.Host)
		}
		if w := m.Workload("Kubernetes//Pod/n/wp-1").Waypoint; w != nil {
			t.Errorf("%s: its pod goes to %v", name, w.Host)
		}
		if m.Workload("Kubernetes//Pod/n/other").Waypoint == nil {
			t.Errorf("%s: another pod has no waypoint", name)
		}
	}
}

// A ServiceEntry whose host is the name of a Gateway's service is another
// service: what it says, and its end, change nothing about the way.
func TestNothingElseHasTheNameOfAWay(t *testing.T) {
	e := New(Config{})
	way := testWayInto("n", "far")
	way.Value.(*crd.Gateway).Spec.Addresses = []crd.GatewayAddress{{Type: crd.AddressHostname, Value: "far.example.com"}}
	e.Apply(upsert(way))
	gateway := snapshot(t, e).Workload("Kubernetes/gateway.networking.k8s.io/Gateway/n/to-far/far.example.com")
	for host := range gateway.Services {
		se := testEntry("n", "same", 0, nil, 1, host.Name)
		if faults := se.Value.(*crd.ServiceEntry).Validate(); len(faults) > 0 {
			continue // nobody can write it
		}
		e.Apply(upsert(se))
		if r := e.Apply(dir.Change{Deletes: []dir.Key{se.Key()}}); len(r.Removes) != 1 { // its endpoint
			t.Errorf("an entry for %s took the service with it: %v", host, r.Removes)
		}
	}
}

// Of several ways into a network the root namespace's is taken, then the oldest:
// a namespace cannot make itself the way by its name.
func TestWhichWayIntoANetwork(t *testing.T) {
	way := func(ns string, created int64) *dir.Object {
		o := testWayInto(ns, "far")
		g := o.Value.(*crd.Gateway)
		g.CreationTimestamp, g.Spec.Addresses = metav1.Unix(created, 0), []crd.GatewayAddress{{Value: fmt.Sprintf("192.0.2.%d", created)}}
		return o
	}
	e := New(Config{Network: "near"})
	e.Apply(upsert(labelled(testPod("n", "p", "", "sa", "a", 1), networkLabel, "far")))
	for _, step := range []struct {
		change dir.Change
		want   string
	}{
		{upsert(way("b", 5)), "192.0.2.5"},
		{upsert(way("a", 6)), "192.0.2.5"},
		{upsert(way("istio-system", 7)), "192.0.2.7"},
		{upsert(way("ambit-system", 8)), "192.0.2.7"},
		{upsert(way("istio-system", 9)), "192.0.2.8"}, // made again
		{dir.Change{Deletes: []dir.Key{way("istio-system", 0).Key(), way("ambit-system", 0).Key()}}, "192.0.2.5"},
		{upsert(way("b", 7)), "192.0.2.6"}, // made again: the other is older now
	} {
		e.Apply(step.change)
		if got := snapshot(t, e).Workload("Kubernetes//Pod/n/p").NetworkGateway.Addr.String(); got != step.want {
			t.Errorf("the way is %s, want %s", got, step.want)
		}
		sameAsFromScratch(t, e)
	}
}

// Each thing that a Gateway says, changed alone, reaches those who use it.
func TestOneChangeOfAWaypoint(t *testing.T) {
	waypoint := func(edit func(*crd.Gateway)) dir.Change {
		o := testWaypoint("n", "wp", 15008)
		edit(o.Value.(*crd.Gateway))
		return upsert(o)
	}
	selecting := func(team string) func(*crd.Gateway) {
		return func(g *crd.Gateway) {
			s := &metav1.LabelSelector{MatchLabels: map[string]string{"team": team}}
			g.Spec.Listeners[0].AllowedRoutes = &crd.AllowedRoutes{Namespaces: &crd.RouteNamespaces{From: crd.FromSelector, Selector: s}}
		}
	}
	serving := func(what string) func(*crd.Gateway) {
		return func(g *crd.Gateway) { g.Labels = map[string]string{waypointForLabel: what} }
	}
	e := New(Config{})
	e.Apply(dir.Change{Upserts: []*dir.Object{
		labelled(object("Namespace", "", "n", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "n"}}), "team", "a"),
		labelled(testService("n", "s", "a", 1), useWaypointLabel, "wp"), labelled(testPod("n", "p", "node", "sa", "a", 1), gatewayNameLabel, "wp"),
	}})
	for _, step := range []struct {
		what  string
		edit  func(*crd.Gateway)
		bound bool
	}{
		{"there", func(*crd.Gateway) {}, true},
		{"for workloads", serving(trafficWorkload), false},
		{"for all", serving(trafficAll), true},
		{"for team a", selecting("a"), true},
		{"for team b", selecting("b"), false},
		{"for everybody", func(g *crd.Gateway) {
			g.Spec.Listeners[0].AllowedRoutes = &crd.AllowedRoutes{Namespaces: &crd.RouteNamespaces{From: crd.FromAll}}
		}, true},
		{"not ready", func(g *crd.Gateway) { g.Status.Addresses, g.Status.Conditions = nil, []any{"x"} }, false},
	} {
		e.Apply(waypoint(step.edit))
		if got := snapshot(t, e).Service(mesh.Hostname{Namespace: "n", Name: "s.n.svc.cluster.local"}).Waypoint != nil; got != step.bound {
			t.Errorf("%s: bound %v", step.what, got)
		}
		sameAsFromScratch(t, e)
	}
	for _, binding := range []string{"PROXY", "NONE", "PROXY/15088"} {
		e.Apply(waypoint(func(g *crd.Gateway) { g.Annotations = map[string]string{inboundBindingAnnotation: binding} }))
		sameAsFromScratch(t, e)
	}
}
