package outbound

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// TestHeaders: what a CONNECT says beside its authority.
func TestHeaders(t *testing.T) {
	service := &mesh.Service{Host: mesh.Hostname{Namespace: "default", Name: "web.default.svc.cluster.local"}}
	for _, tt := range []struct {
		name, src, network string
		plan               Plan
		want               string // without the traceparent
	}{
		{"a workload", "10.0.0.1:4000", "", Plan{}, `baggage=service.name=a; forwarded=for="10.0.0.1:4000"`},
		{"IPv6", "[fd00::1]:4000", "", Plan{}, `baggage=service.name=a; forwarded=for="[fd00::1]:4000"`},
		{"a service", "10.0.0.1:4000", "", Plan{Service: service},
			`baggage=service.name=a; forwarded=for="10.0.0.1:4000";host=web.default.svc.cluster.local`},
		{"another network", "10.0.0.1:4000", "here", Plan{Service: service, Inner: []identity.ID{identity.MustParse("spiffe://cluster.local/ns/default/sa/web")}},
			`baggage=service.name=a; forwarded=for="10.0.0.1:4000";host=web.default.svc.cluster.local; x-forwarded-network=here`},
		{"from the nameless network", "10.0.0.1:4000", "", Plan{Inner: []identity.ID{identity.MustParse("spiffe://cluster.local/ns/default/sa/web")}},
			`baggage=service.name=a; forwarded=for="10.0.0.1:4000"; x-forwarded-network=`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, _ := flow.New(flow.Config{}).Begin(t.Context(), flow.Record{Direction: flow.Outbound, SrcAddr: netip.MustParseAddrPort(tt.src)})
			defer c.End(nil)
			var got []string
			for _, h := range headers(c, tt.plan, &mesh.Workload{Traits: &mesh.Traits{CanonicalName: "a", Network: tt.network}}) {
				if h.Name == "traceparent" {
					if h.Value != c.TraceParent() {
						t.Errorf("traceparent %q, want the connection's %q", h.Value, c.TraceParent())
					}
					continue
				}
				got = append(got, h.Name+"="+h.Value)
			}
			if s := strings.Join(got, "; "); s != tt.want {
				t.Errorf("got  %s\nwant %s", s, tt.want)
			}
		})
	}
}
