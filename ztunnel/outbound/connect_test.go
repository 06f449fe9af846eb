package outbound

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// tunnels fail as told, by address.
type tunnels struct {
	fail   map[string]error
	dialed []string
	early  []string // what could have gone along
}

func (f *tunnels) Connect(_ context.Context, k hbone.Key, r hbone.ConnectRequest) (*hbone.Stream, *hbone.ConnectResponse, error) {
	f.dialed = append(f.dialed, k.Addr.Addr().String())
	said := ""
	if r.Early != nil {
		said = string(r.Early())
	}
	f.early = append(f.early, said)
	return nil, nil, f.fail[k.Addr.Addr().String()]
}

func testProxy(snap *mesh.Snapshot, change func(*Config)) (*Proxy, *flow.Table) {
	view := func() *store.View { return &store.View{Mesh: snap, Generation: 1} }
	table := flow.New(flow.Config{View: view})
	cfg := Config{Pod: "pod", View: view, Flow: table}
	change(&cfg)
	return New(cfg), table
}

func twoEndpoints(change ...func(*mesh.Workload)) (*mesh.Snapshot, *mesh.Workload) {
	m := mesh.Empty().Edit()
	src := wl("src", "10.0.0.1")
	change = append(change, serves("svc", mesh.Port{Service: 80, Target: 8080}))
	m.PutWorkload(src)
	m.PutWorkload(wl("b1", "10.0.0.11", change...))
	m.PutWorkload(wl("b2", "10.0.0.12", change...))
	m.PutService(svc("svc", "10.96.0.1"))
	return m.Commit(), src
}

func TestRetryOnAnotherEndpoint(t *testing.T) {
	at := func(s hbone.Stage, err error) error { return &hbone.DialError{Stage: s, Err: err} }
	refused := &hbone.ResetError{Code: hbone.CodeRefusedStream, Remote: true}
	for _, c := range []struct {
		name  string
		err   error
		tries int
		later bool // the endpoint comes last for the next connection
	}{
		{"refused", at(hbone.StageTCP, syscall.ECONNREFUSED), 2, true},
		{"no answer", at(hbone.StageTCP, os.ErrDeadlineExceeded), 2, true},
		{"no route", at(hbone.StageTCP, syscall.EHOSTUNREACH), 2, true},
		{"handshake timed out", at(hbone.StageTLS, os.ErrDeadlineExceeded), 2, true},
		{"no HTTP/2", at(hbone.StageH2, io.ErrUnexpectedEOF), 2, true},
		{"stream refused", at(hbone.StageConnect, refused), 2, true},
		{"wrong identity", at(hbone.StageTLS, errors.New("wrong identity")), 1, false},
		{"out of descriptors", at(hbone.StageTCP, syscall.EMFILE), 1, false},
		{"our own limits", at(hbone.StageLocal, context.DeadlineExceeded), 1, false},
		{"the CA is slow", at(hbone.StageTLS, &cert.UnavailableError{Err: os.ErrDeadlineExceeded}), 1, false},
		{"the node's handshakes are used up", at(hbone.StageTLS, &ledger.ExhaustedError{Cause: os.ErrDeadlineExceeded}), 1, false},
		{"no answer to the request", at(hbone.StageConnect, os.ErrDeadlineExceeded), 1, false},
		{"no answer to a PING either", at(hbone.StageConnect, hbone.ErrSilent), 2, true},
		{"silent after it may have passed bytes on", at(hbone.StageConnect, hbone.ErrUncertain), 1, true},
		{"left under the request", at(hbone.StageConnect, hbone.ErrGone), 2, true},
		{"left under the dial", at(hbone.StageTCP, hbone.ErrGone), 2, true},
		{"tunnel lost under the request", at(hbone.StageConnect, syscall.ECONNRESET), 1, false},
		{"policy", &hbone.StatusError{Code: 401}, 1, false},
		{"application", &hbone.StatusError{Code: 503}, 2, true},
		{"bad request", &hbone.StatusError{Code: 400}, 1, false},
		{"our pod has gone", at(hbone.StageTCP, flow.ErrPodGone), 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			snap, src := twoEndpoints()
			f := &tunnels{fail: map[string]error{"10.0.0.11": c.err, "10.0.0.12": c.err}}
			p, table := testProxy(snap, func(cfg *Config) { cfg.Tunnels = f })
			conn, ctx := table.Begin(t.Context(), flow.Record{Direction: flow.Outbound, SrcAddr: netip.MustParseAddrPort("10.0.0.1:1")})
			defer conn.End(nil)
			if _, err := p.connect(ctx, conn, Request{Src: src, Dst: netip.MustParseAddrPort("10.96.0.1:80"), Rand: 3}); err == nil {
				t.Fatal("connected")
			}
			if len(f.dialed) != c.tries || conn.Record().Retries != c.tries-1 {
				t.Fatalf("dialled %q, retries=%d", f.dialed, conn.Record().Retries)
			}
			if c.tries == 2 && f.dialed[0] == f.dialed[1] {
				t.Errorf("dialled %q twice", f.dialed[0])
			}
			if got := p.cfg.Health.avoid("pod") != nil; got != c.later {
				t.Errorf("avoided later: %v", got)
			}
		})
	}
}

func TestNoRetryWhereItWouldWiden(t *testing.T) {
	fail := &hbone.DialError{Stage: hbone.StageTCP, Err: syscall.ECONNREFUSED}
	m := mesh.Empty().Edit()
	src := wl("src", "10.0.0.1")
	port := mesh.Port{Service: 80, Target: 8080}
	for _, w := range []*mesh.Workload{src,
		wl("b1", "10.0.0.11", serves("mixed", port)),
		wl("b2", "10.0.0.12", serves("mixed", port), func(w *mesh.Workload) { w.Tunnel = workload.TunnelProtocol_NONE }),
		wl("c1", "10.0.0.21", serves("single", port)),
		wl("d1", "10.0.0.31", serves("strict", port), func(w *mesh.Workload) { w.Locality.Zone = "z" }),
		wl("d2", "10.0.0.32", serves("strict", port), func(w *mesh.Workload) { w.Locality.Zone = "y" }),
	} {
		if w.Name == "src" {
			w.Locality.Zone = "z"
		}
		m.PutWorkload(w)
	}
	m.PutService(svc("mixed", "10.96.0.1"))
	m.PutService(svc("single", "10.96.0.2"))
	m.PutService(svc("strict", "10.96.0.3", func(s *mesh.Service) {
		s.Mode, s.Preference = workload.LoadBalancing_STRICT, []mesh.Scope{workload.LoadBalancing_ZONE}
	}))
	snap := m.Commit()
	for _, c := range []struct{ name, dst string }{
		{"no plaintext instead of a tunnel", "10.96.0.1:80"},
		{"no other endpoint", "10.96.0.2:80"},
		{"none that the service's mode allows", "10.96.0.3:80"},
		{"an address of its own", "10.0.0.11:80"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &tunnels{fail: map[string]error{"10.0.0.11": fail, "10.0.0.21": fail, "10.0.0.31": fail}}
			plain := 0
			p, table := testProxy(snap, func(cfg *Config) {
				cfg.Tunnels = f
				cfg.Dial = func(context.Context, netip.AddrPort) (net.Conn, error) {
					plain++
					return nil, errors.New("plaintext")
				}
			})
			for rnd := range uint64(20) {
				conn, ctx := table.Begin(t.Context(), flow.Record{})
				_, _ = p.connect(ctx, conn, Request{Src: src, Dst: netip.MustParseAddrPort(c.dst), Rand: rnd})
				if conn.Record().Retries != 0 {
					t.Fatalf("retried: %q, %d in plaintext", f.dialed, plain)
				}
				conn.End(nil)
			}
		})
	}
}

// A retry that works is a connection like any other.
func TestRetryConnects(t *testing.T) {
	snap, src := twoEndpoints(func(w *mesh.Workload) { w.Tunnel = workload.TunnelProtocol_NONE })
	var dialed []string
	p, table := testProxy(snap, func(cfg *Config) {
		cfg.Dial = func(_ context.Context, a netip.AddrPort) (net.Conn, error) {
			if dialed = append(dialed, a.Addr().String()); len(dialed) == 1 {
				return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
			}
			near, far := memnet.Pipe()
			t.Cleanup(func() { _, _ = near.Close(), far.Close() })
			return near, nil
		}
	})
	for range 5 { // later ones go straight to the endpoint that works
		conn, ctx := table.Begin(t.Context(), flow.Record{})
		if _, err := p.connect(ctx, conn, Request{Src: src, Dst: netip.MustParseAddrPort("10.96.0.1:80"), Rand: 3}); err != nil {
			t.Fatal(err)
		}
		if got := conn.Record().Dst.Addrs[0].String(); got != dialed[len(dialed)-1] {
			t.Errorf("recorded %s, dialled %q", got, dialed)
		}
		conn.End(nil)
	}
	if len(dialed) != 6 || dialed[0] == dialed[1] {
		t.Errorf("dialled %q", dialed)
	}
}

func TestHealthForgetsAndIsBounded(t *testing.T) {
	h := NewHealth(nil)
	now := time.Unix(0, 0)
	h.now = func() time.Time { return now }
	a, b := wl("a", "10.0.0.1"), wl("b", "10.0.0.2")
	h.failed("p1", a, os.ErrDeadlineExceeded)
	h.failed("p1", b, fmt.Errorf("dial: %w", syscall.ECONNREFUSED))
	if skip := h.avoid("p1"); !skip(a) || !skip(b) {
		t.Error("a client does not avoid what failed for it")
	}
	if skip := h.avoid("p2"); skip(a) || !skip(b) {
		t.Error("silence towards one client counts for others, or a refusal does not")
	}
	now = now.Add(avoidFor)
	if skip := h.avoid("p1"); skip(a) || skip(b) {
		t.Error("not forgotten")
	}
	for i := range 2 * maxFailed {
		h.failed("p1", &mesh.Workload{UID: fmt.Sprint(i), Traits: &mesh.Traits{}}, os.ErrDeadlineExceeded)
	}
	if n := len(*h.cur.Load()); n != maxFailed {
		t.Errorf("%d failures remembered", n)
	}
}

// resolver answers from a table.
type resolver map[string]string

func (r resolver) Resolve(_ context.Context, _ *mesh.Workload, host string, v6 bool) (netip.Addr, error) {
	a, err := netip.ParseAddr(r[fmt.Sprint(host, " ", v6)])
	if err != nil {
		return a, errors.New("no such host")
	}
	return a, nil
}

func TestHostNames(t *testing.T) {
	named := func(w *mesh.Workload) { w.Addrs, w.Hostname = nil, "h.example.com" }
	snap, src := twoEndpoints(named)
	plain, _ := twoEndpoints(named, func(w *mesh.Workload) { w.Tunnel = workload.TunnelProtocol_NONE })
	for _, c := range []struct {
		name     string
		snap     *mesh.Snapshot
		resolver Resolver
		want     string
		fails    string
	}{
		{"in the mesh", snap, resolver{"h.example.com false": "192.0.2.1"}, "192.0.2.1:15008", "CONNECT"},
		{"outside", plain, resolver{"h.example.com false": "192.0.2.1"}, "192.0.2.1:8080", "CONNECT"},
		{"unknown", plain, resolver{}, "", "no such host"},
		{"no resolver", plain, nil, "", "no resolver"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got string
			p, table := testProxy(c.snap, func(cfg *Config) {
				cfg.Resolver = c.resolver
				cfg.Tunnels = tunnelFunc(func(k hbone.Key) error { got = k.Addr.String(); return errors.New("CONNECT") })
				cfg.Dial = func(_ context.Context, a netip.AddrPort) (net.Conn, error) {
					got = a.String()
					return nil, errors.New("CONNECT")
				}
			})
			conn, ctx := table.Begin(t.Context(), flow.Record{})
			defer conn.End(nil)
			_, err := p.connect(ctx, conn, Request{Src: src, Dst: netip.MustParseAddrPort("10.96.0.1:80")})
			if err == nil || !strings.Contains(err.Error(), c.fails) || got != c.want {
				t.Errorf("dialled %q, %v; want %q, %s", got, err, c.want, c.fails)
			}
			if f, ok := errors.AsType[*flow.FlagError](err); !ok || f.Flag != flow.FlagConnect {
				t.Errorf("%v is not flagged", err)
			}
		})
	}
}

type tunnelFunc func(hbone.Key) error

func (f tunnelFunc) Connect(_ context.Context, k hbone.Key, _ hbone.ConnectRequest) (*hbone.Stream, *hbone.ConnectResponse, error) {
	return nil, nil, f(k)
}
