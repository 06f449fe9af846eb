package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/test/memnet"
)

// gateways is a mesh whose server is a gateway: it hands what comes in its streams to a server behind it, as bytes.
type gateways struct {
	*mesh
	inner *Server
	acc   chan *Stream
	asked chan string // authority and header of outer CONNECTs
}

func newGateways(tb testing.TB, refuse int) *gateways {
	g := &gateways{acc: make(chan *Stream, 1000), asked: make(chan string, 1000)}
	p := testPKI()
	g.inner = NewServer(ServerConfig{Handler: acceptTo(g.acc), AmbitRecords: ambitLayer,
		TLS: func(context.Context, netip.AddrPort) (*tls.Config, error) { return p.serverConfig(), nil }})
	var wg sync.WaitGroup
	g.mesh = newMesh(tb, meshConfig{Dial: memPair,
		Dialer: DialerConfig{GatewayHeader: func(Key) []HeaderField { return []HeaderField{{Name: "baggage", Value: "b"}} }},
		Handler: func(ctx context.Context, r *Request) {
			g.asked <- r.Authority + " " + r.Header("baggage")
			if refuse != 0 {
				r.Reject(refuse)
				return
			}
			s, err := r.Accept()
			if err != nil {
				return
			}
			near, far := memnet.Pipe()
			wg.Go(func() { _ = g.inner.ServeConn(ctx, far) })
			wg.Go(func() { _, _ = io.Copy(near, struct{ io.Reader }{s}); _ = near.CloseWrite() })
			_, _ = io.Copy(struct{ io.Writer }{s}, near)
			_, _ = s.Close(), near.Close()
		}})
	g.key.Gateway = Gateway{Peers: serverID.String(), Authority: "svc.default:80"}
	tb.Cleanup(func() { g.close(); _ = g.inner.Close(); wg.Wait() })
	return g
}

func TestGatewayTunnelIsPooled(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newGateways(t, 0)
		c, s := streamPair(t, g.mesh, g.acc)
		if got := <-g.asked; got != "svc.default:80 b" {
			t.Errorf("outer CONNECT %q", got)
		}
		go func() { _, _ = c.Write(make([]byte, 1<<20)); _ = c.CloseWrite() }()
		if b, err := io.ReadAll(s); len(b) != 1<<20 || err != nil {
			t.Fatalf("read %d bytes, %v", len(b), err)
		}
		for range 50 {
			c, s := streamPair(t, g.mesh, g.acc)
			_, _ = c.Close(), s.Close()
		}
		if n := len(g.asked); n != 0 || g.dialled() != 1 {
			t.Errorf("%d more outer streams, %d connections to the gateway", n, g.dialled())
		}
		g.key.Gateway.Slot++ // another inner tunnel, the same outer one
		streamPair(t, g.mesh, g.acc)
		if n := len(g.asked); n != 1 || g.dialled() != 1 {
			t.Errorf("%d outer streams for another slot, %d connections to the gateway", n, g.dialled())
		}
		g.key.Gateway.Peers += " " // a gateway with other peers is another gateway
		streamPair(t, g.mesh, g.acc)
		if g.dialled() != 2 {
			t.Errorf("%d connections to two gateways", g.dialled())
		}
	})
}

// A stream that nobody reads stops neither its neighbours in the inner tunnel nor those in the outer one.
func TestGatewayTunnelStalledStreamStopsNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newGateways(t, 0)
		stalled, sink := streamPair(t, g.mesh, g.acc)
		go func() { _, _ = stalled.Write(make([]byte, 64<<20)) }()
		synctest.Wait()
		for _, slot := range []uint8{0, 1} {
			g.key.Gateway.Slot = slot
			c, s := streamPair(t, g.mesh, g.acc)
			go func() { _, _ = c.Write(make([]byte, 4<<20)); _ = c.CloseWrite() }()
			if b, err := io.ReadAll(s); len(b) != 4<<20 || err != nil {
				t.Fatalf("slot %d: read %d bytes beside a stalled stream, %v", slot, len(b), err)
			}
		}
		_, _ = sink.Reset(), stalled.Close()
	})
}

func TestGatewayTunnelAges(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newGateways(t, 0)
		c, s := streamPair(t, g.mesh, g.acc)
		time.Sleep(gatewayAge - time.Second)
		streamPair(t, g.mesh, g.acc)
		if n := len(g.asked); n != 1 {
			t.Fatalf("%d inner tunnels within their age", n)
		}
		time.Sleep(time.Second)
		c2, s2 := streamPair(t, g.mesh, g.acc)
		if n := len(g.asked); n != 2 || g.dialled() != 1 {
			t.Errorf("%d inner tunnels over %d connections, want a second over the first", n, g.dialled())
		}
		if _, err := c.Write([]byte("x")); err != nil { // the old one goes on
			t.Error(err)
		}
		if _, err := s.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
		_, _ = c2.Close(), s2.Close()
	})
}

func TestGatewayFailuresSayWhere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newGateways(t, 401)
		_, _, err := g.Connect(t.Context(), g.key, ConnectRequest{Authority: "svc.default:80"})
		e, ok := errors.AsType[*GatewayError](err)
		st, refused := errors.AsType[*StatusError](err)
		if !ok || !refused || st.Code != 401 || e.Addr != g.key.Addr {
			t.Errorf("gateway refused: %v", err)
		}
		g = newGateways(t, 0)
		_ = g.inner.Close()
		_, _, err = g.Connect(t.Context(), g.key, ConnectRequest{Authority: "svc.default:80"})
		d, ok := errors.AsType[*DialError](err)
		if _, atGateway := errors.AsType[*GatewayError](err); !ok || atGateway || d.Stage != StageTLS {
			t.Errorf("nobody behind the gateway: %v", err)
		}
		g = newGateways(t, 0)
		g.dial = func(context.Context) (net.Conn, net.Conn, error) { return nil, nil, errors.New("unreachable") }
		_, _, err = g.Connect(t.Context(), g.key, ConnectRequest{Authority: "svc.default:80"})
		d, ok = errors.AsType[*DialError](err)
		if _, atGateway := errors.AsType[*GatewayError](err); !ok || !atGateway || d.Stage != StageTCP {
			t.Errorf("no gateway: %v", err)
		}
	})
}

func TestGatewayPodCutsBothTunnels(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newGateways(t, 0)
		c, _ := streamPair(t, g.mesh, g.acc)
		g.ClosePod(g.key.Pod)
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("read of cut stream: %v, want an error", err)
		}
		synctest.Wait()
		g.Dialer.mu.Lock()
		defer g.Dialer.mu.Unlock()
		if n := len(g.sets); n != 0 {
			t.Errorf("%d sets left", n)
		}
	})
}

func BenchmarkGatewayTunnel(b *testing.B) {
	g := newGateways(b, 0)
	c, s := streamPair(b, g.mesh, g.acc)
	go func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{s}) }()
	buf := make([]byte, 64<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}
