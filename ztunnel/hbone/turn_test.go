package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// oneTurn is a node that computes for one handshake at a time.
func oneTurn() *ledger.Ledger {
	l := ledger.DefaultLimits()
	l[ledger.Turns] = 1
	return ledger.New(l)
}

func (m *mesh) wantTunnel(t *testing.T, what string) {
	t.Helper()
	_, _, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80"})
	if se, ok := errors.AsType[*StatusError](err); !ok || se.Code != 503 { // the handler's answer: we got there
		t.Errorf("%s: %v", what, err)
	}
}

// Half-open handshakes of one pod, and one that waits for its certificate, cost another pod no turn.
func TestWaitingHandshakesHoldNoTurn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		books := oneTurn()
		attacked, other := books.Pod("attacked"), books.Pod("other")
		m := newMesh(t, meshConfig{Dial: memPair, Handler: func(context.Context, *Request) {},
			Server: ServerConfig{Account: other}, Dialer: DialerConfig{Account: func(Key) *ledger.Account { return other }}})
		defer m.close()
		slow := testPKI().serverConfig()
		cert := slow.Certificates[0]
		gotc := make(chan struct{})
		slow.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			<-gotc
			return &cert, nil
		}
		slow.Certificates = nil
		srv := NewServer(ServerConfig{Account: attacked, Handler: func(context.Context, *Request) {},
			TLS: func(context.Context, netip.AddrPort) (*tls.Config, error) { return slow, nil }})
		serve := func(from string, port uint16) *memnet.Conn {
			c, s := memnet.PipeAddr(netip.AddrPortFrom(netip.MustParseAddr(from), port), netip.MustParseAddrPort("192.0.2.3:15008"))
			go func() { _ = srv.ServeConn(context.Background(), s) }()
			return c
		}
		for i := range uint16(32) {
			serve("192.0.2.66", 1024+i)
		}
		waits := serve("192.0.2.67", 1024)
		done := make(chan error, 1)
		go func() { done <- tls.Client(waits, testPKI().clientConfig()).Handshake() }()
		synctest.Wait()
		if n := attacked.InUse(ledger.Handshakes); n != 33 {
			t.Errorf("%d handshakes under way, want 33", n)
		}
		if n := attacked.InUse(ledger.Turns); n != 0 {
			t.Errorf("handshakes that wait hold %d turns", n)
		}
		m.wantTunnel(t, "another pod")
		close(gotc)
		if err := <-done; err != nil {
			t.Errorf("handshake whose certificate came: %v", err)
		}
		_ = srv.Close()
		synctest.Wait()
		for _, a := range []*ledger.Account{attacked, other} {
			if n := a.InUse(ledger.Turns); n != 0 {
				t.Errorf("%d turns left over", n)
			}
		}
	})
}

// Handshakes compute only when it is their turn.
func TestHandshakeWaitsForItsTurn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		books := oneTurn()
		busy, other := books.Pod("busy"), books.Pod("other")
		m := newMesh(t, meshConfig{Dial: memPair, Handler: func(context.Context, *Request) {}, Server: ServerConfig{Account: other}})
		defer m.close()
		busy.TryAcquire(ledger.Turns, 1)
		done := make(chan struct{})
		go func() {
			defer close(done)
			m.wantTunnel(t, "after its turn came")
		}()
		synctest.Wait()
		select {
		case <-done:
			t.Error("handshake without a turn")
		default:
		}
		busy.Release(ledger.Turns, 1)
		<-done
	})
}

// A transport that takes nothing, such as a stream whose window the other end keeps shut, holds no turn either.
func TestStuckHandshakeHoldsNoTurn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		account := oneTurn().Pod("pod")
		begin := time.Now()
		m := newMesh(t, meshConfig{Handler: func(context.Context, *Request) {}, Server: ServerConfig{Account: account},
			Dial: memPair, Dialer: DialerConfig{Account: func(Key) *ledger.Account { return account }}})
		defer m.close()
		stuck := NewDialer(DialerConfig{Account: func(Key) *ledger.Account { return account },
			TLS: func(context.Context, Key) (*tls.Config, error) { return testPKI().clientConfig(), nil },
			DialTransport: func(context.Context, Key) (net.Conn, error) {
				c, _ := memnet.Pipe()
				c.SetBuffer(0)
				return c, nil
			}})
		go func() {
			_, _, _ = stuck.Connect(context.Background(), m.key, ConnectRequest{Authority: "192.0.2.2:80"})
		}()
		synctest.Wait()
		m.wantTunnel(t, "beside it")
		if waited := time.Since(begin); waited != 0 {
			t.Errorf("waited %v for a handshake that is stuck", waited)
		}
		_ = stuck.Close()
	})
}
