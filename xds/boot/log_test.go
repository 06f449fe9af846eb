package boot

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ambit-mesh/ambit/test/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

func TestTextLayoutIsTheReferences(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // for a known time
		var b bytes.Buffer
		log, _ := NewLogger(&b, "text", "info")
		access := Scoped(log, "access").With("direction", "inbound")
		access.Info("connection complete",
			"src.addr", netip.MustParseAddrPort("10.0.0.1:80"), "ip", netip.MustParseAddr("::1"), "bytes_sent", 5, "u", uint64(7),
			"ok", true, "f", 0.5, "duration", 13*time.Millisecond, "error", errors.New("it \"broke\"\n"),
			slog.Group("a", "b", 1, slog.Group("c", "d", 2)), "none", netip.AddrPort{})
		log.Warn("bare")
		log.WithGroup("g").Error("grouped", "k", "v")
		log.Debug("not wanted")
		want := "2000-01-01T00:00:00.000000Z\tinfo\taccess\tconnection complete\t" +
			`direction="inbound" src.addr=10.0.0.1:80 ip=::1 bytes_sent=5 u=7 ok=true f=0.5 duration="13ms" error="it \"broke\"\n" a.b=1 a.c.d=2 none="invalid AddrPort"` + "\n" +
			"2000-01-01T00:00:00.000000Z\twarn\tapp\tbare\n" +
			"2000-01-01T00:00:00.000000Z\terror\tapp\tgrouped\t" + `g.k="v"` + "\n"
		if diff := cmp.Diff(want, b.String()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

func TestJSONHasTheSameFields(t *testing.T) {
	var b bytes.Buffer
	log, _ := NewLogger(&b, "json", "info")
	Scoped(log, "access").Info("say \"hi\"\x00", "src.addr", netip.MustParseAddrPort("10.0.0.1:80"), "n", 5, "nan", math.NaN(), "l", []string{"x"}, "e", error(nil), "bad", "\xff")
	var got map[string]any
	if err := json.Unmarshal(b.Bytes(), &got); err != nil {
		t.Fatalf("%v in %s", err, b.String())
	}
	if !regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$`).MatchString(got["time"].(string)) {
		t.Errorf("time %v", got["time"])
	}
	delete(got, "time")
	want := map[string]any{
		"level": "info", "scope": "access", "message": "say \"hi\"\x00", "src.addr": "10.0.0.1:80", "n": 5.0,
		"nan": "NaN", "l": []any{"x"}, "e": nil, "bad": "�",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !strings.HasPrefix(b.String(), `{"level":"info","time":"`) {
		t.Errorf("fields are not in the reference's order: %s", b.String())
	}
}

func TestNoRecordForgesAnother(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		var b bytes.Buffer
		log, _ := NewLogger(&b, format, "info")
		log.Info("a\nb\tc\r", "k", "x\ny", "l", []string{"p\nq"})
		if n := strings.Count(b.String(), "\n"); n != 1 {
			t.Errorf("%s: %d lines: %q", format, n, b.String())
		}
	}
}

func TestLevelsPerScope(t *testing.T) {
	log, ctl := NewLogger(io.Discard, "text", "warn,xds=debug")
	a, x := Scoped(log, "a"), Scoped(log, "xds")
	check := func(when string, l *slog.Logger, level slog.Level, want bool) {
		t.Helper()
		if got := l.Enabled(t.Context(), level); got != want {
			t.Errorf("%s: level %v enabled %v, want %v", when, level, got, want)
		}
	}
	check("start", a, slog.LevelInfo, false)
	check("start", x, slog.LevelDebug, true)
	for _, tt := range []struct {
		spec, want string
	}{
		{"debug", "debug,xds=debug"},
		{"a:off", "debug,a=off,xds=debug"},
		{"a=trace,xds=error,info", "info,a=trace,xds=error"},
		{"reset", "warn,xds=debug"},
		{"reset,a=debug", "warn,a=debug,xds=debug"},
	} {
		if err := ctl.Set(tt.spec); err != nil {
			t.Fatal(err)
		}
		if got := ctl.String(); got != tt.want {
			t.Errorf("after %q: %q, want %q", tt.spec, got, tt.want)
		}
	}
	check("reset", a, slog.LevelDebug, true)
	check("reset", Scoped(log, "later"), slog.LevelInfo, false)
	for _, bad := range []string{"loud", "a=loud", "=debug", "info,b=debug,c=x"} {
		if err := ctl.Set(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if got := ctl.String(); got != "warn,a=debug,xds=debug" {
		t.Errorf("a refused spec changed the levels to %q", got)
	}
	if CheckLogging("xml", "info") == nil || CheckLogging("text", "loud") == nil || CheckLogging("json", "debug,a=off") != nil {
		t.Error("CheckLogging does not agree with NewLogger")
	}
}

func FuzzLevelSpec(f *testing.F) {
	for _, s := range []string{"info", "a=debug,b:off", "reset,reset", ",,=,:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		c := newLevelControl()
		if c.Set(spec) == nil {
			if err := c.Set(c.String()); err != nil && !strings.ContainsAny(spec, "=:") {
				t.Fatalf("%q shows as %q: %v", spec, c, err)
			}
		}
	})
}

// gate is a writer that can be made to block.
type gate struct {
	mu   sync.Mutex
	b    bytes.Buffer
	open chan struct{}
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.b.Write(p)
}

func TestQueueNeverBlocksAndCountsWhatItDrops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{})}
		q := NewQueue(g, 100)
		line := []byte(strings.Repeat("x", 9) + "\n")
		if _, err := q.Write(line); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the goroutine is stuck with the first line
		for range 15 {
			if n, err := q.Write(line); n != len(line) || err != nil {
				t.Fatal(n, err)
			}
		}
		if got := q.Dropped(); got != 5 {
			t.Errorf("%d dropped, want 5: ten lines fit", got)
		}
		close(g.open)
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(g.b.String(), "\n"); got != 11 {
			t.Errorf("%d lines written, want 11", got)
		}
		_ = q.Close() // idempotent
	})
}

// writes are noted one by one.
type writes struct {
	mu  sync.Mutex
	all []string
}

func (w *writes) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, string(p))
	return len(p), nil
}

func (w *writes) got() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.all)
}

// A line after a silence is written at once, and those that follow it together.
func TestQueueGathers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w writes
		q := NewQueue(&w, 0)
		log := func(line string) {
			_, _ = q.Write([]byte(line)) // never fails
			synctest.Wait()
		}
		log("1\n")
		log("2\n")
		log("3\n")
		if diff := cmp.Diff([]string{"1\n"}, w.got()); diff != "" {
			t.Errorf("at once (-want +got):\n%s", diff)
		}
		time.Sleep(flushEvery)
		synctest.Wait()
		if diff := cmp.Diff([]string{"1\n", "2\n3\n"}, w.got()); diff != "" {
			t.Errorf("%v later (-want +got):\n%s", flushEvery, diff)
		}
		log("4\n")
		_ = q.Close()
		if diff := cmp.Diff([]string{"1\n", "2\n3\n", "4\n"}, w.got()); diff != "" {
			t.Errorf("at the end (-want +got):\n%s", diff)
		}
	})
}

// disk takes so many bytes and then is full.
type disk struct {
	free int
	b    bytes.Buffer
}

var errFull = errors.New("no space left on device")

func (d *disk) Write(p []byte) (int, error) {
	n := min(len(p), d.free)
	d.free -= n
	d.b.Write(p[:n])
	if n < len(p) {
		return n, errFull
	}
	return n, nil
}

// A full disk loses lines, and says so when it has room again; no line is
// glued to half of another.
func TestQueueOutlivesAFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{free: 15}
		q := NewQueue(d, 0)
		log, _ := NewLogger(q, "text", "info")
		write := func(line string) {
			_, _ = q.Write([]byte(line)) // never fails
			time.Sleep(2 * flushEvery)
			synctest.Wait()
		}
		write("complete1\n")
		write("cut short\n")
		write("lost whole\n")
		if got := q.Dropped(); got != 2 {
			t.Errorf("%d lines dropped, want 2", got)
		}
		d.free = 1000
		write("complete2\n")
		want := "complete1\ncut s\ncomplete2\n2000-01-01T00:00:00.030000Z\twarn\tlog\tlog lines dropped\tcount=2\n"
		if diff := cmp.Diff(want, d.b.String()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		log.Info("told once")
		_ = q.Close()
		if got := strings.Count(d.b.String(), "dropped"); got != 1 {
			t.Errorf("told %d times", got)
		}
	})
}

// A pipe that nobody reads holds up nobody who logs.
func TestQueueBeforeAFullPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	q := NewQueue(w, 64<<10)
	log, _ := NewLogger(q, "json", "info")
	for q.Dropped() == 0 {
		log.Info("a line that fills the pipe, then the queue", "k", strings.Repeat("x", 1000))
	}
	donec := make(chan string)
	go func() {
		all, _ := io.ReadAll(r)
		donec <- string(all)
	}()
	for q.Dropped() > 0 {
		if _, err := q.Write([]byte("more\n")); err != nil {
			t.Fatal(err)
		}
		q.mu.Lock()
		empty := len(q.pending) == 0
		q.mu.Unlock()
		if empty {
			break
		}
		runtime.Gosched()
	}
	_ = q.Close()
	_ = w.Close()
	if all := <-donec; !strings.Contains(all, `"message":"log lines dropped","count":`) {
		t.Errorf("the loss is not told in %d bytes", len(all))
	}
	_ = r.Close()
}

func TestQueueCloseDoesNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{})}
		q := NewQueue(g, 100)
		_, _ = q.Write([]byte("x\n")) // never fails
		synctest.Wait()
		begin := time.Now()
		_ = q.Close() // gives up
		if took := time.Since(begin); took != flushTimeout {
			t.Errorf("waited %v", took)
		}
		close(g.open)
	})
}

func TestLogLineAllocations(t *testing.T) {
	log, _ := NewLogger(io.Discard, "text", "info")
	log = Scoped(log, "access")
	src := netip.MustParseAddrPort("10.0.0.1:80")
	got := testing.AllocsPerRun(1000, func() {
		log.LogAttrs(t.Context(), slog.LevelInfo, "connection complete", slog.Any("src.addr", src), slog.Int("bytes_sent", 5),
			slog.String("dst.workload", "w"), slog.Duration("duration", time.Millisecond))
	})
	// The boxed address and its duration's text.
	if got > 3 {
		t.Errorf("%v allocations per line, at most 3", got)
	}
}

func BenchmarkLogLine(b *testing.B) {
	log, _ := NewLogger(io.Discard, "text", "info")
	src := netip.MustParseAddrPort("10.0.0.1:80")
	b.ReportAllocs()
	for b.Loop() {
		log.LogAttrs(b.Context(), slog.LevelInfo, "connection complete", slog.Any("src.addr", src), slog.Int("bytes_sent", 5),
			slog.String("dst.workload", "w"), slog.Duration("duration", time.Millisecond))
	}
}
