package outbound

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// neighbours answer as told.
type neighbours struct {
	answer error
	asked  []LocalRequest
	ended  []error
}

func (n *neighbours) Open(ctx context.Context, r LocalRequest) (*LocalPath, error) {
	n.asked = append(n.asked, r)
	if n.answer != nil {
		return nil, n.answer
	}
	near, far := memnet.Pipe()
	_ = far.Close()
	return &LocalPath{Conn: near, Ctx: ctx, End: func(err error) { n.ended = append(n.ended, err) }}, nil
}

// nearby is a client and a pod of its node that may be reached inside the proxy.
func nearby(change ...func(*mesh.Workload)) (*mesh.Snapshot, *mesh.Workload) {
	at := func(w *mesh.Workload) {
		w.Node, w.SameNode, w.TrustDomain = "node-1", ambit.WorkloadExtension_SAME_NODE_LOCAL, "cluster.local"
	}
	m := mesh.Empty().Edit()
	src := wl("src", "10.0.0.1", at)
	m.PutWorkload(src)
	m.PutWorkload(wl("b", "10.0.0.2", append([]func(*mesh.Workload){at}, change...)...))
	return m.Commit(), src
}

func TestWhoIsReachedInsideTheProxy(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*mesh.Workload)
		src    string
		dst    string
		asked  bool
	}{
		{"a neighbour", nil, "10.0.0.1:1", "10.0.0.2:80", true},
		{"another node", func(w *mesh.Workload) { w.Node = "node-2" }, "10.0.0.1:1", "10.0.0.2:80", false},
		{"no node", func(w *mesh.Workload) { w.Node = "" }, "10.0.0.1:1", "10.0.0.2:80", false},
		{"tunnels wanted", func(w *mesh.Workload) { w.SameNode = ambit.WorkloadExtension_SAME_NODE_HBONE }, "10.0.0.1:1", "10.0.0.2:80", false},
		{"another trust domain", func(w *mesh.Workload) { w.TrustDomain = "other" }, "10.0.0.1:1", "10.0.0.2:80", false},
		{"an address that is not the client's", nil, "10.0.0.66:1", "10.0.0.2:80", false},
		{"another family", nil, "[fd00::1]:1", "10.0.0.2:80", false},
		{"itself", nil, "10.0.0.1:1", "10.0.0.1:80", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.change == nil {
				c.change = func(*mesh.Workload) {}
			}
			snap, src := nearby(c.change)
			n := &neighbours{answer: errors.New("neighbour")}
			p, table := testProxy(snap, func(cfg *Config) {
				cfg.Neighbours = n
				cfg.Tunnels = tunnelFunc(func(hbone.Key) error { return errors.New("tunnel") })
			})
			conn, ctx := table.Begin(t.Context(), flow.Record{SrcAddr: netip.MustParseAddrPort(c.src)})
			defer conn.End(nil)
			_, err := p.connect(ctx, conn, Request{Src: src, Dst: netip.MustParseAddrPort(c.dst)})
			if (len(n.asked) == 1) != c.asked || strings.Contains(err.Error(), "neighbour") != c.asked {
				t.Fatalf("asked %d times, %v", len(n.asked), err)
			}
			if got := conn.Record().Transport; (got == flow.Local) != c.asked {
				t.Errorf("transport %s", got)
			}
			if c.asked && (n.asked[0].Peer != id("src") || n.asked[0].Target.String() != c.dst || n.asked[0].Stats != conn.Stats) {
				t.Errorf("asked %+v", n.asked[0])
			}
		})
	}
}

// TestNeighboursAnswers: no way means a tunnel, an answer is final for this
// endpoint, and only what its application refuses speaks for another one.
func TestNeighboursAnswers(t *testing.T) {
	for _, c := range []struct {
		name    string
		answer  error
		tunnels int
		flag    flow.Flag
		want    string
		later   bool // it comes last for this pod's next connections
	}{
		{"no way", ErrNotLocal, 1, flow.FlagConnect, "tunnel", false},
		{"denied", &flow.DenyError{Reason: "policy x"}, 0, flow.FlagDeny, "denied by destination's policy: connection closed due to policy rejection: policy x", false},
		{"application refused", flow.DialFailed(true, syscall.ECONNREFUSED), 0, flow.FlagConnect, "connection refused", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			snap, src := nearby()
			tunnels := 0
			p, table := testProxy(snap, func(cfg *Config) {
				cfg.Neighbours = &neighbours{answer: c.answer}
				cfg.Tunnels = tunnelFunc(func(hbone.Key) error { tunnels++; return errors.New("tunnel") })
			})
			conn, ctx := table.Begin(t.Context(), flow.Record{SrcAddr: netip.MustParseAddrPort("10.0.0.1:1")})
			defer conn.End(nil)
			_, err := p.connect(ctx, conn, Request{Src: src, Dst: netip.MustParseAddrPort("10.0.0.2:80")})
			f, ok := errors.AsType[*flow.FlagError](err)
			if tunnels != c.tunnels || !ok || f.Flag != c.flag || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%d tunnels, %v", tunnels, err)
			}
			if _, own := errors.AsType[*flow.DenyError](err); own {
				t.Error("the neighbour's denial counts as our own as well")
			}
			skip := p.cfg.Health.avoid("pod")
			if (skip != nil) != c.later {
				t.Errorf("avoided later: %v", skip != nil)
			}
			if others := p.cfg.Health.avoid("another pod"); others != nil && others(snap.WorkloadByAddr("", netip.MustParseAddr("10.0.0.2"))) {
				t.Error("one pod's connections to a closed port speak for others")
			}
		})
	}
}

func TestRetryOnAnotherWaypoint(t *testing.T) {
	m := mesh.Empty().Edit()
	src := wl("src", "10.0.0.1")
	port := mesh.Port{Service: 15008, Target: 15008}
	for _, w := range []*mesh.Workload{src, wl("wp1", "10.0.0.11", serves("wp", port)), wl("wp2", "10.0.0.12", serves("wp", port)),
		wl("b", "10.0.0.2", serves("svc", mesh.Port{Service: 80, Target: 8080}))} {
		m.PutWorkload(w)
	}
	m.PutService(svc("svc", "10.96.0.1", func(s *mesh.Service) {
		s.Waypoint = &mesh.GatewayAddress{Host: mesh.Hostname{Namespace: "default", Name: "wp"}, HBONEPort: 15008}
	}))
	m.PutService(svc("wp", "10.96.0.2"))
	fail := &hbone.DialError{Stage: hbone.StageTCP, Err: syscall.ECONNREFUSED}
	f := &tunnels{fail: map[string]error{"10.0.0.11": fail, "10.0.0.12": fail}}
	p, table := testProxy(m.Commit(), func(cfg *Config) { cfg.Tunnels = f })
	conn, ctx := table.Begin(t.Context(), flow.Record{})
	defer conn.End(nil)
	if _, err := p.connect(ctx, conn, Request{Src: src, Dst: netip.MustParseAddrPort("10.96.0.1:80")}); err == nil {
		t.Fatal("connected")
	}
	if len(f.dialed) != 2 || f.dialed[0] == f.dialed[1] || conn.Record().HBONEAddr != "10.96.0.1:80" {
		t.Errorf("dialled %q for %s", f.dialed, conn.Record().HBONEAddr)
	}
}
