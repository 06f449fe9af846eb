package outbound

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

func TestStraights(t *testing.T) {
	near := func(w *mesh.Workload) { w.Node, w.SameNode = "node-1", ambit.WorkloadExtension_SAME_NODE_LOCAL }
	gw := &mesh.GatewayAddress{Host: mesh.Hostname{Namespace: "default", Name: "wp"}, HBONEPort: 15008}
	port := mesh.Port{Service: 80, Target: 8080}
	src := wl("src", "10.0.0.1", near)
	m := mesh.Empty().Edit()
	for _, w := range []*mesh.Workload{
		src,
		wl("near", "10.0.0.2", near, serves("svc", port)),
		wl("far", "10.0.0.3", serves("svc", port), func(w *mesh.Workload) { w.Node, w.Capacity = "node-2", 3 }),
		wl("strict", "10.0.0.4", serves("svc-strict", port), func(w *mesh.Workload) { w.Node = "node-1" }),
		wl("behind", "10.0.0.5", near, serves("svc-behind", port), func(w *mesh.Workload) { w.Waypoint = gw }),
		wl("tunnel", "10.0.0.6", near, func(w *mesh.Workload) { w.AppTunnel = &mesh.ApplicationTunnel{Port: 9} }),
		wl("plain", "10.0.0.7", near, func(w *mesh.Workload) { w.Tunnel = workload.TunnelProtocol_NONE }),
		wl("sick", "10.0.0.8", near, serves("svc", port), func(w *mesh.Workload) { w.Healthy = false }),
		wl("foreign", "10.0.0.9", near, func(w *mesh.Workload) { w.TrustDomain = "other" }),
	} {
		m.PutWorkload(w)
	}
	for _, s := range []*mesh.Service{
		svc("svc", "10.96.0.1"), svc("svc-strict", "10.96.0.2"), svc("svc-behind", "10.96.0.3"),
		svc("svc-way", "10.96.0.4", func(s *mesh.Service) { s.Waypoint = gw }),
		svc("svc-pass", "10.96.0.5", func(s *mesh.Service) { s.Mode = workload.LoadBalancing_PASSTHROUGH }),
	} {
		m.PutService(s)
	}
	snap := m.Commit()
	for _, tc := range []struct{ name, to, want string }{
		{"pod", "10.0.0.2:9000", "near 10.0.0.2:9000 1.00"},
		{"proxy's port", "10.0.0.2:15008", ""},
		{"other node", "10.0.0.3:9000", ""},
		{"its share of a service", "10.96.0.1:80", "near 10.0.0.2:8080 0.25"},
		{"not where certificates decide", "10.0.0.4:80", ""},
		{"nor in a service", "10.96.0.2:80", ""},
		{"not behind a waypoint", "10.0.0.5:80", ""},
		{"nor in a service", "10.96.0.3:80", ""},
		{"nor behind the service's", "10.96.0.4:80", ""},
		{"passthrough", "10.96.0.5:80", ""},
		{"application tunnel", "10.0.0.6:80", ""},
		{"not in the mesh", "10.0.0.7:80", ""},
		{"other trust domain", "10.0.0.9:80", ""},
		{"itself", "10.0.0.1:80", ""},
		{"unknown", "192.0.2.1:80", ""},
	} {
		var got []string
		for _, s := range Straights(snap, src, netip.MustParseAddrPort(tc.to)) {
			got = append(got, fmt.Sprintf("%s %s %.2f", s.Dst.Name, s.Addr, s.Share))
		}
		if g := strings.Join(got, ", "); g != tc.want {
			t.Errorf("%s: straight to %q, want %q", tc.name, g, tc.want)
		}
	}
}
