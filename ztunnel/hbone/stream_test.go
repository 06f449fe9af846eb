package hbone

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/net/nettest"

	"github.com/ambit-mesh/ambit/test/memnet"
)

func memPair(context.Context) (net.Conn, net.Conn, error) {
	c, s := memnet.Pipe()
	return c, s, nil
}

// streamPair opens one stream and returns both ends of it.
func streamPair(tb testing.TB, m *mesh, accepted <-chan *Stream) (client, server *Stream) {
	tb.Helper()
	c, _, err := m.Connect(tb.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80"})
	if err != nil {
		tb.Fatal(err)
	}
	return c, <-accepted
}

// acceptTo is a handler that hands accepted streams over.
func acceptTo(c chan<- *Stream) Handler {
	return func(ctx context.Context, r *Request) {
		s, err := r.Accept()
		if err == nil {
			c <- s
		}
	}
}

func newPairs(tb testing.TB, dial func(context.Context) (net.Conn, net.Conn, error)) (*mesh, <-chan *Stream) {
	acc := make(chan *Stream, 1000)
	return newMesh(tb, meshConfig{Dial: dial, Handler: acceptTo(acc)}), acc
}

func TestStreamIsNetConn(t *testing.T) {
	for name, dial := range map[string]func(context.Context) (net.Conn, net.Conn, error){"tcp": tcpPair, "memnet": memPair} {
		t.Run(name, func(t *testing.T) {
			nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
				acc := make(chan *Stream, 1)
				m := newMesh(t, meshConfig{Dial: dial, Handler: acceptTo(acc)})
				a, b := streamPair(t, m, acc)
				return a, b, func() { _ = a.Close(); _ = b.Close(); m.close() }, nil
			})
		})
	}
}

func TestStreamHalfCloses(t *testing.T) {
	m, acc := newPairs(t, tcpPair)
	c, s := streamPair(t, m, acc)
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(s); string(got) != "question" || err != nil {
		t.Fatalf("server read %q, %v: want the question and EOF", got, err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write after CloseWrite: %v, want EPIPE", err)
	}
	if _, err := s.Write([]byte("answer")); err != nil {
		t.Fatalf("write on half-closed stream: %v", err)
	}
	_ = s.Close()
	if got, err := io.ReadAll(c); string(got) != "answer" || err != nil {
		t.Fatalf("client read %q, %v: want the answer and EOF", got, err)
	}
	_ = c.Close()
}

func TestStreamResetReachesPeer(t *testing.T) {
	m, acc := newPairs(t, tcpPair)
	for _, side := range []string{"client", "server"} {
		c, s := streamPair(t, m, acc)
		if side == "server" {
			c, s = s, c
		}
		if _, err := c.Write([]byte("last words")); err != nil {
			t.Fatal(err)
		}
		if err := c.Reset(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(s)
		if string(got) != "last words" || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s reset: peer read %q, %v: want the data and ECONNRESET", side, got, err)
		}
		if _, err := s.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s reset: peer wrote with %v, want ECONNRESET", side, err)
		}
		_ = s.Close()
	}
}

// A peer that closes without reading to the end says CANCEL: an end to our reader, a closed pipe to our writer.
func TestStreamCloseReachesWriter(t *testing.T) {
	m, acc := newPairs(t, tcpPair)
	c, s := streamPair(t, m, acc)
	_ = s.Close()
	if got, err := io.ReadAll(c); len(got) != 0 || err != nil {
		t.Errorf("read %q, %v: want EOF", got, err)
	}
	var err error
	for err == nil {
		_, err = c.Write(make([]byte, 1024))
	}
	if !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write: %v, want EPIPE", err)
	}
	_ = c.Close()
}

func TestStreamCarriesAllSizes(t *testing.T) {
	for name, dial := range map[string]func(context.Context) (net.Conn, net.Conn, error){"tcp": tcpPair, "memnet": memPair} {
		t.Run(name, func(t *testing.T) {
			m, acc := newPairs(t, dial)
			c, s := streamPair(t, m, acc)
			var want bytes.Buffer
			var wg sync.WaitGroup
			sizes := []int{0, 1, 9, packLimit - 1, packLimit, packLimit + 1, 16374, 16375, 16376, 16384, 131063, 131064, 1 << 20, 3<<20 + 7}
			x := byte(1)
			for _, n := range sizes {
				for range n {
					x = x*5 + 3
					want.WriteByte(x)
				}
			}
			sent := bytes.Clone(want.Bytes())
			wg.Go(func() {
				off := 0
				for _, n := range sizes {
					if _, err := c.Write(sent[off : off+n]); err != nil {
						t.Error(err)
					}
					off += n
				}
				_ = c.CloseWrite()
			})
			got, err := io.ReadAll(s)
			wg.Wait()
			if err != nil || !bytes.Equal(got, want.Bytes()) {
				t.Fatalf("read %d bytes, %v: want the %d sent", len(got), err, want.Len())
			}
			_, _ = s.Close(), c.Close()
		})
	}
}

// 50 streams that nobody reads must cost only themselves: their neighbour moves many times what any window holds.
func TestUnreadStreamsDoNotBlockNeighbour(t *testing.T) {
	m, acc := newPairs(t, tcpPair)
	m.Dialer.cfg.MaxTunnels = 1
	var wg sync.WaitGroup
	defer wg.Wait()
	for range 50 {
		c, s := streamPair(t, m, acc)
		wg.Go(func() { // fills the window and blocks until the test's end
			for {
				if _, err := c.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		})
		defer s.Reset()
	}
	c, s := streamPair(t, m, acc)
	const size = 64 << 20 // four connection windows
	wg.Go(func() {
		for range size / (64 << 10) {
			if _, err := c.Write(make([]byte, 64<<10)); err != nil {
				t.Error(err)
				return
			}
		}
		_ = c.CloseWrite()
	})
	n, err := io.Copy(io.Discard, struct{ io.Reader }{s})
	if n != size || err != nil {
		t.Errorf("neighbour moved %d bytes, %v: want %d", n, err, size)
	}
	if got := m.dialled(); got != 1 {
		t.Errorf("%d tunnels, want one shared", got)
	}
	_ = s.Close()
}

func TestRelayPaths(t *testing.T) {
	m, acc := newPairs(t, tcpPair)
	c, s := streamPair(t, m, acc)
	src, app, err := tcpPair(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	defer src.Close()
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = app.Write(data)
		_ = app.(*net.TCPConn).CloseWrite()
	})
	var up, down atomic.Uint64
	wg.Go(func() {
		if rerr, werr := c.RelayFrom(src, &up); rerr != nil || werr != nil {
			t.Errorf("RelayFrom: %v, %v", rerr, werr)
		}
		_ = c.CloseWrite()
	})
	var got bytes.Buffer
	if rerr, werr := s.RelayTo(&got, &down); rerr != nil || werr != nil {
		t.Errorf("RelayTo: %v, %v", rerr, werr)
	}
	wg.Wait()
	if !bytes.Equal(got.Bytes(), data) || up.Load() != uint64(len(data)) || down.Load() != up.Load() {
		t.Errorf("relayed %d bytes, counted %d up and %d down: want %d", got.Len(), up.Load(), down.Load(), len(data))
	}
	_, _ = s.Close(), c.Close()
}
