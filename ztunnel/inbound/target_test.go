package inbound

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
)

func fixture() (*mesh.Snapshot, *mesh.Workload) {
	host := mesh.Hostname{Namespace: "default", Name: "svc.default.svc.cluster.local"}
	self := &mesh.Workload{UID: "c//Pod/default/b", Name: "b", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}, Traits: &mesh.Traits{Namespace: "default", Services: map[mesh.Hostname][]mesh.Port{host: {{Service: 80, Target: 8080}}}, Healthy: true, Capacity: 1}}
	m := mesh.Empty().Edit()
	m.PutWorkload(self)
	m.PutService(&mesh.Service{Name: "svc", Namespace: "default", Host: host, Ports: []mesh.Port{{Service: 80, Target: 8080}, {Service: 81, Target: 15006}}})
	m.PutService(&mesh.Service{Name: "other", Namespace: "default", Host: mesh.Hostname{Namespace: "default", Name: "other"}, Ports: []mesh.Port{{Service: 80, Target: 80}}})
	m.PutService(&mesh.Service{Name: "waypointed", Namespace: "default", Host: mesh.Hostname{Namespace: "default", Name: "waypointed"},
		VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.9")}}, Waypoint: &mesh.GatewayAddress{Host: host}})
	m.PutService(&mesh.Service{Name: "named", Namespace: "default", Host: mesh.Hostname{Namespace: "default", Name: "named.example.com"},
		VIPs:     []mesh.NetAddr{{Network: "elsewhere", Addr: netip.MustParseAddr("10.1.0.1")}, {Addr: netip.MustParseAddr("fd00::99")}, {Addr: netip.MustParseAddr("10.96.0.10")}},
		Waypoint: &mesh.GatewayAddress{Host: host}, Ports: []mesh.Port{{Service: 80, Target: 8081}}})
	m.PutService(&mesh.Service{Name: "remote", Namespace: "default", Host: mesh.Hostname{Namespace: "default", Name: "remote.example.com"},
		VIPs: []mesh.NetAddr{{Network: "elsewhere", Addr: netip.MustParseAddr("10.1.0.1")}}})
	return m.Commit(), self
}

func TestTargetOfApplicationTunnel(t *testing.T) {
	m, pod := fixture()
	for _, c := range []struct {
		name, authority string
		protocol        workload.ApplicationTunnel_Protocol
		port            uint16
		want, header    string
		status          int
	}{
		{name: "any address, as for a waypoint", authority: "10.96.0.77:80", protocol: workload.ApplicationTunnel_PROXY, port: 15088, want: "10.0.0.2:15088", header: "10.96.0.77:80"},
		{name: "own address", authority: "10.0.0.2:80", protocol: workload.ApplicationTunnel_PROXY, port: 15088, want: "10.0.0.2:15088", header: "10.0.0.2:80"},
		{name: "host name: VIP of the own network, IPv4 first", authority: "named.example.com:80", protocol: workload.ApplicationTunnel_PROXY, port: 15088, want: "10.0.0.2:15088", header: "10.96.0.10:80"},
		{name: "host name with port nobody maps", authority: "named.example.com:81", protocol: workload.ApplicationTunnel_PROXY, port: 15088, want: "10.0.0.2:15088", header: "10.96.0.10:81"},
		{name: "host name without VIP here", authority: "remote.example.com:80", protocol: workload.ApplicationTunnel_PROXY, port: 15088, status: 503},
		{name: "unknown host name", authority: "nowhere.example.com:80", protocol: workload.ApplicationTunnel_PROXY, port: 15088, status: 503},
		{name: "no protocol: only the port", authority: "10.96.0.77:80", port: 15088, want: "10.0.0.2:15088"},
		{name: "no protocol, host name without VIP", authority: "remote.example.com:80", port: 15088, want: "10.0.0.2:15088"},
		{name: "no port: as asked", authority: "10.0.0.2:81", protocol: workload.ApplicationTunnel_PROXY, want: "10.0.0.2:81", header: "10.0.0.2:81"},
		{name: "proxy's own port", authority: "10.0.0.2:15006", protocol: workload.ApplicationTunnel_PROXY, port: 15088, status: 503},
		{name: "address with zone", authority: "[fe80::1%eth0]:80", protocol: workload.ApplicationTunnel_PROXY, port: 15088, status: 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			self := pod.Copy()
			self.AppTunnel = &mesh.ApplicationTunnel{Protocol: c.protocol, Port: c.port}
			got, err := Target(m, self, "CONNECT", c.authority, netip.MustParseAddr("10.0.0.2"))
			if c.status != 0 {
				if e, ok := errors.AsType[*TargetError](err); !ok || e.Status != c.status {
					t.Fatalf("%+v, %v; want status %d", got, err, c.status)
				}
				return
			}
			header := ""
			if got.Header.IsValid() {
				header = got.Header.String()
			}
			if err != nil || got.Addr.String() != c.want || header != c.header {
				t.Errorf("%v, %v; want %s with header %q", got, err, c.want, c.header)
			}
		})
	}
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
		{"CONNECT", "10.96.0.9:80", "10.0.0.2", "10.0.0.2:80", 0},           // we are its waypoint
		{"CONNECT", "named.example.com:80", "10.0.0.2", "10.0.0.2:8081", 0}, // and of this one
		{"CONNECT", "remote.example.com:80", "10.0.0.2", "", 503},
		{"CONNECT", "010.0.0.2:80", "10.0.0.2", "", 400}, // an address to some, malformed to all
		{"CONNECT", "10.0.2:80", "10.0.0.2", "", 400},
		{"CONNECT", "[10.0.0.2]:80", "10.0.0.2", "10.0.0.2:80", 0},
		{"CONNECT", "a b:80", "10.0.0.2", "", 400},
		{"CONNECT", "[fe80::1%eth0]:80", "10.0.0.2", "", 400},
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
		case c.status == 0 && (err != nil || got.Addr.String() != c.want || got.Header.IsValid()):
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
		if got.Addr.Addr() != local || got.Addr.Port() == 0 || outbound.OwnPort(got.Addr.Port()) {
			t.Fatalf("CONNECT %q leads to %s", authority, got)
		}
	})
}
