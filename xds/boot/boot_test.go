package boot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

var quiet = slog.New(slog.DiscardHandler)

func TestGroupEndsWithTheFirstFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken")
		g := NewGroup(t.Context(), quiet)
		g.Go("waits", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		g.Go("finishes", func(context.Context) error { return nil })
		g.Go("fails", func(context.Context) error { time.Sleep(time.Second); return broken })
		err := g.Wait()
		if !errors.Is(err, broken) || err.Error() != "fails: broken" {
			t.Errorf("got %v", err)
		}
		if cause := context.Cause(g.Context()); !errors.Is(cause, broken) {
			t.Errorf("cause %v", cause)
		}
	})
}

func TestGroupToldToStopHasNotFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		g := NewGroup(ctx, quiet)
		g.Go("waits", func(ctx context.Context) error { <-ctx.Done(); return errors.New("listener closed") })
		cancel()
		if err := g.Wait(); err != nil {
			t.Errorf("got %v", err)
		}
	})
}

func get(t *testing.T, h http.Handler, method, target string, change func(*http.Request)) (int, string) {
	t.Helper()
	r := httptest.NewRequest(method, "http://localhost:15000"+target, nil)
	r.RemoteAddr = "127.0.0.1:999"
	if change != nil {
		change(r)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func TestReadyNamesWhatIsPending(t *testing.T) {
	r := NewReady()
	a, b := r.Block("state manager"), r.Block("proxy")
	for _, tt := range []struct {
		do   func()
		code int
		body string
	}{
		{func() {}, 500, "not ready, pending: state manager, proxy\n"},
		{a, 500, "not ready, pending: proxy\n"},
		{a, 500, "not ready, pending: proxy\n"},
		{b, 200, "ready\n"},
	} {
		changed := r.Changed()
		before := len(r.Pending())
		tt.do()
		if code, body := get(t, ReadyMux(r), "GET", "/healthz/ready", nil); code != tt.code || body != tt.body {
			t.Errorf("got %d %q, want %d %q", code, body, tt.code, tt.body)
		}
		select {
		case <-changed:
			if len(r.Pending()) == before {
				t.Error("told of a change without one")
			}
		default:
			if len(r.Pending()) != before {
				t.Error("not told of a change")
			}
		}
	}
}

func TestAdmin(t *testing.T) {
	_, levels := NewLogger(io.Discard, "text", "info")
	levels.Rename(func(name string) string {
		if strings.HasPrefix(name, "ztunnel::xds") {
			return "xds"
		}
		return ""
	})
	stopped := 0
	h := AdminMux(AdminConfig{
		Levels: levels, Shutdown: func() { stopped++ },
		Handlers: map[string]http.Handler{"GET /config_dump": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") })},
	})
	host := func(name string) func(*http.Request) { return func(r *http.Request) { r.Host = name } }
	from := func(addr string) func(*http.Request) { return func(r *http.Request) { r.RemoteAddr = addr } }
	tests := []struct {
		method, target string
		change         func(*http.Request)
		code           int
		body           string
	}{
		{"GET", "/logging", nil, 200, "level is info"},
		{"GET", "/logging?level=debug", nil, 405, "use POST"},
		{"POST", "/logging?level=debug,access:off", nil, 200, "level is debug,access=off"},
		{"POST", "/logging?level=ztunnel::xds::client:trace,access:warn", nil, 200, "level is debug,access=warn,xds=trace"},
		{"POST", "/logging?reset", nil, 200, "level is info"},
		{"POST", "/logging?xds=debug&level=warn", nil, 200, "level is warn,xds=debug"},
		{"GET", "/logging?reset", nil, 405, "use POST"},
		{"POST", "/logging?level=loud", nil, 400, "unknown level"},
		{"GET", "/", nil, 200, `<a href="/config_dump">`},
		{"POST", "/logging?level=reset", nil, 200, "level is info"},
		{"GET", "/config_dump", nil, 200, "{}"},
		{"GET", "/config_dump", host("[::1]:15000"), 200, "{}"},
		{"GET", "/config_dump", host("rebound.example:15000"), 403, "only this host"},
		{"GET", "/config_dump", from("10.0.0.9:1"), 403, "only this host"},
		{"GET", "/quitquitquit", nil, 405, ""},
		{"POST", "/quitquitquit", from("[::ffff:10.0.0.9]:1"), 403, ""},
		{"POST", "/quitquitquit", nil, 200, "shutting down"},
		{"GET", "/debug/pprof/", nil, 200, "goroutine"},
		{"GET", "/debug/pprof/heap?debug=1", nil, 200, "heap profile"},
		{"GET", "/nothing", nil, 404, ""},
	}
	for _, tt := range tests {
		t.Run(tt.method+" "+tt.target, func(t *testing.T) {
			if code, body := get(t, h, tt.method, tt.target, tt.change); code != tt.code || !strings.Contains(body, tt.body) {
				t.Errorf("got %d %q, want %d with %q", code, body, tt.code, tt.body)
			}
		})
	}
	if stopped != 1 {
		t.Errorf("shut down %d times", stopped)
	}
}

func TestMetricsInBothFormats(t *testing.T) {
	reg := NewRegistry("test")
	q := NewQueue(io.Discard, 0)
	defer q.Close()
	if err := RegisterQueue(reg, q); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/metrics", "/stats/prometheus"} {
		_, body := get(t, Metrics(reg), "GET", path, nil)
		for _, want := range []string{`ambit_build_info{`, `program="test"`, "go_goroutines", "process_open_fds", "ambit_log_dropped_lines_total 0"} {
			if !strings.Contains(body, want) {
				t.Errorf("%s lacks %s", path, want)
			}
		}
	}
	_, body := get(t, Metrics(reg), "GET", "/metrics", func(r *http.Request) {
		r.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	})
	if !strings.HasSuffix(body, "# EOF\n") {
		t.Error("not OpenMetrics, though asked for")
	}
}

func TestSecondSignalExitsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sigc := make(chan os.Signal, 2)
		exited := 0
		ctx, stop := signalContext(t.Context(), sigc, func() {}, func(code int) { exited = code })
		defer stop()
		sigc <- syscall.SIGTERM
		<-ctx.Done()
		if !errors.Is(context.Cause(ctx), ErrSignal) || exited != 0 {
			t.Errorf("after one signal: cause %v, exit %d", context.Cause(ctx), exited)
		}
		sigc <- syscall.SIGINT
		synctest.Wait()
		if exited != 1 {
			t.Errorf("after two signals: exit %d, want 1", exited)
		}
	})
}

func TestSignalContextWithoutSignals(t *testing.T) {
	ctx, stop := SignalContext(t.Context())
	stop()
	stop()
	if !errors.Is(context.Cause(ctx), context.Canceled) {
		t.Errorf("cause %v", context.Cause(ctx))
	}
}

func TestServeHTTPEndsWithItsContext(t *testing.T) {
	ln, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	donec := make(chan error, 1)
	go func() {
		donec <- ServeHTTP(ctx, ln, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hi") }), quiet)
	}()
	resp, err := http.Get("http://" + ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || string(body) != "hi" {
		t.Errorf("%q, %v", body, err)
	}
	http.DefaultClient.CloseIdleConnections()
	cancel()
	if err := <-donec; err != nil {
		t.Error(err)
	}
	if _, err := Listen(t.Context(), "256.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "256.0.0.1:1") {
		t.Errorf("error %v does not name the address", err)
	}
}

func TestVersion(t *testing.T) {
	var b bytes.Buffer
	if err := PrintVersion(&b, "ambitd", nil); err != nil || !strings.HasPrefix(b.String(), "ambitd "+Version) {
		t.Errorf("%q, %v", b.String(), err)
	}
	for _, args := range [][]string{{"-o", "json"}, {"-o=json"}} {
		b.Reset()
		var got Build
		if err := errors.Join(PrintVersion(&b, "ambitd", args), json.Unmarshal(b.Bytes(), &got)); err != nil || got.Program != "ambitd" {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if PrintVersion(&b, "ambitd", []string{"-x"}) == nil {
		t.Error("a wrong argument was accepted")
	}
}

func TestRaiseNoFile(t *testing.T) {
	n, err := RaiseNoFile()
	if err != nil || n == 0 {
		t.Errorf("%d, %v", n, err)
	}
}
