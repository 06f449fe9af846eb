package outbound

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
)

// What a route needs is asked for in turn: the destination, then what stands in
// front of it. Without an answer there is no route.
func TestLearnAsksForTheWay(t *testing.T) {
	src := wl("src", "10.0.0.1")
	way := &mesh.GatewayAddress{Host: mesh.Hostname{Namespace: "default", Name: "way"}}
	tx := mesh.Empty().Edit()
	tx.PutService(svc("web", "10.9.0.1", func(s *mesh.Service) {
		s.Waypoint = way
		s.WeightedWaypoints = []mesh.WeightedWaypoint{{Gateway: mesh.GatewayAddress{Network: "n", Addr: netip.MustParseAddr("10.9.0.9")}}}
	}))
	tx.PutWorkload(wl("far", "10.1.0.1", serves("web"), func(w *mesh.Workload) {
		w.Network, w.NetworkGateway = "far", &mesh.GatewayAddress{Network: "far", Addr: netip.MustParseAddr("192.0.2.1")}
	}))
	full := tx.Commit()
	for _, tt := range []struct {
		dst  string
		fail string // the key without an answer
		want []string
	}{
		{"10.9.0.1", "", []string{"/10.9.0.1", "default/way", "n/10.9.0.9", "far/192.0.2.1"}},
		{"10.8.0.1", "", []string{"/10.8.0.1"}},
		{"127.0.0.1", "", nil},
		{"10.9.0.1", "/10.9.0.1", []string{"/10.9.0.1"}},
		{"10.9.0.1", "default/way", []string{"/10.9.0.1", "default/way", "n/10.9.0.9", "far/192.0.2.1"}},
	} {
		known := mesh.Empty()
		var asked []string
		p := New(Config{View: func() *store.View { return &store.View{Mesh: known} }, Demand: func(_ context.Context, keys ...string) error {
			asked = append(asked, keys...)
			if slices.Contains(keys, tt.fail) {
				return errors.New("no answer")
			}
			known = full
			return nil
		}})
		err := p.learn(t.Context(), src, netip.MustParseAddr(tt.dst))
		if (err != nil) != (tt.fail != "") || !slices.Equal(asked, tt.want) {
			t.Errorf("%s: asked for %q, %v, want %q", tt.dst, asked, err, tt.want)
		}
	}
}
