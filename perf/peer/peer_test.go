package peer

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestKindOf(t *testing.T) {
	for name, want := range map[string]Kind{"envoy": Envoy, "nginx-tuned": Nginx, "haproxy": HAProxy, "ztunnel": Ztunnel, "before": Ztunnel, "nginxes": Ztunnel} {
		if got := KindOf(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

func TestConfigs(t *testing.T) {
	for _, tt := range []struct {
		kind Kind
		name string
		want []string
	}{
		{Nginx, "nginx.conf", []string{"worker_processes 3;", "listen 10.0.0.1:9101;", "server 10.0.0.2:80;", "access_log off;", "keepalive 256;"}},
		{HAProxy, "haproxy.cfg", []string{"nbthread 3", "bind 10.0.0.1:9101", "server server 10.0.0.2:80", "http-reuse always"}},
		{Envoy, "envoy.json", []string{`"address": "10.0.0.1"`, `"port_value": 9101`, `"port_value": 80`}},
	} {
		h := Hop{Kind: tt.kind, Program: "/p", Listen: "10.0.0.1:9101", To: "10.0.0.2:80", Workers: 3}
		name, text, err := h.config("/dir")
		if err != nil || name != tt.name {
			t.Errorf("%s: %s, %v", tt.kind, name, err)
		}
		for _, want := range tt.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s: %q is missing in\n%s", tt.kind, want, text)
			}
		}
		if tt.kind == Envoy && !json.Valid([]byte(text)) {
			t.Errorf("no JSON:\n%s", text)
		}
		if argv := strings.Join(h.argv("/dir", "/dir/"+name), " "); !strings.HasPrefix(argv, "/p ") || !strings.Contains(argv, "/dir/"+name) {
			t.Errorf("%s: starts by %s", tt.kind, argv)
		}
	}
	for _, h := range []Hop{{Kind: "squid", Listen: "a:1", To: "b:2"}, {Kind: Nginx, Listen: "a", To: "b:2"}, {Kind: Nginx, Listen: "a:1", To: "b"}, {Kind: Envoy, Listen: "a:1", To: "b:http"}} {
		if _, _, err := h.config("/dir"); err == nil {
			t.Errorf("%+v has a configuration", h)
		}
	}
}

// begin runs a hop and waits until it takes connections.
func begin(t *testing.T, h Hop) Started {
	t.Helper()
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { err := h.Run(ctx, w); w.CloseWithError(err); ended <- err }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("it ended with %v", err)
		}
	})
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var s Started
	if err := json.Unmarshal([]byte(line), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestNetHTTPHop(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "at "+r.URL.Path) }))
	defer server.Close()
	s := begin(t, Hop{Kind: NetHTTP, Listen: "127.0.0.1:0", To: server.Listener.Addr().String(), Workers: 2})
	if len(s.PIDs) != 1 || s.PIDs[0] != os.Getpid() {
		t.Errorf("processes: %v", s.PIDs)
	}
	resp, err := http.Get("http://" + s.Addr + "/x")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "at /x" {
		t.Errorf("%q, %v", b, err)
	}
}

// A program that ends, or that never listens, says why.
func TestProgramsThatEnd(t *testing.T) {
	program := filepath.Join(t.TempDir(), "nginx")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho unknown directive >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	err := Hop{Kind: Nginx, Program: program, Listen: "127.0.0.1:1", To: "127.0.0.1:2", Workers: 1}.Run(t.Context(), io.Discard)
	if err == nil || !strings.Contains(err.Error(), "unknown directive") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("got %v", err)
	}
	if err := (Hop{Kind: Nginx, Program: program, Listen: "127.0.0.1:1", To: "127.0.0.1:2"}).Run(t.Context(), io.Discard); err == nil || !strings.Contains(err.Error(), "workers 0") {
		t.Errorf("got %v", err)
	}
	if v := Nginx.Version(t.Context(), program); v != "" {
		t.Errorf("version %q", v)
	}
}

func TestFamily(t *testing.T) {
	cmd := exec.Command("sh", "-c", "read line; exit 0")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close(); _ = cmd.Wait() }()
	pids, err := family(os.Getpid())
	if err != nil || len(pids) < 2 || pids[0] != os.Getpid() {
		t.Fatalf("%v, %v", pids, err)
	}
	for _, p := range pids {
		if p == cmd.Process.Pid {
			return
		}
	}
	t.Errorf("child %d is not in %v", cmd.Process.Pid, pids)
}

func TestTailKeepsTheEnd(t *testing.T) {
	var b tail
	for range 100 {
		_, _ = b.Write([]byte(strings.Repeat("x", 100)))
	}
	_, _ = b.Write([]byte("the end\n"))
	if s := b.String(); len(s) > 4<<10 || !strings.HasSuffix(s, "the end") {
		t.Errorf("%d bytes", len(s))
	}
}
