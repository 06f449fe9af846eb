package report

import (
	"bytes"
	"encoding/xml"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/ambit-mesh/ambit/perf/load"
)

func TestSpread(t *testing.T) {
	tests := []struct {
		values []float64
		want   Spread
		text   string
	}{
		{nil, Spread{}, "–"},
		{[]float64{3}, Spread{3, 3, 3, 1, 3, 3, 0}, "3.00"},
		{[]float64{4, 1}, Spread{1.75, 2.5, 3.25, 2, 1, 4, 0.5}, "2.50 (1.75–3.25)"},
		{[]float64{5, 1, 2, 4, 3}, Spread{2, 3, 4, 5, 1, 5, 0.9375}, "3.00 (2.00–4.00)"},
	}
	for _, tt := range tests {
		if got := SpreadOf(tt.values); got != tt.want || got.String() != tt.text {
			t.Errorf("%v: %+v %s, want %+v %s", tt.values, got, got, tt.want, tt.text)
		}
	}
}

// Tables of the sign test have these: 6 values give 96.9 %, from 9 on the extremes
// are not needed.
func TestInterval(t *testing.T) {
	for n, want := range map[int]struct {
		k    int
		sure float64
	}{1: {0, 0}, 2: {0, 0.5}, 3: {0, 0.75}, 4: {0, 0.875}, 5: {0, 0.9375}, 6: {0, 0.96875}, 8: {0, 0.9921875}, 9: {1, 0.9609375}, 12: {2, 0.9614}, 20: {5, 0.9586}, 100: {39, 0.9648}} {
		if k, sure := interval(n); k != want.k || math.Abs(sure-want.sure) > 1e-4 {
			t.Errorf("of %d: %d, %.5f, want %+v", n, k, sure, want)
		}
	}
}

func TestFigure(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123: "0.0123", 0.5: "0.500", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 9999: "9999", 12345: "12.3k", -2.5: "-2.50"} {
		if got := figure(v); got != want {
			t.Errorf("%v: %s, want %s", v, got, want)
		}
	}
}

func TestApart(t *testing.T) {
	low, high, wide := SpreadOf([]float64{1, 2, 3}), SpreadOf([]float64{5, 6, 7}), SpreadOf([]float64{1, 4, 7})
	if Apart(low, high) != -1 || Apart(high, low) != 1 || Apart(low, wide) != 0 || Apart(SpreadOf([]float64{1}), high) != 0 {
		t.Error("spreads are apart that overlap, or the reverse")
	}
}

// sample is a report in which ambit is half as fast as none, to the tenth.
func sample() *Report {
	s := Scenario{Name: "cross-node/ask-1", Title: "requests", Placement: "cross-node", Load: load.Spec{Kind: load.Ask, Conns: 1, Size: 1024}}
	row := func(mode string, ops ...uint64) Row {
		r := Row{Scenario: s, Mode: mode}
		for i, n := range ops {
			var h load.Histogram
			for k := range int64(2000) {
				h.Add(100_000_000/int64(n) + k)
			}
			run := Run{Round: i + 1, Result: load.Result{Elapsed: time.Second, Ops: n, Latency: &h, Machine: load.Machine{CPUs: 2, Busy: time.Second}}}
			if mode != "none" {
				run.Result.Usage = []load.Usage{
					{Process: load.Process{Name: "server"}, CPU: time.Hour},
					{Process: load.Process{Name: "proxy", Proxy: true}, CPU: 500 * time.Millisecond, RSS: 20 << 20, Voluntary: 3000, LogLines: 7},
				}
			}
			r.Runs = append(r.Runs, run)
		}
		return r
	}
	return &Report{
		Format: Format, Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Took: time.Minute, Command: []string{"ambit-perf", "run"}, Version: "ambit-perf <1>",
		Machine: Machine{CPU: "a CPU & more", CPUs: 2}, Settings: Settings{Rounds: 3, MaxSteal: 0.01, AccessLog: true},
		Paths: []Path{{Mode: "ambit", Placement: "cross-node", About: "HBONE", TLS: []string{"A_SUITE, A_GROUP"}}},
		Rows:  []Row{row("none", 1000, 2000, 4000), row("ambit", 500, 1000, 2000)},
	}
}

func TestRatiosArePairedByRound(t *testing.T) {
	r := sample()
	rate := Metrics(load.Ask)[0]
	if got := Ratios(r.Rows[1], r.Rows[0], rate); !slices.Equal(got, []float64{0.5, 0.5, 0.5}) {
		t.Errorf("got %v", got)
	}
	r.Rows[0].Runs[1].Failed = "broken"
	r.Rows[1].Runs = slices.Delete(r.Rows[1].Runs, 0, 1)
	if got := Ratios(r.Rows[1], r.Rows[0], rate); !slices.Equal(got, []float64{0.5}) {
		t.Errorf("with rounds missing: got %v", got)
	}
}

func TestMetrics(t *testing.T) {
	row := sample().Rows[1]
	want := map[string]float64{"rate": 500, "p50": 201, "cpu": 1, "machine": 2, "switches": 6000, "rss": 20, "logged": 7, "errors": 0}
	for _, m := range Metrics(load.Ask) {
		v, ok := m.Of(row.Scenario.Load, row.Runs[0].Result)
		w, asked := want[m.Name]
		if asked && (!ok || math.Abs(v-w) > w/100) {
			t.Errorf("%s: %v, want %v", m.Name, v, w)
		}
	}
	up := load.Result{Elapsed: 2 * time.Second, Bytes: 4e9, Machine: load.Machine{Busy: time.Second}}
	for _, m := range Metrics(load.Up) {
		v, ok := m.Of(load.Spec{Kind: load.Up}, up)
		if w, asked := map[string]float64{"rate": 2, "machine": 0.25}[m.Name]; asked && (!ok || v != w) {
			t.Errorf("bulk %s: %v, want %v", m.Name, v, w)
		}
		if m.Name == "cpu" && ok {
			t.Error("without proxies there is a figure of their CPU")
		}
	}
	idle := load.Result{Elapsed: time.Second, Ops: 100, Usage: []load.Usage{{Process: load.Process{Proxy: true}, Grown: 700 << 10}}}
	for _, m := range Metrics(load.Idle) {
		if v, ok := m.Of(load.Spec{Kind: load.Idle}, idle); m.Name == "perconn" && (!ok || v != 7) {
			t.Errorf("per connection: %v", v)
		}
	}
}

func TestText(t *testing.T) {
	r := sample()
	r.Rows[1].Runs[0].Repeated = 2
	r.Rows[1].Runs[1].Result.Errors, r.Rows[1].Runs[1].Result.Error = 4, "reset"
	r.Rows[0].Runs[2].Stolen = true
	var b bytes.Buffer
	if err := r.Text(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"requests · cross-node [cross-node/ask-1]", "2000 (1500–3000)", "ambit / none", "rate 0.500 (0.500–0.500)", "==== between nodes: requests", "2 runs repeated", "4 errors, the first: reset",
		"TLS on the wire  A_SUITE, A_GROUP", "none, round 3 kept with", "access logs on",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in\n%s", want, b.String())
		}
	}
	for line := range strings.Lines(b.String()) {
		if strings.TrimRight(line, "\n") != strings.TrimRight(line, " \n") {
			t.Errorf("blanks at the end of %q", line)
		}
		if utf8.RuneCountInString(line) > lineWidth+1 {
			t.Errorf("%d columns: %s", utf8.RuneCountInString(line), line)
		}
	}
}

func TestWideTablesAreFolded(t *testing.T) {
	wide := strings.Repeat("w", 30)
	var b strings.Builder
	table{{"mode", wide, wide, wide, wide, "z"}, {"ambit", "1", "2", "3", "4", "5"}}.print(&printer{w: &b})
	if got := strings.Split(b.String(), "\n"); len(got) != 5 || !strings.HasPrefix(got[3], "  ambit  4") || !strings.HasSuffix(got[3], "5") {
		t.Errorf("%q", got)
	}
	b.Reset()
	table{{"only"}, {"one"}}.print(&printer{w: &b})
	if b.String() != "  only\n  one\n" {
		t.Errorf("%q", b.String())
	}
}

func TestEachRowSaysWhatItIsAbout(t *testing.T) {
	r := sample()
	p := &r.Paths[0]
	p.TLS, p.Logs, p.Records = []string{"TLS_AES_128_GCM_SHA256, X25519MLKEM768"}, "access log, metrics", "ambit"
	p.Version, p.Commands = "ztunnel 00450de go1.26.8 linux/amd64", []string{"/somewhere/ztunnel --flag"}
	own := r.Rows[1]
	own.Scenario.Name, own.Runs = "cross-node/handshake", slices.Clone(own.Runs)
	own.Runs[0].Result.Agreed = "TLS_AES_256_GCM_SHA384, X25519"
	r.Rows = append(r.Rows, own)
	r.Describe()
	if none, path, own := r.Rows[0].secured(), r.Rows[1].secured(), r.Rows[2].secured(); none != "" || path != "AES-128-GCM X25519MLKEM768" || own != "AES-256-GCM X25519" {
		t.Errorf("%q, %q, %q", none, path, own)
	}
	if none, ours := r.Rows[0].setup(), r.Rows[1].setup(); none != "–" || ours != "00450de ztunnel --flag; access log, metrics; records ambit" {
		t.Errorf("%q, %q", none, ours)
	}
}

func TestVersionsInShort(t *testing.T) {
	for said, want := range map[string]string{
		"ztunnel 00450de go1.26.8 linux/amd64":                               "00450de",
		"ztunnel 00450de-dirty go1.26.8 linux/amd64":                         "00450de-dirty",
		"ambit-perf v0.3.1 go1.26.8 linux/amd64":                             "v0.3.1",
		"nginx version: nginx/1.22.1":                                        "1.22.1",
		"HAProxy version 2.6.12-1+deb12u3 2025/10/03 - https://haproxy.org/": "2.6.12-1+deb12u3",
		`version.BuildInfo{Version:"62d826530e5ce8", GitRevision:"62d826530e5ce85764e3-dirty", RustVersion:"1.95.0"}`: "62d826530e5c-dirty",
		"envoy version: 7b8baff1758f0a584dcc3cb657b5032000bcb3d7/1.31.0/Clean/RELEASE/BoringSSL":                      "1.31.0",
		"unknown": "unknown", "ztunnel dev go1.26.8 linux/amd64": "dev",
	} {
		if got := shortVersion(said); got != want {
			t.Errorf("%s: %s, want %s", said, got, want)
		}
	}
}

func TestWhatIsNoReportIsRefused(t *testing.T) {
	for text, want := range map[string]string{
		"": "it is none", "hello": "it is none", "[1]": "it is none", `{"kind": "List"}`: "it is none", `{"format": 1}`: "it is none", `{"format": 1, "rows": [`: "in the middle",
		`{"format": 99, "rows": [{}]}`: "format 99", `{"format": 1, "rows": [{"mode": "x", "scenario": {"name": "y", "load": {"kind": "z"}}}]}`: "row 1",
	} {
		if _, err := Decode(strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestWhatWasStoppedSaysSo(t *testing.T) {
	r := sample()
	r.Stopped = "3 of 6 runs were made: stopped by a signal"
	if w := r.Warnings(); len(w) == 0 || !strings.HasPrefix(w[0], "STOPPED before its end, 3 of 6 runs") {
		t.Errorf("%q", w)
	}
}

func TestWhatElseRanIsToBeSeen(t *testing.T) {
	r := sample() // a second of two CPUs' is busy: half of it a proxy's
	for i := range r.Rows[1].Runs {
		r.Rows[1].Runs[i].Result.Usage[0].CPU = 0
	}
	if busy, all := r.disturbed(); busy != 3 || all != 6 {
		t.Errorf("%d of %d", busy, all)
	}
	if w := r.Warnings(); len(w) == 0 || !strings.Contains(w[0], "in 3 of 6 runs") {
		t.Errorf("%q", w)
	}
}

// Whatever a run lacks is left out and stops nothing: hours may be in a report.
func TestRunsThatLackEverythingAreShown(t *testing.T) {
	r := sample()
	for _, kind := range []string{load.Up, load.Down, load.Ask, load.Connect, load.Rate, load.Idle, load.Settle, load.HTTP, load.GRPC, load.GRPCStream, load.Decide, load.Handshake, load.Tunnel, load.Enrol, load.Learn} {
		for _, place := range []string{"cross-node", "same-node", "http-hop"} {
			for _, beside := range []string{"", "something"} {
				spec := load.Spec{Kind: kind, Beside: beside, PerSec: map[bool]int{true: 500}[kind == load.Decide || kind == load.Rate]}
				for _, mode := range []string{"none", "ambit", "ztunnel"} {
					row := Row{Scenario: Scenario{Name: place + "/" + kind + beside, Title: kind, Placement: place, Load: spec}, Mode: mode}
					for round := range 2 {
						row.Runs = append(row.Runs, Run{Round: round + 1, Place: round + 1, Result: load.Result{Baseline: &load.Baseline{}, Usage: []load.Usage{{Process: load.Process{Proxy: true}}}}})
					}
					r.Rows = append(r.Rows, row)
				}
			}
		}
	}
	var text, page, markdown bytes.Buffer
	if err := errors.Join(r.Text(&text), r.HTML(&page), r.Markdown(&markdown)); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{text.String(), page.String(), markdown.String()} {
		if strings.Contains(s, "NaN") || strings.Contains(s, "Inf") {
			t.Error("something is divided by nothing")
		}
	}
	if _, err := Compare(r, r); err != nil {
		t.Error(err)
	}
}

func TestFirstInTurn(t *testing.T) {
	r := sample()
	for i := range r.Rows { // 1000 2000 4000: the second round was first
		for k := range r.Rows[i].Runs {
			r.Rows[i].Runs[k].Place = []int{2, 1, 3}[k]
		}
	}
	if s := r.firstInTurn(); s.N != 2 || s.Median != 0.8 { // 2000 to the median of 1000 and 4000
		t.Errorf("%+v", s)
	}
}

func TestJSONAndPage(t *testing.T) {
	r := sample()
	var b bytes.Buffer
	if err := r.Encode(&b); err != nil {
		t.Fatal(err)
	}
	back, err := Decode(&b)
	if err != nil {
		t.Fatal(err)
	}
	var before, after, page bytes.Buffer
	if err := r.Text(&before); err != nil {
		t.Fatal(err)
	}
	if err := back.Text(&after); err != nil || before.String() != after.String() {
		t.Errorf("read back (%v):\n%s\nwas:\n%s", err, after.String(), before.String())
	}
	if err := back.HTML(&page); err != nil {
		t.Fatal(err)
	}
	s := page.String()
	if strings.Contains(s, "ambit-perf <1>") || !strings.Contains(s, "a CPU &amp; more") {
		t.Error("text is not escaped")
	}
	if strings.Contains(s, "http://") || strings.Contains(s, "https://") || strings.Contains(s, "<script") {
		t.Error("the page needs something else")
	}
	plots := strings.SplitAfter(s, "</svg>")
	if len(plots) != 5 { // rate, CPU, machine, latency, the rest
		t.Fatalf("%d plots", len(plots)-1)
	}
	for _, p := range plots[:4] {
		if err := xml.Unmarshal([]byte(p[strings.Index(p, "<svg"):]), new(struct{})); err != nil {
			t.Errorf("%v: %s", err, p)
		}
	}
	if strings.Contains(s, "NaN") || strings.Contains(s, "Inf") {
		t.Error("a plot has no scale")
	}
}

func TestOtherFormatsAreRefused(t *testing.T) {
	if _, err := Decode(strings.NewReader(`{"format": 99}`)); err == nil || !strings.Contains(err.Error(), "format 99") {
		t.Errorf("got %v", err)
	}
}

func TestCompare(t *testing.T) {
	a, b := sample(), sample()
	for i := range b.Rows[1].Runs {
		b.Rows[1].Runs[i].Result.Ops *= 10
	}
	b.Machine.CPUs = 4
	b.Settings.AccessLog = false
	c, err := Compare(a, b)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := c.Text(&out, false); err != nil {
		t.Fatal(err)
	}
	if len(c.Worse) > 0 || len(c.Better) == 0 {
		t.Errorf("worse %v, better %v", c.Worse, c.Better)
	}
	for _, want := range []string{"the machines differ", "access logs", "ambit / none", "10.00  better", "better  cross-node/ask-1 · ambit · per s"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
	b.Rows = nil
	if _, err := Compare(a, b); err == nil {
		t.Error("nothing in common is no error")
	}
}
