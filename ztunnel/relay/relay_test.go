package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/test/sockets"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

func TestMain(m *testing.M) {
	if addrs := os.Getenv(relayTo); addrs != "" {
		relayProcess(addrs)
	}
	// Idle pipes are kept on purpose; the leak check is for the rest.
	before := leak.Descriptors()
	code := m.Run()
	pipes.drain()
	if left := leak.Check(before); left != "" && code == 0 {
		println(left)
		code = 1
	}
	os.Exit(code)
}

// drain closes idle pipes.
func (pp *pipePool) drain() {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	for _, p := range pp.idle {
		p.close()
	}
	pp.idle = nil
}

type pair func(t *testing.T) (outer, inner Conn)

func tcpPair(t *testing.T) (Conn, Conn) { return sockets.Pair(t) }

func memPair(*testing.T) (Conn, Conn) {
	a, b := memnet.Pipe()
	return a, b
}

// ways are those to copy: one suite, all implementations.
var ways = []struct {
	name string
	a, b pair
}{{"splice", tcpPair, tcpPair}, {"buffered", memPair, memPair}, {"mixed", tcpPair, memPair}}

// each runs a test over every way to copy.
func each(t *testing.T, f func(t *testing.T, client, server Conn, st *Stats, join func() error)) {
	for _, tt := range ways {
		t.Run(tt.name, func(t *testing.T) {
			client, a := tt.a(t)
			server, b := tt.b(t)
			st := new(Stats)
			errc := make(chan error, 1)
			go func() { errc <- Join(t.Context(), a, b, st) }()
			f(t, client, server, st, sync.OnceValue(func() error { return <-errc }))
			_, _ = client.Close(), server.Close()
		})
	}
}

func TestJoinHalfCloses(t *testing.T) {
	each(t, func(t *testing.T, client, server Conn, st *Stats, join func() error) {
		question, answer := bytes.Repeat([]byte("question"), 1<<17), bytes.Repeat([]byte("answer"), 1<<16)
		go func() {
			_, _ = client.Write(question)
			_ = client.CloseWrite()
		}()
		if got, err := io.ReadAll(server); !bytes.Equal(got, question) || err != nil {
			t.Fatalf("server read %d bytes, %v", len(got), err)
		}
		go func() {
			_, _ = server.Write(answer)
			_ = server.CloseWrite()
		}()
		if got, err := io.ReadAll(client); !bytes.Equal(got, answer) || err != nil {
			t.Fatalf("client read %d bytes, %v", len(got), err)
		}
		if err := join(); err != nil {
			t.Errorf("Join: %v", err)
		}
		if s, r := st.Sent.Load(), st.Received.Load(); s != uint64(len(question)) || r != uint64(len(answer)) {
			t.Errorf("counted %d and %d", s, r)
		}
	})
}

func resetConn(c Conn) { Reset(c) }

func TestJoinCarriesReset(t *testing.T) {
	each(t, func(t *testing.T, client, server Conn, _ *Stats, join func() error) {
		if _, err := client.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		resetConn(server)
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("client read: %v, want ECONNRESET", err)
		}
		if err := join(); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Join: %v, want ECONNRESET", err)
		}
	})
}

func TestJoinIsCut(t *testing.T) {
	client, a := tcpPair(t)
	server, b := memPair(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("policy changed")
	cancel(why)
	if err := Join(ctx, a, b, nil); !errors.Is(err, why) {
		t.Errorf("Join: %v, want the cause", err)
	}
	for _, c := range []Conn{client, server} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read after cut: %v, want ECONNRESET", err)
		}
		_ = c.Close()
	}
}

// While a pair is idle it holds no pipe: the process has the descriptors that it had before the first byte.
func TestJoinIdleHoldsNothing(t *testing.T) {
	client, a := tcpPair(t)
	server, b := tcpPair(t)
	parked.mu.Lock()
	_ = parked.openLocked() // stays, whoever parks first; a failure shows below
	parked.mu.Unlock()
	pipes.drain()
	before := descriptors(t)
	done := make(chan error)
	go func() { done <- Join(t.Context(), a, b, nil) }()
	for _, way := range [][2]Conn{{client, server}, {server, client}} {
		if _, err := way[0].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(way[1], make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	for range 1 << 16 { // both directions have yet to find their sockets empty
		pipes.drain()
		if n = descriptors(t); n <= before {
			break
		}
		runtime.Gosched()
	}
	if n > before {
		t.Errorf("%d descriptors while idle, %d before", n, before)
	}
	_, _ = client.CloseWrite(), server.CloseWrite()
	if err := <-done; err != nil {
		t.Error(err)
	}
	_, _ = client.Close(), server.Close()
}

func descriptors(t *testing.T) int {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// waiting is a side that has waited and has a socket below.
type waiting struct{ Conn }

func (waiting) Waits() (stream, tunnel, queue time.Duration) { return 1, 2, 3 }

func (waiting) TCPInfo() (sockopt.TCPInfo, bool) { return sockopt.TCPInfo{Retransmits: 4}, true }

// Join leaves behind where the time went: what tunnels waited for, and whose socket took no more.
func TestJoinTellsWhereTimeWent(t *testing.T) {
	client, a := tcpPair(t)
	server, b := memPair(t)
	st := new(Stats)
	donec := make(chan error, 1)
	go func() { donec <- Join(t.Context(), a, waiting{b}, st) }()
	go func() {
		data := make([]byte, 64<<10)
		for { // until nobody takes it any more
			if _, err := server.Write(data); err != nil {
				return
			}
		}
	}()
	for { // the client does not read
		if info, err := sockopt.Info(a.(*net.TCPConn)); err != nil || info.RwndLimited > 0 {
			break
		}
	}
	resetConn(client)
	if err := <-donec; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("Join: %v", err)
	}
	_ = server.Close()
	tm := st.Times
	if tm.A.RwndLimited == 0 || tm.A.Busy < tm.A.RwndLimited {
		t.Errorf("a did not read, and its socket says %+v", tm.A)
	}
	if tm.Stream != 1 || tm.Tunnel != 2 || tm.Queue != 3 || tm.B.Retransmits != 4 || tm.Began.IsZero() {
		t.Errorf("b: %+v", tm)
	}
}

func TestSockoptReset(t *testing.T) {
	a, b := tcpPair(t)
	if err := sockopt.Reset(a.(*net.TCPConn)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want ECONNRESET", err)
	}
	_ = b.Close()
}

// TestUntimed: sockets are not asked what nobody reads.
func TestUntimed(t *testing.T) {
	for _, untimed := range []bool{false, true} {
		st := Stats{Untimed: untimed}
		a, app := tcpPair(t)
		b, peer := tcpPair(t)
		donec := make(chan error, 1)
		go func() { donec <- Join(t.Context(), a, b, &st) }()
		_, _ = app.Write([]byte("x"))
		if _, err := peer.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		_, _ = app.Close(), peer.Close()
		if err := <-donec; err != nil {
			t.Fatal(err)
		}
		if asked := st.Times.A.RTT != 0; asked == untimed || st.Times.Began.IsZero() {
			t.Errorf("untimed %v: %+v", untimed, st.Times)
		}
	}
}
