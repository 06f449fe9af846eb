package hbone

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// One source's half-open handshakes leave slots for others; its surplus is reset at once.
func TestHandshakesPerSource(t *testing.T) {
	bubble(t, func(t *testing.T) {
		limits := ledger.DefaultLimits()
		account := ledger.New(limits).Pod("pod-b")
		m := newMesh(t, meshConfig{Dial: memPair, Handler: func(context.Context, *Request) {}, Server: ServerConfig{Account: account}})
		defer m.close()
		dst := netip.MustParseAddrPort("192.0.2.2:15008")
		errc := make(chan error, 1500)
		for i := range 1500 {
			_, s := memnet.PipeAddr(netip.AddrPortFrom(netip.MustParseAddr("192.0.2.66"), uint16(1024+i)), dst)
			go func() { errc <- m.srv.ServeConn(context.Background(), s) }()
		}
		synctest.Wait()
		if n := account.InUse(ledger.Handshakes); n != 64 {
			t.Errorf("one source holds %d handshakes, want 64", n)
		}
		if n := len(errc); n != 1500-64 {
			t.Fatalf("%d refused at once, want %d", n, 1500-64)
		}
		if err := <-errc; !errors.Is(err, ErrTooManyHandshakes) {
			t.Errorf("refused with %v", err)
		}
		if _, err := m.srv.handshakeFrom(t, "192.0.2.66"); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("surplus reads %v, want a reset", err)
		}
		if s, _, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80"}); err == nil {
			_ = s.Close()
		} else if se, ok := errors.AsType[*StatusError](err); !ok || se.Code != 503 { // the handler's answer: we got there
			t.Errorf("another source: %v", err)
		}
		_ = m.srv.Close()
		synctest.Wait()
		if n := len(m.srv.sources); n != 0 {
			t.Errorf("%d sources are still counted", n)
		}
	})
}

// handshakeFrom connects without a word and reads.
func (s *Server) handshakeFrom(t *testing.T, src string) (net.Conn, error) {
	c, peer := memnet.PipeAddr(netip.AddrPortFrom(netip.MustParseAddr(src), 999), netip.MustParseAddrPort("192.0.2.2:15008"))
	go func() { _ = s.ServeConn(context.Background(), peer) }()
	_, err := c.Read(make([]byte, 1))
	return c, err
}

// Port checks, and the node's own questions to the network, are no failures.
func TestWhoLeavesWithoutAWordIsNoFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		m := newMesh(t, meshConfig{Dial: memPair, Handler: func(context.Context, *Request) {}, Server: ServerConfig{Registerer: reg}})
		defer m.close()
		c, s := memnet.Pipe()
		_ = c.Close()
		_ = m.srv.ServeConn(t.Context(), s)
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, metric := range f.GetMetric() {
				if f.GetName() == "ambit_ztunnel_hbone_handshakes_total" && metric.Label[0].GetValue() != "left" {
					t.Errorf("counted as %v", metric)
				}
			}
		}
	})
}
