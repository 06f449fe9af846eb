package load

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
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
	go func() { donec <- acceptLoop(ctx, ln, answer) }()
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
			{Kind: Connect, Conns: 2, Size: 64}, {Kind: Rate, Conns: 4, Size: 1000, PerSec: 400}, {Kind: Idle, Conns: 20, Size: 64},
		} {
			s.Server, s.Warm, s.For = addr, 50*time.Millisecond, 150*time.Millisecond
			r, err := Run(t.Context(), s)
			if err != nil {
				t.Fatalf("%s over %s: %v", s.Kind, name, err)
			}
			bulk := s.Kind == Up || s.Kind == Down
			if r.Errors > 0 || r.Elapsed < s.For || bulk && r.Bytes == 0 || !bulk && r.Ops == 0 {
				t.Errorf("%s over %s: %d operations, %d bytes, %d errors (%s) in %s", s.Kind, name, r.Ops, r.Bytes, r.Errors, r.Error, r.Elapsed)
			}
			if timed := !bulk && s.Kind != Idle; timed != (r.Latency != nil) {
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
		func(s *Spec) { s.Size = maxSize + 1 }, func(s *Spec) { s.For = 0 }, func(s *Spec) { s.PerSec = 1 },
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
