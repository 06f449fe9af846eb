package hbone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"

	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// relayed is a mesh whose server relays each stream to a TCP connection of which the test gets the other end.
func relayed(tb testing.TB) (*mesh, <-chan *net.TCPConn) {
	apps := make(chan *net.TCPConn, 100)
	m := newMesh(tb, meshConfig{Dial: tcpPair, Dialer: DialerConfig{MaxTunnels: 1}, Handler: func(ctx context.Context, r *Request) {
		up, app, err := tcpPair(ctx)
		if err != nil {
			r.Reject(503)
			return
		}
		s, err := r.Accept()
		if err != nil {
			_, _ = up.Close(), app.Close()
			return
		}
		apps <- app.(*net.TCPConn)
		_ = relay.Join(ctx, s, up.(*net.TCPConn), nil)
	}})
	return m, apps
}

// through opens client app ─TCP─ relay ─HBONE─ relay ─TCP─ server app.
func through(tb testing.TB, m *mesh, apps <-chan *net.TCPConn, wg *sync.WaitGroup) (client, server *net.TCPConn) {
	tb.Helper()
	c, in, err := tcpPair(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	s, _, err := m.Connect(tb.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80"})
	if err != nil {
		tb.Fatal(err)
	}
	wg.Go(func() { _ = relay.Join(context.Background(), in.(*net.TCPConn), s, nil) })
	return c.(*net.TCPConn), <-apps
}

func TestRelayCarriesEndsThroughTunnel(t *testing.T) {
	m, apps := relayed(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	c, s := through(t, m, apps, &wg)
	_, _ = c.Write([]byte("question"))
	_ = c.CloseWrite()
	if got, err := io.ReadAll(s); string(got) != "question" || err != nil {
		t.Fatalf("half-close: %q, %v", got, err)
	}
	_, _ = s.Write([]byte("answer"))
	_ = s.Close()
	if got, err := io.ReadAll(c); string(got) != "answer" || err != nil {
		t.Fatalf("close: %q, %v", got, err)
	}
	_ = c.Close()

	for _, side := range []string{"client", "server"} {
		c, s := through(t, m, apps, &wg)
		if side == "server" {
			c, s = s, c
		}
		_, _ = c.Write([]byte("x"))
		if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		_, _ = c.SetLinger(0), c.Close()
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s reset: other app reads %v, want ECONNRESET", side, err)
		}
		_ = s.Close()
	}
}

// BenchmarkRelay is BenchmarkBulk with an application over TCP on both sides: the whole way of a connection.
func BenchmarkRelay(b *testing.B) {
	for _, streams := range []int{1, 8, 64} {
		for _, size := range []int{1 << 10, 16 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("streams=%d/write=%dKiB/hbone", streams, size>>10), func(b *testing.B) {
				bulk(b, streams, size, func(b *testing.B, n int) []io.WriteCloser {
					m, apps := relayed(b)
					var wg sync.WaitGroup
					b.Cleanup(wg.Wait)
					var ws []io.WriteCloser
					for range n {
						c, s := through(b, m, apps, &wg)
						sinks.Add(1)
						go func() {
							sink(s)
							_ = s.Close()
						}()
						ws = append(ws, c)
					}
					return ws
				})
			})
			b.Run(fmt.Sprintf("streams=%d/write=%dKiB/nethttp", streams, size>>10), func(b *testing.B) {
				bulk(b, streams, size, relayNetHTTP)
			})
		}
	}
}

// relayNetHTTP is the same way with io.Copy around x/net/http2.
func relayNetHTTP(b *testing.B, n int) []io.WriteCloser {
	outs := openNetHTTPTo(b, n, func(r io.Reader) {
		up, app, err := tcpPair(b.Context())
		if err != nil {
			b.Error(err)
			sinks.Done()
			return
		}
		go func() {
			sink(app)
			_ = app.Close()
		}()
		_, _ = io.Copy(up, r)
		_ = up.Close()
	})
	var ws []io.WriteCloser
	for _, out := range outs {
		c, in, err := tcpPair(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		go func() {
			_, _ = io.CopyBuffer(struct{ io.Writer }{out}, struct{ io.Reader }{in}, make([]byte, 64<<10))
			_, _ = out.Close(), in.Close()
		}()
		ws = append(ws, c)
	}
	return ws
}

// BenchmarkAsk is a question and its answer on that way, one at a time.
func BenchmarkAsk(b *testing.B) {
	m, apps := relayed(b)
	var wg sync.WaitGroup
	b.Cleanup(wg.Wait)
	c, s := through(b, m, apps, &wg)
	go func() {
		_, _ = io.CopyBuffer(struct{ io.Writer }{s}, struct{ io.Reader }{s}, make([]byte, 1<<10))
		_ = s.Close()
	}()
	p := make([]byte, 1<<10)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(p); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, p); err != nil {
			b.Fatal(err)
		}
	}
	_ = c.Close()
}
