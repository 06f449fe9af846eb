package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
)

// io.EOF from a record layer is the peer's word, close_notify. An end of the transport is not, wherever it falls.
func TestRecordsTellEndFromCutOff(t *testing.T) {
	p := testPKI()
	for name, pair := range map[string]func(context.Context) (net.Conn, net.Conn, error){"tcp": tcpPair, "memnet": memPair} {
		for _, notify := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				c, s, err := pair(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				peer := tls.Server(s, p.serverConfig())
				var wg sync.WaitGroup
				defer wg.Wait()
				wg.Go(func() {
					_, _ = peer.Write([]byte("half an answer"))
					if notify {
						_ = peer.Close()
					}
					_ = s.Close()
				})
				rc, _, err := clientRecords(t.Context(), c, p.clientConfig(), ambitLayer, nil)
				if err != nil {
					t.Fatal(err)
				}
				got := ""
				for {
					var b []byte
					if err = rc.Fill(); err == nil {
						b, _, err = rc.Next()
						got += string(b)
					}
					if err != nil {
						break
					}
				}
				if got != "half an answer" || notify && err != io.EOF || !notify && (err == io.EOF || !errors.Is(err, io.ErrUnexpectedEOF)) {
					t.Errorf("close_notify %v: read %q, %v", notify, got, err)
				}
			})
		}
	}
}

// A stream without END_STREAM is cut short, however its tunnel ends: its reader must not take it for a whole one. One
// that had END_STREAM is whole, whatever happens to the tunnel then.
func TestTunnelEndIsNoStreamEnd(t *testing.T) {
	for _, notify := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			errc := make(chan error, 2)
			ts := newTestServer(t, ServerConfig{Handler: func(_ context.Context, r *Request) {
				s, err := r.Accept()
				if err == nil {
					_, err = io.ReadAll(struct{ io.Reader }{s})
					_ = s.Close()
				}
				errc <- err
			}})
			ts.greet()
			ts.connect(1)
			ts.wantStatus("whole stream", 1, "200")
			ts.ok(ts.WriteData(1, true, []byte("whole")))
			if err := <-errc; err != nil {
				t.Errorf("whole stream: %v", err)
			}
			ts.connect(3)
			go ts.drainInput()
			ts.ok(ts.WriteData(3, false, []byte("half")))
			if notify {
				_ = ts.conn.CloseWrite()
			}
			_ = ts.raw.CloseWrite()
			err := <-errc
			if err == nil || !errors.Is(err, io.ErrUnexpectedEOF) || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("close_notify %v: half a stream ends with %v", notify, err)
			}
			if err := <-ts.errc; err == nil {
				t.Errorf("close_notify %v: the tunnel ended in order", notify)
			}
			_ = ts.raw.Close()
		})
	}
}

// Keys change while many streams write: each key protects a few records only, and crypto/tls as the peer follows.
func TestKeysChangeUnderLoad(t *testing.T) {
	m, acc := newPairs(t, tcpPair)
	m.Dialer.cfg.AmbitRecords, m.srv.cfg.AmbitRecords = true, false
	m.Dialer.cfg.MaxTunnels = 1
	const streams, size = 8, 1 << 20
	var wg sync.WaitGroup
	for i := range streams {
		c, s := streamPair(t, m, acc)
		if i == 0 {
			rc, ok := c.t.rc.(*ambitRecords)
			if !ok {
				t.Skip("crypto/tls only, as in FIPS mode")
			}
			rc.mu.Lock()
			rc.out.LimitKey(5)
			rc.mu.Unlock()
		}
		data := make([]byte, size)
		for k := range data {
			data[k] = byte(i + k*k>>8)
		}
		wg.Go(func() {
			for p := data; len(p) > 0; {
				k := min(len(p), 1+(len(p)*7+i)%50000)
				if _, err := c.Write(p[:k]); err != nil {
					t.Error(err)
					break
				}
				p = p[k:]
			}
			_ = c.CloseWrite()
			if _, err := io.ReadAll(c); err != nil {
				t.Errorf("answer: %v", err)
			}
			_ = c.Close()
		})
		wg.Go(func() {
			got, err := io.ReadAll(s)
			if err != nil || string(got) != string(data) {
				t.Errorf("stream %d: %d bytes of %d, %v, or others", i, len(got), len(data), err)
			}
			_ = s.Close()
		})
	}
	wg.Wait()
	if n := m.dialled(); n != 1 {
		t.Errorf("%d tunnels, want one", n)
	}
}
