package outbound

import (
	"errors"
	"io"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/test/sockets"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// until asks e until it has read something.
func until(e *early) string {
	for {
		if b := e.bytes(); len(b) > 0 || e.err != nil {
			return string(b)
		}
		e.buf = nil // ask again: on loopback bytes are there when the write returns, a reset a moment later
	}
}

// What was read and has not gone along with a request is the first that the way gets, once.
func TestFirstBytesAreNeitherLostNorSentTwice(t *testing.T) {
	for _, sent := range []int{0, 3, 8} {
		app, down := sockets.Pair(t)
		if _, err := app.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		e := &early{down: down}
		if got := until(e); got != "question" {
			t.Fatalf("read %q", got)
		}
		if got := string(e.bytes()); got != "question" {
			t.Errorf("asked again: %q", got)
		}
		_, table := testProxy(mesh.Empty(), func(*Config) {})
		c, ctx := table.Begin(t.Context(), flow.Record{})
		near, far := memnet.Pipe()
		r, err := e.rest(c, sent)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := e.rest(c, sent); again != nil || err != nil {
			t.Errorf("taken twice: %v, %v", again, err)
		}
		way{Conn: near, rest: r}.join(ctx, c, down, func() {})
		if err := app.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(far); string(got) != "question"[sent:] || err != nil {
			t.Errorf("%d bytes went early, then came %q, %v", sent, got, err)
		}
		if n := c.Stats.Sent.Load(); n != 8 {
			t.Errorf("%d bytes counted, want all 8", n)
		}
		_ = far.Close()
	}
}

// A reset that is met there is none of the kernel's to tell again: the next read would find an orderly end.
func TestAResetBeforeTheTunnelIsNoEnd(t *testing.T) {
	app, down := sockets.Pair(t)
	_ = app.SetLinger(0)
	_ = app.Close()
	e := &early{down: down}
	until(e)
	_, table := testProxy(mesh.Empty(), func(*Config) {})
	c, _ := table.Begin(t.Context(), flow.Record{})
	if r, err := e.rest(c, 0); r != nil || !errors.Is(err, syscall.ECONNRESET) || flow.ReasonOf(err) != flow.ReasonClientGone {
		t.Errorf("%v, want a reset by the client", err)
	}
	c.End(nil)
}

// An end stays one, and nothing is waited for.
func TestNothingSaidIsNothingSent(t *testing.T) {
	app, down := sockets.Pair(t)
	e := &early{down: down}
	if got := e.bytes(); len(got) != 0 || e.err != nil {
		t.Errorf("read %q, %v", got, e.err)
	}
	_ = app.Close()
	_ = down.SetReadDeadline(time.Now().Add(time.Minute))
	if n, err := down.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read %d, %v", n, err)
	}
	var none *early
	if r, err := none.rest(nil, 0); r != nil || err != nil {
		t.Error(r, err)
	}
}

// They wait for room as any upload does, and nothing else waits with them: a server that answers before it has read is
// heard. When the way ends meanwhile, so does their wait.
func TestFirstBytesWaitForRoom(t *testing.T) {
	for _, ends := range []bool{false, true} {
		app, down := sockets.Pair(t)
		if _, err := app.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		e := &early{down: down}
		until(e)
		_, table := testProxy(mesh.Empty(), func(*Config) {})
		c, ctx := table.Begin(t.Context(), flow.Record{})
		near, far := memnet.Pipe()
		near.SetBuffer(3)
		r, err := e.rest(c, 1)
		if err != nil {
			t.Fatal(err)
		}
		endedc := make(chan struct{})
		go way{Conn: near, rest: r}.join(ctx, c, down, func() { close(endedc) })
		if _, err := far.Write([]byte("413")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(app, make([]byte, 3)); err != nil {
			t.Fatalf("the answer waits for the question: %v", err)
		}
		if ends {
			_ = far.Reset()
			if _, err := app.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read %v, want a reset", err)
			}
			<-endedc
			continue
		}
		_ = app.CloseWrite()
		if got, err := io.ReadAll(far); string(got) != "uestion" || err != nil {
			t.Errorf("then came %q, %v", got, err)
		}
		_ = far.Close()
		<-endedc
		if n := c.Stats.Sent.Load(); n != 8 {
			t.Errorf("%d bytes counted, want all 8", n)
		}
	}
}

// Only a peer that answers for the endpoint itself gets them early, and the next one the same.
func TestWhoIsSentFirstBytes(t *testing.T) {
	refused := &hbone.StatusError{Code: 503}
	snap, src := twoEndpoints(func(w *mesh.Workload) { w.Tunnel = workload.TunnelProtocol_HBONE })
	app, down := sockets.Pair(t)
	if _, err := app.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	e := &early{down: down}
	until(e)
	f := &tunnels{fail: map[string]error{"10.0.0.11": refused, "10.0.0.12": refused}}
	p, table := testProxy(snap, func(cfg *Config) { cfg.Tunnels = f })
	c, ctx := table.Begin(t.Context(), flow.Record{})
	_, err := p.connect(ctx, c, Request{Src: src, Dst: netip.MustParseAddrPort("10.96.0.1:80"), Rand: 3, early: e})
	if err == nil || len(f.early) != 2 || f.early[0] != "question" || f.early[1] != "question" {
		t.Errorf("%v; sent early %q", err, f.early)
	}
	c.End(err)

	f.early = nil
	_, _ = p.dial(ctx, c, Plan{Transport: flow.HBONE, Waypoint: true, Addr: netip.MustParseAddrPort("10.0.0.11:15008")}, Request{Src: src, early: e})
	if len(f.early) != 1 || f.early[0] != "" {
		t.Errorf("to a waypoint went early %q", f.early)
	}
	e.forget()
}
