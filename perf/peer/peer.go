// Package peer runs one HTTP proxy as a plain hop between a client and a server,
// so that proxies are compared at the same work:
//
//	client ── HTTP/1.1 ──▶ Hop: envoy, haproxy, nginx or net/http ── HTTP/1.1 ──▶ server
//
// A program of others is started with a configuration of ours and ends with the
// hop. The net/http hop is httputil.ReverseProxy in this process: what any Go
// program gets without effort. Run is for one goroutine.
package peer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Kind is what a program is configured like.
type Kind string

// Kinds.
const (
	Ztunnel Kind = "ztunnel" // a node proxy, not a Hop
	Envoy   Kind = "envoy"
	HAProxy Kind = "haproxy"
	Nginx   Kind = "nginx"
	NetHTTP Kind = "net-http"
)

// HTTP are the kinds that are programs of others for one HTTP hop.
var HTTP = []Kind{Envoy, HAProxy, Nginx}

// KindOf recognises a program by the name that is given to it: nginx, or
// nginx-tuned. Whatever has no HTTP proxy's name is a node proxy.
func KindOf(name string) Kind {
	for _, k := range HTTP {
		if name == string(k) || strings.HasPrefix(name, string(k)+"-") {
			return k
		}
	}
	return Ztunnel
}

// Hop is one.
type Hop struct {
	Kind    Kind   `json:"kind"`
	Program string `json:"program,omitempty"`
	Listen  string `json:"listen"` // a free port of the hop's own
	To      string `json:"to"`
	Workers int    `json:"workers"`
}

// Started is the line a hop writes when it takes connections.
type Started struct {
	Addr   string   `json:"addr"`
	PIDs   []int    `json:"pids"` // the process and its children
	Argv   []string `json:"argv"`
	Config string   `json:"config,omitempty"`
}

// argv starts the program in the foreground with a configuration file.
func (h Hop) argv(dir, file string) []string {
	switch h.Kind {
	case Nginx:
		return []string{h.Program, "-p", dir, "-c", file, "-e", "stderr"}
	case HAProxy:
		return []string{h.Program, "-db", "-f", file}
	}
	return []string{h.Program, "-c", file, "--concurrency", strconv.Itoa(h.Workers), "--log-level", "error", "--disable-hot-restart"}
}

// Version is the first line of what a program says of itself, "" for none.
func (k Kind) Version(ctx context.Context, program string) string {
	flag := "-v"
	if k == Envoy {
		flag = "--version"
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, flag).CombinedOutput() // nginx uses standard error
	if err != nil {
		return ""
	}
	first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return strings.Join(strings.Fields(first), " ")
}

// Run serves until ctx ends; it writes Started when connections are taken.
func (h Hop) Run(ctx context.Context, out io.Writer) error {
	if h.Workers < 1 {
		return fmt.Errorf("workers %d: want at least one", h.Workers)
	}
	if h.Kind == NetHTTP {
		return h.serve(ctx, out)
	}
	dir, err := os.MkdirTemp("", "ambit-perf-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	name, text, err := h.config(dir)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	argv := h.argv(dir, file)
	var said tail
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	// It ends with this process, however that ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", h.Program, err)
	}
	donec := make(chan error, 1)
	go func() { donec <- cmd.Wait() }()
	if err := h.ready(ctx, donec); err != nil {
		return fmt.Errorf("start %s: %w: %s", h.Program, err, said.String())
	}
	pids, err := family(cmd.Process.Pid)
	if err != nil {
		return err
	}
	if err := json.NewEncoder(out).Encode(Started{Addr: h.Listen, PIDs: pids, Argv: argv, Config: text}); err != nil {
		return err
	}
	if err := <-donec; ctx.Err() == nil {
		return fmt.Errorf("%s ended: %w: %s", h.Program, errors.Join(err, errEnded), said.String())
	}
	return nil
}

var errEnded = errors.New("it should run until it is stopped")

// ready waits until the port is answered.
func (h Hop) ready(ctx context.Context, donec <-chan error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 15*time.Second, fmt.Errorf("%s took no connections within 15 seconds", h.Listen))
	defer cancel()
	var d net.Dialer
	for {
		c, err := d.DialContext(ctx, "tcp", h.Listen)
		if err == nil {
			return c.Close()
		}
		select {
		case err := <-donec:
			return errors.Join(err, errEnded)
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// family is a process and those it has started.
func family(pid int) ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, file := range stats {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // ended meanwhile
		}
		// pid (name) state ppid: the name may hold anything.
		i := bytes.LastIndexByte(b, ')')
		if i < 0 {
			continue
		}
		var state string
		var parent, child int
		if _, err := fmt.Sscan(string(b[i+1:]), &state, &parent); err != nil {
			continue
		}
		if child, err = strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
			children[parent] = append(children[parent], child)
		}
	}
	out := []int{pid}
	for i := 0; i < len(out); i++ {
		slices.Sort(children[out[i]])
		out = append(out, children[out[i]]...)
	}
	return out, nil
}

// serve is the net/http hop. Its transport keeps as many connections as nginx does;
// the default keeps two, and measures connecting.
func (h Hop) serve(ctx context.Context, out io.Writer) error {
	runtime.GOMAXPROCS(h.Workers)
	to := &url.URL{Scheme: "http", Host: h.To}
	ln, err := net.Listen("tcp", h.Listen)
	if err != nil {
		return err
	}
	transport := &http.Transport{MaxIdleConns: 256, MaxIdleConnsPerHost: 256, IdleConnTimeout: time.Minute, DisableCompression: true}
	srv := &http.Server{Handler: &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(to) },
		Transport: transport,
		ErrorLog:  log.New(io.Discard, "", 0), // clients end loads in the middle and count what fails
	}, ErrorLog: log.New(io.Discard, "", 0)}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() }) // nothing is to be drained
	defer stop()
	if err := json.NewEncoder(out).Encode(Started{Addr: ln.Addr().String(), PIDs: []int{os.Getpid()}}); err != nil {
		return errors.Join(err, ln.Close())
	}
	if err := srv.Serve(ln); ctx.Err() == nil {
		return err
	}
	return nil
}

// tail keeps the end of what a program says.
type tail struct {
	mu sync.Mutex
	b  []byte // guarded by mu
}

func (t *tail) Write(p []byte) (int, error) {
	const enough = 4 << 10
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-enough):]
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}
