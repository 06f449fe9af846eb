package load

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"
)

// serving is the address of a server that ends with the test.
func serving(t *testing.T) string {
	t.Helper()
	ln, err := listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	donec := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { donec <- serveOn(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-donec; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

func hop(t *testing.T, h Hop) string {
	t.Helper()
	h.Listen = "127.0.0.1:0"
	r, w := io.Pipe()
	donec := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { donec <- h.Run(ctx, w) }()
	t.Cleanup(func() {
		cancel()
		if err := <-donec; err != nil {
			t.Error(err)
		}
	})
	line, err := bufio.NewReader(r).ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	var s Started
	if err := json.Unmarshal(line, &s); err != nil || s.PID != os.Getpid() {
		t.Fatalf("%s: %v", line, err)
	}
	return s.Addr
}

func TestEveryLoadOverEveryHop(t *testing.T) {
	server := serving(t)
	pair, err := NewPair()
	if err != nil {
		t.Fatal(err)
	}
	paths := map[string]string{
		"direct": server,
		"relay":  hop(t, Hop{To: server}),
		"tls":    hop(t, Hop{To: hop(t, Hop{To: server, TLSIn: true, Pair: pair}), TLSOut: true, Pair: pair}),
	}
	for name, addr := range paths {
		for _, s := range []Spec{
			{Kind: Up, Conns: 2, Size: 16 << 10}, {Kind: Down, Conns: 2, Size: 16 << 10}, {Kind: Ask, Conns: 3, Size: 1000},
			{Kind: Connect, Conns: 2, Size: 64}, {Kind: Connect, Conns: 2, Size: 64, PerSec: 200}, {Kind: Settle, Conns: 2, Size: 64, Total: 30},
			{Kind: Decide, Conns: 2, Size: 64, PerSec: 200}, {Kind: HTTP, Conns: 2, Size: 1000}, {Kind: HTTP, Conns: 2, Size: 1000, H2: true}, {Kind: HTTP, Conns: 2, Size: 1000, PerSec: 200},
			{Kind: HTTP, Conns: 2, Size: 1000, PerSec: 200, H2: true}, {Kind: GRPC, Conns: 1, Calls: 3, Size: 1000}, {Kind: GRPC, Conns: 2, Size: 1000, PerSec: 200},
			{Kind: GRPCStream, Conns: 2, Calls: 2, Size: 1000}, {Kind: Rate, Conns: 4, Size: 1000, PerSec: 400}, {Kind: Idle, Conns: 20, Size: 64},
		} {
			s.Server, s.Warm, s.For = addr, 20*time.Millisecond, 80*time.Millisecond
			bulk := s.Kind == Up || s.Kind == Down
			timed := !bulk && s.Kind != Idle
			r, err := Run(t.Context(), s)
			// On a machine that is busy with other things that is too short; and the first of a connection is not timed.
			for err == nil && r.Errors == 0 && (r.Ops+r.Bytes == 0 || timed && r.Latency == nil) && s.For < 10*time.Second {
				s.For *= 4
				r, err = Run(t.Context(), s)
			}
			if err != nil {
				t.Fatalf("%s over %s: %v", s.Kind, name, err)
			}
			if r.Errors > 0 || r.Elapsed < s.For || bulk && r.Bytes == 0 || !bulk && r.Ops == 0 {
				t.Errorf("%s over %s: %d operations, %d bytes, %d errors (%s) in %s", s.Kind, name, r.Ops, r.Bytes, r.Errors, r.Error, r.Elapsed)
			}
			if timed != (r.Latency != nil) {
				t.Errorf("%s over %s: latency %v", s.Kind, name, r.Latency)
			}
			if len(r.Usage) != 1 || r.Usage[0].CPU <= 0 || r.Usage[0].RSS == 0 || r.Machine.CPUs == 0 {
				t.Errorf("%s over %s: usage %+v, machine %+v", s.Kind, name, r.Usage, r.Machine)
			}
		}
	}
}

func TestFaultsAreCounted(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close() // nobody answers there
	r, err := Run(t.Context(), Spec{Kind: Ask, Server: ln.Addr().String(), Conns: 2, Size: 64, For: 50 * time.Millisecond})
	if err != nil || r.Errors == 0 || r.Ops != 0 || !strings.Contains(r.Error, "refused") {
		t.Errorf("got %+v, %v", r, err)
	}
	if _, err := Run(t.Context(), Spec{Kind: Idle, Server: ln.Addr().String(), Conns: 2, Size: 64, For: time.Millisecond}); err == nil {
		t.Error("idle connections to nobody are no error")
	}
}

// A server that answers late once: whoever had to wait behind that request has
// waited, although it was sent in time as seen by the connection.
func TestFixedRateCountsTheWaitBehindOthers(t *testing.T) {
	const stall = 300 * time.Millisecond
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 64)
		for i := 0; ; i++ {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			if i == 5 {
				<-time.After(stall)
			}
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}()
	r, err := Run(t.Context(), Spec{Kind: Rate, Server: ln.Addr().String(), Conns: 1, Size: 64, PerSec: 100, For: 600 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	late := uint64(0)
	for b, n := range r.Latency.counts {
		if middle(b) > uint64(stall/4) {
			late += n
		}
	}
	if late < 10 { // of about 22 due in three quarters of the stall
		t.Errorf("%d requests were late behind a stall of %s at 100/s, want those due meanwhile", late, stall)
	}
}

func TestSpecsAreChecked(t *testing.T) {
	good := Spec{Kind: Rate, Conns: 2, Size: 64, PerSec: 10, For: 1}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for _, change := range []func(*Spec){
		func(s *Spec) { s.Kind = "bulk" }, func(s *Spec) { s.Conns = 0 }, func(s *Spec) { s.Size = 4 },
		func(s *Spec) { s.Kind = Tunnel }, func(s *Spec) { s.Kind, s.Conns = Settle, 20 }, func(s *Spec) { s.Kind = Ask }, func(s *Spec) { s.Calls = 2 },
		func(s *Spec) { s.Group = "p256" }, func(s *Spec) { s.Size = maxSize + 1 }, func(s *Spec) { s.For = 0 }, func(s *Spec) { s.PerSec = 1 },
	} {
		s := good
		change(&s)
		if err := s.Validate(); err == nil {
			t.Errorf("%+v is accepted", s)
		}
	}
}

func TestLogLinesAreCounted(t *testing.T) {
	path := t.TempDir() + "/log"
	if err := os.WriteFile(path, []byte("one\ntwo\nthree\nfour"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n := lines(path, 4, 14); n != 2 {
		t.Errorf("%d lines, want 2", n)
	}
	if n := lines(path+"no", 0, 5); n != 0 {
		t.Errorf("a missing file has %d lines", n)
	}
}

// connects answers CONNECT as a tunnel's server does, with what it gets.
func connects(w http.ResponseWriter, q *http.Request) {
	if q.Method != http.MethodConnect || q.Host != "192.0.2.1:80" {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	w.WriteHeader(http.StatusOK)
	b := make([]byte, 4096)
	for {
		n, err := q.Body.Read(b)
		if _, werr := w.Write(b[:n]); err != nil || werr != nil {
			return
		}
		_ = http.NewResponseController(w).Flush() // the next write fails too
	}
}

func TestHandshakesAndTunnels(t *testing.T) {
	pair, err := NewPair()
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewUnstartedServer(http.HandlerFunc(connects))
	if proxy.TLS, err = pair.config(); err != nil {
		t.Fatal(err)
	}
	proxy.EnableHTTP2 = true
	proxy.StartTLS()
	defer proxy.Close()
	through := pair.Client()
	through.Name, through.To = "", "192.0.2.1:80"
	denied := *through
	denied.To = "192.0.2.1:81"
	plain := hop(t, Hop{To: serving(t), TLSIn: true, Pair: pair})
	for _, tt := range []struct {
		spec   Spec
		agreed string
		err    string
	}{
		{Spec{Kind: Handshake, Server: plain, Client: pair.Client()}, "X25519MLKEM768", ""},
		{Spec{Kind: Handshake, Server: hop(t, Hop{TLSIn: true, Pair: pair}), Client: pair.Client()}, "X25519MLKEM768", ""},
		{Spec{Kind: Tunnel, Server: plain, Client: pair.Client(), Group: X25519}, ", X25519", ""},
		{Spec{Kind: Handshake, Server: proxy.Listener.Addr().String(), Client: through}, "X25519MLKEM768", ""},
		{Spec{Kind: Tunnel, Server: proxy.Listener.Addr().String(), Client: through, Group: X25519}, ", X25519", ""},
		{Spec{Kind: Tunnel, Server: proxy.Listener.Addr().String(), Client: &denied}, "X25519", "answered with 403"},
	} {
		tt.spec.Conns, tt.spec.Size, tt.spec.For = 2, 64, 100*time.Millisecond
		r, err := Run(t.Context(), tt.spec)
		for err == nil && r.Errors == 0 && r.Ops == 0 && tt.spec.For < 10*time.Second { // a machine that is busy with other things
			tt.spec.For *= 4
			r, err = Run(t.Context(), tt.spec)
		}
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(r.Agreed, tt.agreed) || (r.Errors > 0) != (tt.err != "") || !strings.Contains(r.Error, tt.err) || (r.Ops > 0) != (tt.err == "") {
			t.Errorf("%s: %d operations, %d errors (%s), agreed on %s", tt.spec.Kind, r.Ops, r.Errors, r.Error, r.Agreed)
		}
	}
}

// A server that ends its connection: what was due while a new one was made is late,
// although none of its requests was ever sent before.
func TestFixedRateCountsTheTimeWithoutAConnection(t *testing.T) {
	const gap = 300 * time.Millisecond
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for n := 0; ; n++ {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if n == 1 {
				<-time.After(gap)
			}
			b := make([]byte, 64)
			for i := 0; n > 0 || i < 5; i++ {
				if _, err := io.ReadFull(c, b); err != nil {
					break
				}
				if _, err := c.Write(b); err != nil {
					break
				}
			}
			_ = c.Close() // the point of it
		}
	}()
	r, err := Run(t.Context(), Spec{Kind: Rate, Server: ln.Addr().String(), Conns: 1, Size: 64, PerSec: 100, For: 600 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if r.Errors == 0 || r.Latency.Max() < uint64(gap/2) {
		t.Errorf("longest %s, %d errors; the server was away for %s", time.Duration(r.Latency.Max()), r.Errors, gap)
	}
}

// What is due in a window and not answered by its end has waited until then, at least: else a stall at the end of a run
// would be in no figure.
func TestStallAtTheEndIsSeen(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for answered := 0; ; answered++ {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			if b := make([]byte, 64); answered < 100 {
				if _, err := io.ReadFull(c, b); err == nil {
					_, _ = c.Write(b) // the client counts it
				}
			}
		}
	}()
	const perSec, length = 1000, 300 * time.Millisecond
	r, err := Run(t.Context(), Spec{Kind: Connect, Server: ln.Addr().String(), Conns: 1, Size: 64, PerSec: perSec, For: length})
	if err != nil {
		t.Fatal(err)
	}
	due := uint64(perSec * length.Seconds())
	if n := r.Latency.Count(); r.Ops > 100 || n < due-1 {
		t.Errorf("%d requests were answered, %d were due, and %d are in the figures", r.Ops, due, n)
	}
}
