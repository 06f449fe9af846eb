package derive

import (
	"net/netip"
	"testing"

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
