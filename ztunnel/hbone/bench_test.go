//lint:file-ignore SA1019 x/net/http2 is the peer to compare with: its types reach single connections and their limits directly

package hbone

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
)

// BenchmarkBulk moves bytes one way through streams of one tunnel over loopback TCP: ours, raw crypto/tls (one
// connection per stream) and x/net/http2 CONNECT, so that the ratios can be read in one run.
func BenchmarkBulk(b *testing.B) {
	for _, streams := range []int{1, 8, 64} {
		for _, size := range []int{1 << 10, 16 << 10, 256 << 10} {
			for _, kind := range []struct {
				name string
				open func(b *testing.B, n int) []io.WriteCloser
			}{{"hbone", openHBONE}, {"tls", openTLS}, {"nethttp", openNetHTTP}} {
				b.Run(fmt.Sprintf("streams=%d/write=%dKiB/%s", streams, size>>10, kind.name), func(b *testing.B) {
					bulk(b, streams, size, kind.open)
				})
			}
		}
	}
}

var sunk atomic.Int64

// bulk writes b.N chunks over all streams and waits until the other side has read them.
func bulk(b *testing.B, streams, size int, open func(b *testing.B, n int) []io.WriteCloser) {
	sunk.Store(0)
	ws := open(b, streams)
	chunk := make([]byte, size)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	var next atomic.Int64
	for _, w := range ws {
		wg.Go(func() {
			for next.Add(1) <= int64(b.N) {
				if _, err := w.Write(chunk); err != nil {
					b.Error(err)
					return
				}
			}
			_ = w.Close()
		})
	}
	wg.Wait()
	sinks.Wait()
	b.StopTimer()
	if got, want := sunk.Load(), int64(b.N)*int64(size); got != want {
		b.Errorf("sink read %d bytes, want %d", got, want)
	}
}

// sinks are the readers of the benchmark under way.
var sinks sync.WaitGroup

func sink(r io.Reader) {
	defer sinks.Done()
	n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 64<<10))
	sunk.Add(n)
}

type halfCloser struct{ *Stream }

func (h halfCloser) Close() error { return h.CloseWrite() }

func openHBONE(b *testing.B, n int) []io.WriteCloser {
	m := newMesh(b, meshConfig{Dial: tcpPair, Dialer: DialerConfig{MaxTunnels: 1}, Handler: func(ctx context.Context, r *Request) {
		s, err := r.Accept()
		if err != nil {
			return
		}
		sink(s)
		_ = s.Close()
	}})
	var ws []io.WriteCloser
	for range n {
		sinks.Add(1)
		s, _, err := m.Connect(b.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80"})
		if err != nil {
			b.Fatal(err)
		}
		ws = append(ws, halfCloser{s})
	}
	return ws
}

func openTLS(b *testing.B, n int) []io.WriteCloser {
	p := testPKI()
	var ws []io.WriteCloser
	for range n {
		c, s, err := tcpPair(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		sinks.Add(1)
		ts := tls.Server(s, p.serverConfig())
		go sink(ts)
		tc := tls.Client(c, p.clientConfig())
		if err := tc.Handshake(); err != nil {
			b.Fatal(err)
		}
		ws = append(ws, tc)
	}
	return ws
}

func openNetHTTP(b *testing.B, n int) []io.WriteCloser { return openNetHTTPTo(b, n, sink) }

// openNetHTTPTo opens n CONNECT streams by x/net/http2 whose server ends read with read.
func openNetHTTPTo(b *testing.B, n int, read func(io.Reader)) []io.WriteCloser {
	p := testPKI()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := &http2.Server{MaxConcurrentStreams: 200, MaxReadFrameSize: 1 << 20, MaxUploadBufferPerConnection: 16 << 20, MaxUploadBufferPerStream: 4 << 20}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		_ = http.NewResponseController(w).Flush()
		read(r.Body)
	})
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				t := tls.Server(c, p.serverConfig())
				if t.Handshake() == nil {
					srv.ServeConn(t, &http2.ServeConnOpts{Handler: handler})
				}
			}()
		}
	}()
	tr := &http2.Transport{TLSClientConfig: p.clientConfig(), MaxReadFrameSize: 1 << 20, StrictMaxConcurrentStreams: true}
	b.Cleanup(func() {
		tr.CloseIdleConnections()
		_ = ln.Close()
	})
	var ws []io.WriteCloser
	for range n {
		sinks.Add(1)
		pr, pw := io.Pipe()
		req := must(http.NewRequest("CONNECT", "https://"+ln.Addr().String(), pr))
		resp, err := tr.RoundTrip(req)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = resp.Body.Close() })
		ws = append(ws, pw)
	}
	return ws
}

// BenchmarkConnect opens and closes streams on a warm tunnel.
func BenchmarkConnect(b *testing.B) {
	for _, par := range []int{1, 16} {
		b.Run(fmt.Sprintf("parallel=%d", par), func(b *testing.B) {
			m := newMesh(b, meshConfig{Dial: tcpPair, Handler: func(ctx context.Context, r *Request) {
				s, err := r.Accept()
				if err != nil {
					return
				}
				_, _ = io.Copy(io.Discard, s)
				_ = s.Close()
			}})
			b.ReportAllocs()
			b.SetParallelism((par + 1) / 2)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					s, _, err := m.Connect(context.Background(), m.key, ConnectRequest{Authority: "192.0.2.2:80"})
					if err != nil {
						b.Error(err)
						return
					}
					_ = s.CloseWrite()
					_, _ = io.Copy(io.Discard, s)
					_ = s.Close()
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "streams/s")
		})
	}
}

// BenchmarkHandshake opens tunnels: TCP, mutual TLS 1.3, SETTINGS, one CONNECT.
func BenchmarkHandshake(b *testing.B) {
	m := newMesh(b, meshConfig{Dial: tcpPair, Handler: func(ctx context.Context, r *Request) { r.Reject(503) }})
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			k := m.key
			k.Pod = fmt.Sprint(podSeq.Add(1))
			_, _, err := m.Connect(context.Background(), k, ConnectRequest{Authority: "192.0.2.2:80"})
			if _, ok := err.(*StatusError); !ok {
				b.Error(err)
				return
			}
			m.ClosePod(k.Pod)
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "handshakes/s")
}

var podSeq atomic.Int64

// BenchmarkPingPong is one small message each way: what a request costs on an idle tunnel.
func BenchmarkPingPong(b *testing.B) {
	m := newMesh(b, meshConfig{Dial: tcpPair, Handler: func(ctx context.Context, r *Request) {
		s, err := r.Accept()
		if err != nil {
			return
		}
		_, _ = io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{s})
		_ = s.Close()
	}})
	s, _, err := m.Connect(b.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80"})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	msg := make([]byte, 1<<10)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Write(msg); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(s, msg); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkNeighbour is a busy stream's speed alone, and beside 50 of its tunnel whose readers never read.
func BenchmarkNeighbour(b *testing.B) {
	for _, unread := range []int{0, 50} {
		b.Run(fmt.Sprintf("unread=%d", unread), func(b *testing.B) {
			b.StopTimer()
			m, acc := newPairs(b, tcpPair)
			m.Dialer.cfg.MaxTunnels = 1
			var wg sync.WaitGroup
			defer wg.Wait()
			for range unread {
				c, s := streamPair(b, m, acc)
				wg.Go(func() {
					for {
						if _, err := c.Write(make([]byte, 64<<10)); err != nil {
							return
						}
					}
				})
				defer s.Reset()
			}
			c, s := streamPair(b, m, acc)
			chunk := make([]byte, 64<<10)
			b.SetBytes(int64(len(chunk)))
			sunk.Store(0)
			sinks.Add(1)
			go sink(s)
			b.StartTimer()
			for range b.N {
				if _, err := c.Write(chunk); err != nil {
					b.Fatal(err)
				}
			}
			_ = c.CloseWrite()
			sinks.Wait()
			b.StopTimer()
		})
	}
}
