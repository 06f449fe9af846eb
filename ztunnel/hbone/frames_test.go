package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// framer is the other side of a tunnel, spoken in frames by another implementation. Every expectation says why.
type framer struct {
	t    *testing.T
	conn *tls.Conn
	raw  *memnet.Conn
	*http2.Framer
	hbuf bytes.Buffer
	henc *hpack.Encoder
}

func newFramer(t *testing.T, raw *memnet.Conn, conn *tls.Conn) *framer {
	f := &framer{t: t, conn: conn, raw: raw, Framer: http2.NewFramer(conn, conn)}
	f.henc = hpack.NewEncoder(&f.hbuf)
	f.ReadMetaHeaders = hpack.NewDecoder(0, nil)
	f.SetMaxReadFrameSize(1 << 20)
	return f
}

// testServer is a Server spoken to in frames. It must be made inside a synctest bubble.
type testServer struct {
	*framer
	srv  *Server
	errc chan error // ServeConn's result
}

func newTestServer(t *testing.T, cfg ServerConfig) *testServer {
	t.Helper()
	p := testPKI()
	cfg.TLS = func(context.Context, netip.AddrPort) (*tls.Config, error) { return p.serverConfig(), nil }
	if cfg.Handler == nil {
		cfg.Handler = func(_ context.Context, r *Request) {
			if s, err := r.Accept(); err == nil {
				_, _ = io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{s})
				_ = s.Close()
			}
		}
	}
	cfg.AmbitRecords = ambitLayer
	srv := NewServer(cfg)
	c, s := memnet.Pipe()
	ts := &testServer{srv: srv, errc: make(chan error, 1)}
	go func() { ts.errc <- srv.ServeConn(context.Background(), s) }()
	conn := tls.Client(c, p.clientConfig())
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	ts.framer = newFramer(t, c, conn)
	return ts
}

// hello sends the preface and returns the server's SETTINGS, which are not acknowledged.
func (ts *testServer) hello() *http2.SettingsFrame {
	ts.t.Helper()
	_, _ = io.WriteString(ts.conn, http2.ClientPreface)
	ts.ok(ts.WriteSettings())
	sf, ok := ts.next("server's SETTINGS").(*http2.SettingsFrame)
	if !ok {
		ts.t.Fatal("first frame is not SETTINGS")
	}
	return sf
}

// greet completes the preface and checks what the server announces.
func (ts *testServer) greet() {
	ts.t.Helper()
	sf := ts.hello()
	for id, want := range map[http2.SettingID]uint32{
		http2.SettingHeaderTableSize: 0, http2.SettingMaxConcurrentStreams: 200, http2.SettingMaxFrameSize: 1 << 20,
		http2.SettingMaxHeaderListSize: 64 << 10, http2.SettingInitialWindowSize: 64 << 10, http2.SettingEnableConnectProtocol: 1,
	} {
		if got, ok := sf.Value(id); !ok || got != want {
			ts.t.Errorf("SETTINGS %v = %d, want %d", id, got, want)
		}
	}
	if wu, ok := ts.next("connection window").(*http2.WindowUpdateFrame); !ok || wu.StreamID != 0 || wu.Increment != 16<<20-65535 {
		ts.t.Errorf("want WINDOW_UPDATE of the connection to 16 MiB, got %v", wu)
	}
	if ack, ok := ts.next("ack").(*http2.SettingsFrame); !ok || !ack.IsAck() {
		ts.t.Error("want SETTINGS ack")
	}
	ts.ok(ts.WriteSettingsAck())
}

func (f *framer) ok(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *framer) next(why string) http2.Frame {
	f.t.Helper()
	fr, err := f.ReadFrame()
	if err != nil {
		f.t.Fatalf("%s: %v", why, err)
	}
	return fr
}

func (f *framer) block(kv ...string) []byte {
	f.hbuf.Reset()
	for i := 0; i < len(kv); i += 2 {
		f.ok(f.henc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]}))
	}
	return bytes.Clone(f.hbuf.Bytes())
}

func (f *framer) request(id uint32, kv ...string) {
	f.t.Helper()
	f.ok(f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: f.block(kv...), EndHeaders: true}))
}

func (f *framer) connect(id uint32) { f.request(id, ":method", "CONNECT", ":authority", "10.0.0.1:80") }

// wantGoAway reads to the GOAWAY and checks its code.
func (f *framer) wantGoAway(why string, code http2.ErrCode) {
	f.t.Helper()
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			f.t.Errorf("%s: %v, want GOAWAY %v", why, err, code)
			return
		}
		if ga, ok := fr.(*http2.GoAwayFrame); ok {
			if ga.ErrCode != code {
				f.t.Fatalf("%s: GOAWAY %v %q, want %v", why, ga.ErrCode, ga.DebugData(), code)
			}
			return
		}
	}
}

// wantStatus reads to the response of a stream.
func (f *framer) wantStatus(why string, id uint32, status string) *http2.MetaHeadersFrame {
	f.t.Helper()
	for {
		switch fr := f.next(why).(type) {
		case *http2.MetaHeadersFrame:
			if fr.StreamID != id || fr.PseudoValue("status") != status {
				f.t.Fatalf("%s: stream %d status %s, want stream %d status %s", why, fr.StreamID, fr.PseudoValue("status"), id, status)
			}
			return fr
		case *http2.WindowUpdateFrame, *http2.SettingsFrame:
		default:
			f.t.Fatalf("%s: %v", why, fr)
		}
	}
}

// wantReset reads to RST_STREAM of a stream.
func (f *framer) wantReset(why string, id uint32, code http2.ErrCode) {
	f.t.Helper()
	for {
		if fr, ok := f.next(why).(*http2.RSTStreamFrame); ok {
			if fr.StreamID != id || fr.ErrCode != code {
				f.t.Fatalf("%s: RST_STREAM %d %v, want %d %v", why, fr.StreamID, fr.ErrCode, id, code)
			}
			return
		}
	}
}

// end closes from outside and waits for ServeConn.
func (ts *testServer) end() error {
	_ = ts.raw.Close()
	err := <-ts.errc
	_ = ts.srv.Close()
	return err
}

func bubble(t *testing.T, f func(t *testing.T)) {
	testPKI() // once, outside
	synctest.Test(t, f)
}

func TestServerAnswersConnect(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ts := newTestServer(t, ServerConfig{})
		ts.greet()
		ts.connect(1)
		if ts.wantStatus("CONNECT", 1, "200").StreamEnded() {
			t.Error("200 ended the stream")
		}
		ts.ok(ts.WriteDataPadded(1, false, []byte("echo"), make([]byte, 10)))
		for {
			if df, ok := ts.next("echo").(*http2.DataFrame); ok {
				if string(df.Data()) != "echo" {
					t.Errorf("echo is %q", df.Data())
				}
				break
			}
		}
		ts.ok(ts.WriteData(1, true, nil))
		if df, ok := ts.next("half-close comes back").(*http2.DataFrame); !ok || !df.StreamEnded() {
			t.Error("want END_STREAM")
		}
		if err := ts.end(); err != nil {
			t.Errorf("orderly end: %v", err)
		}
	})
}

func TestServerRejects(t *testing.T) {
	for _, tt := range []struct {
		name, status string
		reset        http2.ErrCode
		headers      []string
	}{
		{"GET", "400", 0, []string{":method", "GET", ":scheme", "https", ":authority", "10.0.0.1:80", ":path", "/"}},
		{"no authority", "400", 0, []string{":method", "CONNECT"}},
		{"extended connect", "400", 0, []string{":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":path", "/", ":authority", "a:1"}},
		{"path with CONNECT", "", http2.ErrCodeProtocol, []string{":method", "CONNECT", ":authority", "a:1", ":path", "/", ":scheme", "https"}},
		{"pseudo after regular", "", http2.ErrCodeProtocol, []string{":method", "CONNECT", "x", "y", ":authority", "a:1"}},
		{"two authorities", "", http2.ErrCodeProtocol, []string{":method", "CONNECT", ":authority", "a:1", ":authority", "b:1"}},
		{"upper case", "", http2.ErrCodeProtocol, []string{":method", "CONNECT", ":authority", "a:1", "Upper", "y"}},
		{"newline", "", http2.ErrCodeProtocol, []string{":method", "CONNECT", ":authority", "a:1", "x", "a\nb"}},
		{"connection header", "", http2.ErrCodeProtocol, []string{":method", "CONNECT", ":authority", "a:1", "connection", "close"}},
		{"list too large", "431", 0, []string{":method", "CONNECT", ":authority", "a:1", "a", string(repeated('x', 30000)), "b", string(repeated('y', 30000)), "c", string(repeated('z', 30000))}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				ts := newTestServer(t, ServerConfig{})
				ts.greet()
				block := ts.block(tt.headers...)
				first := block[:min(len(block), 16000)]
				ts.ok(ts.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: first, EndHeaders: len(first) == len(block)}))
				for rest := block[len(first):]; len(rest) > 0; {
					k := min(len(rest), 16000)
					ts.ok(ts.WriteContinuation(1, k == len(rest), rest[:k]))
					rest = rest[k:]
				}
				if tt.status != "" {
					if !ts.wantStatus(tt.name, 1, tt.status).StreamEnded() {
						t.Error("error answer does not end the stream")
					}
				} else {
					ts.wantReset(tt.name, 1, tt.reset)
				}
				ts.connect(3)
				ts.wantStatusAfterReset("the tunnel lives on", 3)
				_ = ts.end()
			})
		})
	}
}

func repeated(c byte, n int) []byte { return bytes.Repeat([]byte{c}, n) }

func (f *framer) wantStatusAfterReset(why string, id uint32) {
	f.t.Helper()
	for {
		if fr, ok := f.next(why).(*http2.MetaHeadersFrame); ok && fr.StreamID == id {
			return
		}
	}
}

// Each breach of protocol ends the tunnel with the right code, and ServeConn says so.
func TestServerFaults(t *testing.T) {
	raw := func(typ http2.FrameType, flags http2.Flags, id uint32, p []byte) func(ts *testServer) {
		return func(ts *testServer) { ts.ok(ts.WriteRawFrame(typ, flags, id, p)) }
	}
	for _, tt := range []struct {
		name string
		code http2.ErrCode
		do   func(ts *testServer)
	}{
		{"frame over 1 MiB", http2.ErrCodeFrameSize, func(ts *testServer) {
			_, _ = ts.conn.Write([]byte{0x20, 0, 0, 0, 0, 0, 0, 0, 1})
		}},
		{"PING of 7", http2.ErrCodeFrameSize, raw(http2.FramePing, 0, 0, make([]byte, 7))},
		{"PING on stream", http2.ErrCodeProtocol, raw(http2.FramePing, 0, 1, make([]byte, 8))},
		{"SETTINGS of 5", http2.ErrCodeFrameSize, raw(http2.FrameSettings, 0, 0, make([]byte, 5))},
		{"window of SETTINGS", http2.ErrCodeFlowControl, raw(http2.FrameSettings, 0, 0, []byte{0, 4, 0xff, 0xff, 0xff, 0xff})},
		{"frame size of SETTINGS", http2.ErrCodeProtocol, raw(http2.FrameSettings, 0, 0, []byte{0, 5, 0, 0, 0, 1})},
		{"DATA on idle stream", http2.ErrCodeProtocol, raw(http2.FrameData, 0, 1, []byte("x"))},
		{"RST on idle stream", http2.ErrCodeProtocol, raw(http2.FrameRSTStream, 0, 1, make([]byte, 4))},
		{"WINDOW_UPDATE of 0", http2.ErrCodeProtocol, raw(http2.FrameWindowUpdate, 0, 0, make([]byte, 4))},
		{"connection window overflow", http2.ErrCodeFlowControl, raw(http2.FrameWindowUpdate, 0, 0, []byte{0x7f, 0xff, 0xff, 0xff})},
		{"PUSH_PROMISE", http2.ErrCodeProtocol, raw(http2.FramePushPromise, 4, 1, make([]byte, 4))},
		{"even stream", http2.ErrCodeProtocol, func(ts *testServer) { ts.connect(2) }},
		{"CONTINUATION alone", http2.ErrCodeProtocol, raw(http2.FrameContinuation, 4, 1, nil)},
		{"interrupted block", http2.ErrCodeProtocol, func(ts *testServer) {
			ts.ok(ts.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: ts.block(":method", "CONNECT")}))
			ts.ok(ts.WritePing(false, [8]byte{}))
		}},
		{"bad header block", http2.ErrCodeCompression, func(ts *testServer) {
			ts.ok(ts.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, EndHeaders: true}))
		}},
		{"padding beyond frame", http2.ErrCodeProtocol, func(ts *testServer) {
			ts.connect(1)
			ts.ok(ts.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{9, 1, 2}))
		}},
		{"CONTINUATION flood", http2.ErrCodeEnhanceYourCalm, func(ts *testServer) {
			ts.ok(ts.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: ts.block(":method", "CONNECT")}))
			for range 100 {
				if ts.WriteContinuation(1, false, nil) != nil {
					return
				}
			}
		}},
		{"PING flood unread", http2.ErrCodeEnhanceYourCalm, func(ts *testServer) {
			for range floodLimit + 10 {
				if ts.WritePing(false, [8]byte{1}) != nil {
					return
				}
			}
		}},
		{"rapid reset", http2.ErrCodeEnhanceYourCalm, func(ts *testServer) {
			// Where handlers are slow to leave, most are refused and counted as frames that move nothing.
			for id := uint32(1); id < 2*floodLimit; id += 2 {
				head := http2.HeadersFrameParam{StreamID: id, BlockFragment: ts.block(":method", "CONNECT", ":authority", "10.0.0.1:80"), EndHeaders: true}
				if ts.WriteHeaders(head) != nil || ts.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
					return
				}
			}
		}},
		{"unknown frames flood", http2.ErrCodeEnhanceYourCalm, func(ts *testServer) {
			for range floodLimit + 10 {
				if ts.WriteRawFrame(0x77, 0, 0, nil) != nil {
					return
				}
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				ts := newTestServer(t, ServerConfig{Handler: func(ctx context.Context, r *Request) { <-ctx.Done() }})
				ts.greet()
				ts.raw.SetBuffer(64 << 20) // what the server answers may wait unread, and so may our flood
				go tt.do(ts)
				ts.wantGoAway(tt.name, tt.code)
				err := <-ts.errc
				if ce, ok := errors.AsType[*ConnError](err); !ok || uint32(ce.Code) != uint32(tt.code) {
					t.Errorf("ServeConn: %v, want a ConnError %v", err, tt.code)
				}
				_ = ts.hangUp()
			})
		})
	}
}

// hangUp closes from outside when ServeConn's result is known or does not matter.
func (ts *testServer) hangUp() error {
	_ = ts.raw.Close()
	return ts.srv.Close()
}

func TestServerStreamFlowControl(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ts := newTestServer(t, ServerConfig{Handler: func(ctx context.Context, r *Request) {
			s, _ := r.Accept()
			<-ctx.Done()
			_ = s.Close()
		}})
		ts.greet()
		ts.raw.SetBuffer(1 << 20)
		ts.connect(1)
		ts.wantStatus("CONNECT", 1, "200")
		for range startWindow / 16384 {
			ts.ok(ts.WriteData(1, false, make([]byte, 16384)))
		}
		ts.ok(ts.WriteData(1, false, []byte("x")))
		ts.wantReset("one byte too many", 1, http2.ErrCodeFlowControl)
		_ = ts.hangUp()
	})
}

func TestServerRefusesStreamsOverLimit(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reg := prometheus.NewPedanticRegistry()
		ts := newTestServer(t, ServerConfig{Registerer: reg, Handler: func(ctx context.Context, r *Request) { <-ctx.Done() }})
		ts.greet()
		for i := range uint32(201) {
			ts.connect(2*i + 1)
		}
		ts.wantReset("stream 201", 401, http2.ErrCodeRefusedStream)
		wantRefused(t, reg, "draining 0, exhausted 0, limit 1")
		_ = ts.hangUp()
	})
}

// What is refused for want of room the node that refuses tells, too.
func TestServerRefusesStreamsWithoutRoom(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reg, limits := prometheus.NewPedanticRegistry(), ledger.DefaultLimits()
		limits[ledger.Streams] = 1
		ts := newTestServer(t, ServerConfig{Registerer: reg, Account: ledger.New(limits).Pod("pod"), Handler: func(ctx context.Context, r *Request) { <-ctx.Done() }})
		ts.greet()
		ts.connect(1)
		ts.connect(3)
		ts.wantReset("stream 2", 3, http2.ErrCodeRefusedStream)
		wantRefused(t, reg, "draining 0, exhausted 1, limit 0")
		_ = ts.hangUp()
	})
}

func wantRefused(t *testing.T, reg prometheus.Gatherer, want string) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		if f.GetName() == "ambit_ztunnel_hbone_refused_streams_total" {
			for _, m := range f.GetMetric() {
				got = append(got, fmt.Sprint(m.GetLabel()[0].GetValue(), " ", m.GetCounter().GetValue()))
			}
		}
	}
	if s := strings.Join(got, ", "); s != want {
		t.Errorf("refused: %s; want %s", s, want)
	}
}

func TestServerShutdownDrains(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ts := newTestServer(t, ServerConfig{})
		ts.greet()
		ts.connect(1)
		ts.wantStatus("CONNECT", 1, "200")
		donec := make(chan error)
		go func() { donec <- ts.srv.Shutdown(context.Background()) }()
		next := func(why string) http2.Frame {
			for {
				if fr := ts.next(why); fr.Header().Type != http2.FrameWindowUpdate {
					return fr
				}
			}
		}
		if ga, ok := next("first GOAWAY").(*http2.GoAwayFrame); !ok || ga.LastStreamID != 1<<31-1 || ga.ErrCode != 0 {
			t.Fatalf("want GOAWAY 2^31-1, got %v", ga)
		}
		ping, ok := next("PING").(*http2.PingFrame)
		if !ok {
			t.Fatal("want PING")
		}
		ts.connect(3) // crossed the GOAWAY
		ts.wantStatusAfterReset("a stream opened before the PING's answer is served", 3)
		ts.ok(ts.WritePing(true, ping.Data))
		ts.connect(5) // waited to be sent while the PING was read, and its answer went first
		if ping, ok = next("second PING").(*http2.PingFrame); !ok {
			t.Fatal("want a second PING")
		}
		ts.wantStatusAfterReset("a stream that follows the first PING's answer is served", 5)
		ts.ok(ts.WritePing(true, ping.Data))
		if ga, ok := next("final GOAWAY").(*http2.GoAwayFrame); !ok || ga.LastStreamID != 5 {
			t.Fatalf("want GOAWAY 5, got %v", ga)
		}
		ts.ok(ts.WritePing(true, ping.Data)) // nobody asked again
		ts.connect(7)
		ts.ok(ts.WriteData(7, false, []byte("early"))) // with the CONNECT, before its client knew
		ts.wantReset("stream after the final GOAWAY", 7, http2.ErrCodeRefusedStream)
		ts.ok(ts.WriteData(1, true, nil))
		ts.ok(ts.WriteData(3, true, []byte("bye")))
		ts.ok(ts.WriteData(5, true, nil))
		for ended := 0; ended < 3; {
			if df, ok := next("streams go on to their end").(*http2.DataFrame); ok && df.StreamEnded() {
				ended++
			}
		}
		if err := <-donec; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-ts.errc; err != nil {
			t.Errorf("ServeConn: %v", err)
		}
		_ = ts.raw.Close()
	})
}

func TestServerCutsWhoDoesNotSpeak(t *testing.T) {
	for name, do := range map[string]func(c *memnet.Conn){
		"garbage":       func(c *memnet.Conn) { _, _ = c.Write(bytes.Repeat([]byte("garbage "), 100)) },
		"plain http":    func(c *memnet.Conn) { _, _ = c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")) },
		"silence":       func(c *memnet.Conn) {},
		"slow loris":    func(c *memnet.Conn) { slowly(c, []byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}) },
		"close at once": func(c *memnet.Conn) { _ = c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				p := testPKI()
				srv := NewServer(ServerConfig{TLS: func(context.Context, netip.AddrPort) (*tls.Config, error) { return p.serverConfig(), nil }})
				c, s := memnet.Pipe()
				begin := time.Now()
				var wg sync.WaitGroup
				defer wg.Wait()
				wg.Go(func() { do(c) })
				err := srv.ServeConn(context.Background(), s)
				if se, ok := errors.AsType[*ServeError](err); !ok || se.Stage != StageTLS {
					t.Errorf("ServeConn: %v, want a ServeError of stage tls", err)
				}
				if took := time.Since(begin); took > 10*time.Second {
					t.Errorf("took %v, the handshake may take 10s", took)
				}
				_ = c.Close()
				_ = srv.Close()
			})
		})
	}
}

// slowly sends a byte a second.
func slowly(c net.Conn, p []byte) {
	for i := range p {
		if _, err := c.Write(p[i : i+1]); err != nil {
			return
		}
		time.Sleep(time.Second) // the bubble's
	}
}

func TestServerCutsSilentPreface(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ts := newTestServer(t, ServerConfig{})
		go io.Copy(io.Discard, ts.conn)
		if err := <-ts.errc; err == nil {
			t.Error("a client that says nothing after TLS was served")
		}
		_ = ts.hangUp()
	})
}

func TestKeepaliveCutsSilentPeer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ts := newTestServer(t, ServerConfig{})
		ts.greet()
		begin := time.Now()
		if ping, ok := ts.next("PING after silence").(*http2.PingFrame); !ok || ping.IsAck() {
			t.Fatal("want PING")
		}
		ts.ok(ts.WritePing(true, [8]byte{}))
		if _, ok := ts.next("next PING").(*http2.PingFrame); !ok {
			t.Fatal("want PING")
		}
		if err := <-ts.errc; !errors.Is(err, errPingTimeout) {
			t.Errorf("ServeConn: %v, want the PING timeout", err)
		}
		if took := time.Since(begin); took > 70*time.Second {
			t.Errorf("took %v", took)
		}
		_ = ts.hangUp()
	})
}
