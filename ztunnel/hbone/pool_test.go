//lint:file-ignore SA1019 x/net/http2 is the peer to compare with: its types reach single connections and their limits directly

package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

func TestPoolSharesAndReuses(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, acc := newPairs(t, memPair)
		var wg sync.WaitGroup
		openc := make(chan struct{})
		for range 150 { // one dial serves 100
			wg.Go(func() {
				c, _, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80"})
				if err != nil {
					t.Error(err)
					return
				}
				<-openc
				_ = c.Close()
			})
		}
		synctest.Wait()
		close(openc)
		wg.Wait()
		if n := m.dialled(); n != 2 {
			t.Errorf("150 concurrent connects dialled %d tunnels, want 2", n)
		}
		for len(acc) > 0 {
			_ = (<-acc).Close()
		}
		for range 300 { // full tunnels are used again when their streams have ended
			c, s := streamPair(t, m, acc)
			_, _ = c.Close(), s.Close()
		}
		if n := m.dialled(); n != 2 {
			t.Errorf("dialled %d tunnels, want the first two reused", n)
		}
		m.close()
	})
}

func TestPoolKeysAreApart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, acc := newPairs(t, memPair)
		streamPair(t, m, acc)
		m.key.Pod = "pod-b" // same service account, same destination
		c, s := streamPair(t, m, acc)
		if m.dialled() != 2 {
			t.Error("two pods share a tunnel")
		}
		m.ClosePod("pod-a")
		if _, err := c.Write([]byte("x")); err != nil {
			t.Errorf("closing pod-a hit pod-b: %v", err)
		}
		m.ClosePod("pod-b")
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("read of cut stream: %v, want an error", err)
		}
		if _, err := s.Read(make([]byte, 2)); err != nil && err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the peer reads %v", err)
		}
		m.close()
	})
}

func TestPoolBusyTunnelIsLeftAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, acc := newPairs(t, memPair)
		c, s := streamPair(t, m, acc)
		go func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{s}) }()
		if _, err := c.Write(make([]byte, 3*busyBytes)); err != nil {
			t.Fatal(err)
		}
		streamPair(t, m, acc)
		if n := m.dialled(); n != 2 {
			t.Errorf("%d tunnels beside a bulk flow, want 2", n)
		}
		time.Sleep(time.Second) // the bubble's
		streamPair(t, m, acc)
		if n := m.dialled(); n != 2 {
			t.Errorf("%d tunnels when all are quiet, want 2", n)
		}
		m.close()
	})
}

func TestPoolIdleTimeout(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, acc := newPairs(t, memPair)
		c, s := streamPair(t, m, acc)
		_, _ = c.Close(), s.Close()
		time.Sleep(6 * time.Minute) // the bubble's
		if n := len(m.matching(func(Key) bool { return true })); n != 0 {
			t.Errorf("%d sets left after the idle timeout", n)
		}
		streamPair(t, m, acc)
		if m.dialled() != 2 {
			t.Error("idle tunnel was used again")
		}
		m.close()
	})
}

// After a crowd few tunnels wait for what comes next.
func TestSurplusTunnelsEndSooner(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, acc := newPairs(t, memPair)
		var ends []io.Closer
		for range 6*100 + 1 {
			c, s := streamPair(t, m, acc)
			ends = append(ends, c, s)
		}
		most := m.dialled()
		if most < 6 {
			t.Fatalf("%d tunnels for 601 streams", most)
		}
		open := func() (n int) {
			for _, set := range m.matching(func(Key) bool { return true }) {
				set.mu.Lock()
				n += len(set.tunnels)
				set.mu.Unlock()
			}
			return n
		}
		time.Sleep(2 * time.Minute)
		if n := open(); n != most {
			t.Errorf("%d of %d tunnels with streams left", n, most)
		}
		for _, e := range ends {
			_ = e.Close()
		}
		time.Sleep(surplusIdle / 2)
		if n := open(); n != most {
			t.Errorf("%d of %d tunnels left at once", n, most)
		}
		time.Sleep(surplusIdle)
		if n := open(); n != 4 {
			t.Errorf("%d tunnels left after a while, want 4", n)
		}
		time.Sleep(5 * time.Minute)
		if n := open(); n != 0 {
			t.Errorf("%d tunnels left in the end", n)
		}
		m.close()
	})
}

func TestCloseMatchingDrains(t *testing.T) {
	bubble(t, func(t *testing.T) {
		m, acc := newPairs(t, memPair)
		c, s := streamPair(t, m, acc)
		m.CloseMatching(func(k Key) bool { return k.Local == clientID })
		c2, _ := streamPair(t, m, acc)
		if m.dialled() != 2 {
			t.Error("a stream went into a draining tunnel")
		}
		if _, err := c.Write([]byte("still here")); err != nil {
			t.Errorf("draining tunnel: %v", err)
		}
		_, _, _ = c.Close(), s.Close(), c2.Close()
		m.close()
	})
}

// dialTo returns a Dialer whose peer is whatever serve makes of its connections, spoken in frames.
func dialTo(t *testing.T, cfg DialerConfig, serve func(n int, f *framer)) (*Dialer, Key) {
	p := testPKI()
	var n atomic.Int64
	var wg sync.WaitGroup
	cfg.TLS = func(context.Context, Key) (*tls.Config, error) { return p.clientConfig(), nil }
	if cfg.DialTransport == nil {
		cfg.DialTransport = func(context.Context, Key) (net.Conn, error) {
			c, s := memnet.Pipe()
			wg.Go(func() {
				defer s.Close()
				conn := tls.Server(s, p.serverConfig())
				if conn.Handshake() == nil {
					serve(int(n.Add(1)), newFramer(t, s, conn))
				}
			})
			return c, nil
		}
	}
	cfg.AmbitRecords = ambitLayer
	d := NewDialer(cfg)
	t.Cleanup(func() { _ = d.Close(); wg.Wait() })
	return d, Key{Pod: "p", Local: clientID, Addr: netip.MustParseAddrPort("192.0.2.2:15008")}
}

// accept completes the server's side of the preface.
func (f *framer) accept() {
	f.t.Helper()
	_, _ = io.ReadFull(f.conn, make([]byte, len(http2.ClientPreface)))
	sf, ok := f.next("client's SETTINGS").(*http2.SettingsFrame)
	if !ok {
		f.t.Fatal("first frame is not SETTINGS")
	}
	if v, ok := sf.Value(http2.SettingEnablePush); !ok || v != 0 {
		f.t.Error("client does not forbid pushes")
	}
	f.ok(f.WriteSettings(http2.Setting{ID: 0xf000, Val: 7})) // unknown: ignored
	f.ok(f.WriteSettingsAck())
}

// nextConnect reads to the next request.
func (f *framer) nextConnect() uint32 {
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return 0
		}
		if h, ok := fr.(*http2.MetaHeadersFrame); ok {
			return h.StreamID
		}
	}
}

func (f *framer) answer(id uint32) { f.request(id, ":status", "200", "baggage", "a=b") }

func (f *framer) drainInput() { _, _ = io.Copy(io.Discard, f.conn) }

func TestConnectRetriesOnce(t *testing.T) {
	for name, refuse := range map[string]func(f *framer, id uint32){
		"REFUSED_STREAM": func(f *framer, id uint32) { f.ok(f.WriteRSTStream(id, http2.ErrCodeRefusedStream)) },
		"GOAWAY":         func(f *framer, id uint32) { f.ok(f.WriteGoAway(id-2, 0, nil)) },
		"dead tunnel":    func(f *framer, id uint32) { _ = f.raw.Reset() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				refused := false
				d, k := dialTo(t, DialerConfig{}, func(n int, f *framer) {
					f.accept()
					for {
						id := f.nextConnect()
						if id == 0 {
							return
						}
						if n == 1 && id == 3 && !refused {
							refused = true
							refuse(f, id)
							continue
						}
						f.answer(id)
					}
				})
				for i := range 2 {
					s, resp, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Header: []HeaderField{{"baggage", "x=y"}}})
					if err != nil {
						t.Fatalf("connect %d: %v", i, err)
					}
					if resp.Header.Get("baggage") != "a=b" {
						t.Errorf("response header: %v", resp.Header)
					}
					defer s.Close()
				}
				if !refused {
					t.Error("nothing was refused")
				}
				_ = d.Close()
			})
		})
	}
}

func TestConnectErrors(t *testing.T) {
	forever := make(chan struct{})
	defer close(forever)
	for _, tt := range []struct {
		name    string
		stage   Stage
		timeout bool
		within  time.Duration
		cfg     DialerConfig
		serve   func(n int, f *framer)
	}{
		{name: "tcp timeout", stage: StageTCP, timeout: true, within: 10 * time.Second, cfg: DialerConfig{
			DialTransport: func(ctx context.Context, _ Key) (net.Conn, error) { <-ctx.Done(); return nil, context.Cause(ctx) },
		}},
		{name: "refused", stage: StageTCP, cfg: DialerConfig{
			DialTransport: func(ctx context.Context, _ Key) (net.Conn, error) { return nil, syscall.ECONNREFUSED },
		}},
		{name: "no SETTINGS", stage: StageH2, timeout: true, within: 10 * time.Second, serve: func(_ int, f *framer) { f.drainInput() }},
		{name: "not h2", stage: StageH2, serve: func(_ int, f *framer) { _, _ = f.conn.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) }},
		{name: "no answer", stage: StageConnect, timeout: true, within: 10 * time.Second, serve: func(_ int, f *framer) { f.accept(); f.drainInput() }},
		{name: "refused twice", stage: StageConnect, serve: func(_ int, f *framer) {
			f.accept()
			for id := f.nextConnect(); id != 0; id = f.nextConnect() {
				f.ok(f.WriteRSTStream(id, http2.ErrCodeRefusedStream))
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				d, k := dialTo(t, tt.cfg, tt.serve)
				begin := time.Now()
				_, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1"})
				de, ok := errors.AsType[*DialError](err)
				if !ok || de.Stage != tt.stage || de.Timeout() != tt.timeout {
					t.Errorf("connect: %v, want stage %s, timeout %v", err, tt.stage, tt.timeout)
				}
				if took := time.Since(begin); took > tt.within {
					t.Errorf("took %v, want at most %v", took, tt.within)
				}
				_ = d.Close()
			})
		})
	}
}

func TestConnectStatusAndCancel(t *testing.T) {
	bubble(t, func(t *testing.T) {
		d, k := dialTo(t, DialerConfig{}, func(_ int, f *framer) {
			f.accept()
			f.ok(f.WriteHeaders(http2.HeadersFrameParam{StreamID: f.nextConnect(), BlockFragment: f.block(":status", "401"), EndHeaders: true, EndStream: true}))
			f.nextConnect()
			f.wantReset("a caller that gives up", 3, http2.ErrCodeCancel)
			f.drainInput()
		})
		_, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1"})
		if se, ok := errors.AsType[*StatusError](err); !ok || se.Code != 401 {
			t.Errorf("connect: %v, want status 401", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := d.Connect(ctx, k, ConnectRequest{Authority: "a:1"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("connect: %v, want the caller's deadline", err)
		}
		synctest.Wait() // RST_STREAM leaves
		_ = d.Close()
	})
}

// Everything that was taken from the ledger is back when all is closed.
func TestLedgerBalances(t *testing.T) {
	bubble(t, func(t *testing.T) {
		l := ledger.New(ledger.DefaultLimits())
		cl, sv := l.Pod("client"), l.Pod("server")
		acc := make(chan *Stream, 100)
		m := newMesh(t, meshConfig{
			Dial: memPair, Handler: acceptTo(acc),
			Dialer: DialerConfig{Account: func(Key) *ledger.Account { return cl }}, Server: ServerConfig{Account: sv},
		})
		for i := range 20 {
			c, s := streamPair(t, m, acc)
			switch i % 4 {
			case 0:
				_ = c.Reset()
			case 1:
				_ = s.Reset()
			case 2:
				_, _ = c.Close(), s.Close()
			}
		}
		if cl.InUse(ledger.Streams) == 0 || sv.InUse(ledger.Bytes) == 0 {
			t.Error("open streams are not accounted")
		}
		m.close()
		synctest.Wait()
		for _, a := range []*ledger.Account{cl, sv} {
			for _, r := range []ledger.Resource{ledger.Streams, ledger.Bytes, ledger.Connections, ledger.Handshakes, ledger.Dials} {
				if n := a.InUse(r); n != 0 {
					t.Errorf("%d %s left over", n, r)
				}
			}
		}
	})
}

// The same wire, spoken by x/net/http2's client and server.
func TestInteropNetHTTPClient(t *testing.T) {
	p := testPKI()
	m, acc := newPairs(t, tcpPair)
	c, s, err := tcpPair(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _ = m.srv.ServeConn(context.Background(), s) })
	tc := tls.Client(c, p.clientConfig())
	if err := tc.Handshake(); err != nil {
		t.Fatal(err)
	}
	cc, err := (&http2.Transport{}).NewClientConn(tc)
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	pr, pw := io.Pipe()
	resp, err := cc.RoundTrip(must(http.NewRequest("CONNECT", "https://10.0.0.1:80", pr)))
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("CONNECT: %v %v", resp, err)
	}
	srv := <-acc
	echo(t, pw, resp.Body, srv)
}

func TestInteropNetHTTPServer(t *testing.T) {
	p := testPKI()
	var wg sync.WaitGroup
	defer wg.Wait()
	d := NewDialer(DialerConfig{
		AmbitRecords: ambitLayer,
		TLS:          func(context.Context, Key) (*tls.Config, error) { return p.clientConfig(), nil },
		DialTransport: func(ctx context.Context, _ Key) (net.Conn, error) {
			c, s, err := tcpPair(ctx)
			if err == nil {
				wg.Go(func() {
					conn := tls.Server(s, p.serverConfig())
					if conn.Handshake() != nil {
						return
					}
					(&http2.Server{}).ServeConn(conn, &http2.ServeConnOpts{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						if r.Method != "CONNECT" || r.Host != "10.0.0.1:80" || r.Header.Get("Baggage") != "x=y" {
							t.Errorf("request %s %s %v", r.Method, r.Host, r.Header)
						}
						w.WriteHeader(200)
						_ = http.NewResponseController(w).Flush()
						_, _ = io.Copy(flushing{w}, r.Body)
					})})
				})
			}
			return c, err
		},
	})
	defer d.Close()
	s, _, err := d.Connect(t.Context(), Key{Pod: "p"}, ConnectRequest{Authority: "10.0.0.1:80", Header: []HeaderField{{"baggage", "x=y"}}})
	if err != nil {
		t.Fatal(err)
	}
	echo(t, s, s, nil)
}

type flushing struct{ http.ResponseWriter }

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.ResponseWriter.Write(p)
	_ = http.NewResponseController(f.ResponseWriter).Flush()
	return n, err
}

// echo sends 4 MiB and expects it back, by way of peer if there is one to do it.
func echo(t *testing.T, w io.WriteCloser, r io.Reader, peer *Stream) {
	t.Helper()
	const size = 4 << 20
	var wg sync.WaitGroup
	if peer != nil {
		wg.Go(func() {
			_, _ = io.Copy(struct{ io.Writer }{peer}, struct{ io.Reader }{peer})
			_ = peer.Close()
		})
	}
	wg.Go(func() {
		chunk := make([]byte, 64<<10)
		for range size / len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				t.Error(err)
				return
			}
		}
		if s, ok := w.(*Stream); ok {
			_ = s.CloseWrite()
		} else {
			_ = w.Close()
		}
	})
	if n, err := io.Copy(io.Discard, struct{ io.Reader }{r}); n != size || err != nil {
		t.Errorf("echo of %d bytes, %v: want %d", n, err, size)
	}
	wg.Wait()
}

// A slot whose stream never came about is given back: nothing else would end a tunnel that drains.
func TestSlotOfAFailedOpenIsGivenBack(t *testing.T) {
	for _, tt := range []struct {
		name string
		fail func(m *mesh, tn *tunnel) error
	}{
		{"bad header", func(m *mesh, tn *tunnel) error {
			_, err := tn.open(ConnectRequest{Authority: "a:1", Header: []HeaderField{{Name: "x", Value: "a\nb"}}}, nil)
			tn.drain()
			return err
		}},
		{"draining", func(m *mesh, tn *tunnel) error {
			tn.drain()
			_, err := tn.open(ConnectRequest{Authority: "a:1"}, nil)
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				m, acc := newPairs(t, memPair)
				c, s := streamPair(t, m, acc)
				tn := c.t
				_, _ = c.Close(), s.Close()
				synctest.Wait()
				if !tn.reserve() {
					t.Fatal("an idle tunnel has no slot")
				}
				begin := time.Now()
				if tt.fail(m, tn) == nil {
					t.Error("a stream was opened")
				}
				<-tn.donec
				if took := time.Since(begin); took > closeGrace {
					t.Errorf("the tunnel ended after %v", took)
				}
				m.close()
			})
		})
	}
}

// A request that is read while its tunnel ends leaves nothing behind.
func TestRequestOnAnEndedTunnel(t *testing.T) {
	bubble(t, func(t *testing.T) {
		account := ledger.New(ledger.DefaultLimits()).Pod("server")
		acc := make(chan *Stream, 1)
		m := newMesh(t, meshConfig{Dial: memPair, Handler: acceptTo(acc), Server: ServerConfig{Account: account}})
		_, s := streamPair(t, m, acc)
		tn := s.t
		m.close()
		if err := tn.in.newRequest(3, &head{method: "CONNECT", authority: "a:1"}, false); err != nil {
			t.Errorf("newRequest: %v", err)
		}
		synctest.Wait()
		if n := account.InUse(ledger.Streams); len(tn.streams) != 0 || len(acc) != 0 || n != 0 {
			t.Errorf("%d streams, %d of them served, %d accounted for on a tunnel that has ended", len(tn.streams), len(acc), n)
		}
	})
}

// Who waits for a certificate has no connection open meanwhile, which would count against the peer's handshakes.
func TestCertificateComesBeforeTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		away := errors.New("the CA is away")
		d := NewDialer(DialerConfig{
			TLS: func(ctx context.Context, _ Key) (*tls.Config, error) { <-ctx.Done(); return nil, away },
			DialTransport: func(context.Context, Key) (net.Conn, error) {
				t.Error("dialled without a certificate")
				return nil, syscall.ECONNREFUSED
			},
		})
		begin := time.Now()
		_, _, err := d.Connect(t.Context(), Key{Addr: netip.MustParseAddrPort("192.0.2.2:15008")}, ConnectRequest{Authority: "a:1"})
		if de, ok := errors.AsType[*DialError](err); !ok || de.Stage != StageTLS || !errors.Is(err, away) || time.Since(begin) != d.cfg.HandshakeTimeout {
			t.Errorf("connect: %v after %v", err, time.Since(begin))
		}
		_ = d.Close()
	})
}
