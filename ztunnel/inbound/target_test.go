package inbound

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

func fixture() (*mesh.Snapshot, *mesh.Workload) {
	host := mesh.Hostname{Namespace: "default", Name: "svc.default.svc.cluster.local"}
	self := &mesh.Workload{UID: "c//Pod/default/b", Name: "b", Namespace: "default", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
		Services: map[mesh.Hostname][]mesh.Port{host: {{Service: 80, Target: 8080}}}, Healthy: true, Capacity: 1}
	m := mesh.Empty().Edit()
	m.PutWorkload(self)
	m.PutService(&mesh.Service{Name: "svc", Namespace: "default", Host: host, Ports: []mesh.Port{{Service: 80, Target: 8080}, {Service: 81, Target: 15006}}})
	m.PutService(&mesh.Service{Name: "other", Namespace: "default", Host: mesh.Hostname{Namespace: "default", Name: "other"}, Ports: []mesh.Port{{Service: 80, Target: 80}}})
	m.PutService(&mesh.Service{Name: "waypointed", Namespace: "default", Host: mesh.Hostname{Namespace: "default", Name: "waypointed"},
		VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.9")}}, Waypoint: &mesh.GatewayAddress{Host: host}})
	return m.Commit(), self
}

func TestTarget(t *testing.T) {
	m, self := fixture()
	for _, c := range []struct {
		method, authority, local, want string
		status                         int
	}{
		{"CONNECT", "10.0.0.2:80", "10.0.0.2", "10.0.0.2:80", 0},
		{"CONNECT", "[::ffff:10.0.0.2]:80", "10.0.0.2", "10.0.0.2:80", 0},
		{"CONNECT", "[fd00::2]:80", "fd00::2", "[fd00::2]:80", 0},
		{"CONNECT", "svc.default.svc.cluster.local:80", "10.0.0.2", "10.0.0.2:8080", 0},
		{"CONNECT", "10.96.0.9:80", "10.0.0.2", "10.0.0.2:80", 0}, // we are its waypoint
		{"GET", "10.0.0.2:80", "10.0.0.2", "", 400},
		{"CONNECT", "", "10.0.0.2", "", 400},
		{"CONNECT", ":80", "10.0.0.2", "", 400},
		{"CONNECT", "10.0.0.2", "10.0.0.2", "", 400},
		{"CONNECT", "10.0.0.2:x", "10.0.0.2", "", 400},
		{"CONNECT", "10.0.0.2:0", "10.0.0.2", "", 400},
		{"CONNECT", "10.0.0.2:99999", "10.0.0.2", "", 400},
		{"CONNECT", "10.0.0.3:80", "10.0.0.2", "", 400},
		{"CONNECT", "[fd00::2]:80", "10.0.0.2", "", 400},
		{"CONNECT", "127.0.0.1:80", "10.0.0.2", "", 400},
		{"CONNECT", "10.0.0.2:15008", "10.0.0.2", "", 503},
		{"CONNECT", "svc.default.svc.cluster.local:81", "10.0.0.2", "", 503}, // maps to a port of ours
		{"CONNECT", "svc.default.svc.cluster.local:82", "10.0.0.2", "", 503},
		{"CONNECT", "other:80", "10.0.0.2", "", 503},
		{"CONNECT", "nowhere:80", "10.0.0.2", "", 503},
	} {
		got, err := Target(m, self, c.method, c.authority, netip.MustParseAddr(c.local))
		e, _ := errors.AsType[*TargetError](err)
		switch {
		case c.status == 0 && (err != nil || got.String() != c.want):
			t.Errorf("%s %s at %s: %v, %v; want %s", c.method, c.authority, c.local, got, err, c.want)
		case c.status != 0 && (e == nil || e.Status != c.status):
			t.Errorf("%s %s at %s: %v, %v; want status %d", c.method, c.authority, c.local, got, err, c.status)
		}
	}
}

// FuzzTarget: whatever a peer asks for, the answer is this pod's own address
// and a port that is not the proxy's.
func FuzzTarget(f *testing.F) {
	for _, s := range []string{"10.0.0.2:80", "[fd00::2]:1", "svc.default.svc.cluster.local:80", "10.96.0.9:15008", "::1:80", "[10.0.0.2]:80", "a:b:c", "\x00:1"} {
		f.Add("CONNECT", s)
	}
	m, self := fixture()
	local := self.Addrs[0]
	f.Fuzz(func(t *testing.T, method, authority string) {
		got, err := Target(m, self, method, authority, local)
		if err != nil {
			return
		}
		if got.Addr() != local || got.Port() == 0 || got.Port() == 15001 || got.Port() == 15006 || got.Port() == 15008 || got.Port() == 15080 {
			t.Fatalf("CONNECT %q leads to %s", authority, got)
		}
	})
}
