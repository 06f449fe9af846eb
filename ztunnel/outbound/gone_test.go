package outbound

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// connectFunc is a Tunnels.
type connectFunc func(k hbone.Key, r hbone.ConnectRequest) error

func (f connectFunc) Connect(_ context.Context, k hbone.Key, r hbone.ConnectRequest) (*hbone.Stream, *hbone.ConnectResponse, error) {
	return nil, nil, f(k, r)
}

// A silent peer is given up only where a retry would go to somebody else, as
// things are when it falls silent, and the second one is waited for.
func TestElsewhere(t *testing.T) {
	endpoint := func(m *mesh.Txn, name, addr string) {
		m.PutWorkload(wl(name, addr, serves("svc", mesh.Port{Service: 80, Target: 8080})))
	}
	for _, c := range []struct {
		name, dst string
		change    func(m *mesh.Txn, first string) // while the first waits
		want      []bool                          // by try
	}{
		{"another endpoint", "10.96.0.1:80", nil, []bool{true, false}},
		{"an address of its own", "10.0.0.11:80", nil, []bool{false}},
		{"the other has left too", "10.96.0.1:80", func(m *mesh.Txn, first string) {
			m.RemoveWorkload(map[string]string{"10.0.0.11": "c//Pod/default/b2", "10.0.0.12": "c//Pod/default/b1"}[first])
		}, []bool{false}},
		{"both have left, another has come", "10.96.0.1:80", func(m *mesh.Txn, _ string) {
			m.RemoveWorkload("c//Pod/default/b1")
			m.RemoveWorkload("c//Pod/default/b2")
			endpoint(m, "b3", "10.0.0.13")
		}, []bool{true, false}},
	} {
		t.Run(c.name, func(t *testing.T) {
			snap, src := twoEndpoints()
			var dialed []string
			var got []bool
			p, table := testProxy(snap, func(cfg *Config) {
				cfg.View = func() *store.View { return &store.View{Mesh: snap, Generation: 1} }
				cfg.Tunnels = connectFunc(func(k hbone.Key, r hbone.ConnectRequest) error {
					dialed = append(dialed, k.Addr.Addr().String())
					if len(dialed) == 1 && c.change != nil {
						m := snap.Edit()
						c.change(m, dialed[0])
						snap = m.Commit()
					}
					got = append(got, r.Elsewhere != nil && r.Elsewhere())
					return &hbone.DialError{Stage: hbone.StageConnect, Err: hbone.ErrSilent}
				})
			})
			conn, ctx := table.Begin(t.Context(), flow.Record{})
			defer conn.End(nil)
			if _, err := p.connect(ctx, conn, Request{Src: src, Dst: netip.MustParseAddrPort(c.dst), Rand: 3}); err == nil {
				t.Fatal("connected")
			}
			if !slices.Equal(got, c.want) || len(dialed) == 2 && dialed[0] == dialed[1] {
				t.Errorf("dialled %q, elsewhere %v; want %v", dialed, got, c.want)
			}
		})
	}
}

// An endpoint that says nothing to a dial without a tunnel is given up as early.
func TestPlainDialGivesUpASilentEndpoint(t *testing.T) {
	for _, c := range []struct {
		dst   string
		dials int
		after time.Duration
	}{
		{"10.96.0.1:80", 2, hbone.Silence + 10*time.Second},
		{"10.0.0.11:80", 1, 10 * time.Second}, // an address of its own
		{"192.0.2.1:80", 1, 10 * time.Second}, // nobody knows it
	} {
		synctest.Test(t, func(t *testing.T) {
			snap, src := twoEndpoints(func(w *mesh.Workload) { w.Tunnel = workload.TunnelProtocol_NONE })
			dials := 0
			p, table := testProxy(snap, func(cfg *Config) {
				cfg.Dial = func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) {
					dials++
					ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
					defer cancel()
					<-ctx.Done()
					return nil, ctx.Err()
				}
			})
			conn, ctx := table.Begin(t.Context(), flow.Record{})
			defer conn.End(nil)
			begin := time.Now()
			_, err := p.connect(ctx, conn, Request{Src: src, Dst: netip.MustParseAddrPort(c.dst), Rand: 3})
			if took := time.Since(begin); err == nil || dials != c.dials || took != c.after {
				t.Errorf("%s: %v, %d dials, %v; want %d, %v", c.dst, err, dials, took, c.dials, c.after)
			}
		})
	}
}
