package app

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/test/golden"
	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/ca"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/store"
)

func TestMain(m *testing.M) { leak.Main(m) }

// deadline is only reached by a test that fails.
const deadline = 60 * time.Second

// syncBuffer is a log that is read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// testAmbitd is a whole ambitd on loopback over a directory of its own.
type testAmbitd struct {
	t          *testing.T
	ctx        context.Context
	source     string
	state      string
	log        syncBuffer
	xds        atomic.Pointer[string] // where it listens; changes with a restart
	monitoring string
	stop       func()
}

func newTestAmbitd(t *testing.T) *testAmbitd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	a := &testAmbitd{t: t, ctx: ctx, source: t.TempDir(), state: t.TempDir()}
	return a
}

func (a *testAmbitd) start() {
	a.t.Helper()
	log, levels := boot.NewLogger(&a.log, "text", "debug")
	reg := prometheus.NewRegistry()
	c := Config{Sources: []string{a.source}, StateDir: a.state, Listen: []string{"127.0.0.1:0"}, Monitoring: "127.0.0.1:0"}.withDefaults()
	d, err := assemble(a.ctx, c, log, reg)
	if err != nil {
		a.t.Fatal(err)
	}
	xds := d.listeners[0].Addr().String()
	a.xds.Store(&xds)
	a.monitoring = d.monitoring.Addr().String()
	ctx, cancel := context.WithCancel(a.ctx)
	donec := make(chan error, 1)
	go func() { donec <- d.run(ctx, levels, reg) }()
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-donec; err != nil {
			a.t.Errorf("ambitd: %v", err)
		}
		d.close()
	})
	a.t.Cleanup(a.stop)
}

// write replaces a file of the source in one step.
func (a *testAmbitd) write(name, content string) {
	a.t.Helper()
	tmp := filepath.Join(a.t.TempDir(), name)
	if err := os.WriteFile(tmp, []byte(content), 0o644); err != nil {
		a.t.Fatal(err)
	}
	if err := os.Rename(tmp, filepath.Join(a.source, name)); err != nil {
		a.t.Fatal(err)
	}
}

func (a *testAmbitd) until(what string, f func() bool) {
	a.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-a.ctx.Done():
			a.t.Fatalf("did not happen: %s\n%s", what, a.log.String())
		case <-tick.C:
		}
	}
}

func (a *testAmbitd) get(path string) (int, string) {
	a.t.Helper()
	resp, err := http.Get("http://" + a.monitoring + path)
	if err != nil {
		a.t.Fatal(err)
	}
	defer http.DefaultClient.CloseIdleConnections()
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func (a *testAmbitd) status() Status {
	a.t.Helper()
	_, body := a.get("/status")
	var s Status
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		a.t.Fatalf("%v in %s", err, body)
	}
	return s
}

// proxy runs the mesh's own client against it until the test ends.
func (a *testAmbitd) proxy(node string, into *store.Store, counts *counter) (stop func()) {
	a.t.Helper()
	tokens, err := ca.OpenTokens(a.state, nil, nil)
	if err != nil {
		a.t.Fatal(err)
	}
	authority, err := ca.Open(ca.Config{TrustDomain: "cluster.local", StateDir: a.state})
	if err != nil {
		a.t.Fatal(err)
	}
	counts.next = into
	c, err := client.New(client.Config{
		Target: *a.xds.Load(),
		TLS: func() (*tls.Config, error) {
			return &tls.Config{RootCAs: authority.RootPool(), ServerName: "localhost"}, nil
		},
		Token: func() (string, error) {
			return tokens.Mint(ca.Caller{Namespace: "ambit-system", ServiceAccount: "ztunnel", PodName: "zt-" + node, PodUID: "u", Node: node}, "", time.Hour)
		},
		Node:    &discovery.Node{Id: "ztunnel~127.0.0.1~zt-" + node + ".ambit-system~x"},
		Types:   []string{api.AddressType, api.AuthorizationType},
		Handler: counts,
		Dial: func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", *a.xds.Load())
		},
	})
	if err != nil {
		a.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(a.ctx)
	donec := make(chan error, 1)
	go func() { donec <- c.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		<-donec // how it ended when told to end does not matter
	})
	a.t.Cleanup(stop)
	return stop
}

// counter counts the resources that a handler gets.
type counter struct {
	next client.Handler
	mu   sync.Mutex
	n    int
}

func (c *counter) Apply(d client.Delta) []client.Reject {
	c.mu.Lock()
	c.n += len(d.Added)
	c.mu.Unlock()
	return c.next.Apply(d)
}

func (c *counter) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func pod(name, account, node, ip string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: demo, uid: uid-%[1]s}
spec: {nodeName: %[3]s, serviceAccountName: %[2]s, containers: [{name: c, image: i}]}
status: {phase: Running, podIP: %[4]s, podIPs: [{ip: %[4]s}], conditions: [{type: Ready, status: "True"}]}
---
`, name, account, node, ip)
}

const policy = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-a, namespace: demo}
spec: {rules: [{from: [{source: {principals: [cluster.local/ns/demo/sa/a]}}]}]}
`

func TestFromADirectoryToAProxy(t *testing.T) {
	a := newTestAmbitd(t)
	a.write("pods.yaml", pod("p1", "a", "node-a", "10.0.0.1")+pod("p2", "b", "node-b", "10.0.0.2"))
	a.start()
	st, counts := store.New(store.Config{}), &counter{}
	a.proxy("node-a", st, counts)
	addr := netip.MustParseAddr("10.0.0.1")
	a.until("the pod is known", func() bool { return st.View().Mesh.WorkloadByAddr("", addr) != nil })
	if code, body := a.get("/ready"); code != 200 {
		t.Errorf("/ready: %d %s", code, body)
	}

	a.write("policy.yaml", policy)
	a.until("the policy is known", func() bool { return st.View().Policies.Get("demo/only-a") != nil })

	// A slip leaves the last good version in force and the neighbours alone.
	a.write("policy.yaml", strings.Replace(policy, "rules:", "rulez:", 1))
	a.until("the slip is reported", func() bool { return len(a.status().Problems) == 1 })
	if p := a.status().Problems[0]; p.Name != "only-a" || p.Line == 0 || !strings.Contains(p.Text, "rules") {
		t.Errorf("problem %+v", p)
	}
	if st.View().Policies.Get("demo/only-a") == nil {
		t.Error("the slip took the policy out of force")
	}
	a.write("policy.yaml", policy)
	a.until("the slip is gone", func() bool { return len(a.status().Problems) == 0 })
	a.until("in sync", func() bool { s := a.status(); return len(s.Proxies) == 1 && s.Proxies[0].Synced })
	s := a.status()
	if !s.Healthy() || s.Objects["Pod"] != 2 || s.Proxies[0].OnNode != "node-a" {
		t.Errorf("status %+v", s)
	}
	if n := strings.Count(a.log.String(), "object not in force as written"); n != 1 {
		t.Errorf("the slip is in the log %d times, want once", n)
	}

	// After a restart the proxy resumes and nothing is sent again.
	a.stop()
	before := counts.count()
	a.start()
	a.write("late.yaml", pod("p3", "a", "node-a", "10.0.0.3"))
	a.until("the later pod is known", func() bool {
		return st.View().Mesh.WorkloadByAddr("", netip.MustParseAddr("10.0.0.3")) != nil
	})
	if got := counts.count() - before; got != 1 {
		t.Errorf("%d resources after the restart, want only the one that came later", got)
	}
}

func TestRunningPodsDecideWhoGetsACertificate(t *testing.T) {
	a := newTestAmbitd(t)
	a.write("zt.yaml", pod("zt", "ztunnel", "node-a", "10.0.0.9"))
	a.write("pods.yaml", pod("p1", "a", "node-a", "10.0.0.1")+pod("p2", "b", "node-b", "10.0.0.2"))
	log := slog.New(slog.DiscardHandler)
	d, err := assemble(a.ctx, Config{Sources: []string{a.source}, StateDir: a.state, Listen: []string{"127.0.0.1:0"}, Monitoring: "127.0.0.1:0"}.withDefaults(), log, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(a.ctx)
	donec := make(chan error, 1)
	_, levels := boot.NewLogger(io.Discard, "", "")
	go func() { donec <- d.run(ctx, levels, prometheus.NewRegistry()) }()
	defer func() { cancel(); <-donec; d.close() }()
	<-d.pipe.derived
	rule := &trust{engine: d.pipe.engine, accounts: []string{"demo/ztunnel"}}
	onA := ca.Caller{Namespace: "demo", ServiceAccount: "ztunnel", PodName: "zt", PodUID: "uid-zt", Node: "node-a"}
	for account, want := range map[string]bool{"a": true, "b": false, "c": false} {
		id := identity.MustParse("spiffe://cluster.local/ns/demo/sa/" + account)
		if got, err := rule.Identity(onA, id.String()); (err == nil) != want || want && got != id {
			t.Errorf("node-a asks for %s: %v, %v", account, got, err)
		}
	}
	// When the pod is gone, so is the right to its identity.
	a.write("pods.yaml", pod("p2", "b", "node-b", "10.0.0.2"))
	a.until("refused", func() bool {
		_, err := rule.Identity(onA, "spiffe://cluster.local/ns/demo/sa/a")
		return err != nil
	})
	// The mesh configuration names another trust domain: identities follow it.
	a.write("mesh.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {mesh: 'trustDomain: corp.example'}\n")
	a.until("another trust domain", func() bool {
		id, err := rule.Identity(onA, "")
		return err == nil && id.TrustDomain() == "corp.example"
	})
	if _, err := rule.Identity(onA, "spiffe://cluster.local/ns/demo/sa/ztunnel"); err == nil {
		t.Error("signs for the trust domain before")
	}
	// A token dies with its pod.
	if err := os.Remove(filepath.Join(a.source, "zt.yaml")); err != nil {
		t.Fatal(err)
	}
	a.until("the node proxy is gone", func() bool { _, err := rule.Identity(onA, ""); return err != nil })
}

func TestMonitoringPages(t *testing.T) {
	a := newTestAmbitd(t)
	a.write("pods.yaml", pod("p1", "a", "node-a", "10.0.0.1")+"apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v, namespace: demo}\nspec: {hosts: [x]}\n")
	a.start()
	a.until("ready", func() bool { code, _ := a.get("/ready"); return code == 200 })
	for path, want := range map[string]string{
		"/metrics":                              "ambit_ambitd_source_objects 1",
		"/version":                              `"program":"ambitd"`,
		"/debug/resources":                      "Kubernetes//Pod/demo/p1",
		"/debug/resources?type=Address&name=p1": "Kubernetes//Pod/demo/p1",
		"/debug/resources?type=Address&name=none": "[",
		"/logging": "current log level",
		"/status":  `"VirtualService": 1`,
	} {
		code, body := a.get(path)
		if code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d, lacks %q: %.300s", path, code, want, body)
		}
		if strings.HasPrefix(path, "/debug") && !json.Valid([]byte(body)) {
			t.Errorf("%s is not JSON: %.300s", path, body)
		}
	}
	// Every pod reaches the port: under its name it answers metrics and readiness.
	for path, want := range map[string]int{"/metrics": 200, "/ready": 200, "/status": 403, "/debug/resources": 403, "/logging": 403} {
		req, err := http.NewRequest(http.MethodGet, "http://"+a.monitoring+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "ambitd.ambit-system:15014"
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != want {
			t.Errorf("%s for others: %d, want %d", path, resp.StatusCode, want)
		}
	}
	if !strings.Contains(a.log.String(), `kinds that this build does not enforce	kinds="VirtualService 1"`) {
		t.Error("the kind that is not enforced is not named in the log")
	}
	s := a.status()
	var b strings.Builder
	if err := s.WriteText(&b, s.Started.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ready, up 1m0s", "not enforced  VirtualService 1", "problems      0", "no proxy is connected"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("status lacks %q:\n%s", want, b.String())
		}
	}
}

func TestStartsThatCannotWorkSayWhy(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	source := t.TempDir()
	file := filepath.Join(source, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no source", func(c *Config) { c.Sources = nil }, "--source dir:PATH"},
		{"source missing", func(c *Config) { c.Sources = []string{filepath.Join(source, "none")} }, "create it"},
		{"source is a file", func(c *Config) { c.Sources = []string{file} }, "is a file"},
		{"no state directory", func(c *Config) { c.StateDir = "" }, "--state-dir"},
		{"state directory under a file", func(c *Config) { c.StateDir = filepath.Join(file, "x") }, "--state-dir"},
		{"xds port in use", func(c *Config) { c.Listen = []string{"127.0.0.1:0", busy.Addr().String()} }, "--listen"},
		{"monitoring port in use", func(c *Config) { c.Monitoring = busy.Addr().String() }, "--monitoring"},
		{"CA directory missing", func(c *Config) { c.CADir = filepath.Join(source, "none") }, "--ca-dir"},
		{"trust domain", func(c *Config) { c.TrustDomain = "Not/A/Domain" }, "trust domain"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := Config{Sources: []string{source}, StateDir: t.TempDir(), Listen: []string{"127.0.0.1:0"}, Monitoring: "127.0.0.1:0"}
			tt.change(&c)
			log, levels := boot.NewLogger(io.Discard, "text", "info")
			err := Run(t.Context(), c, log, levels, prometheus.NewRegistry())
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q", err, tt.want)
			}
		})
	}
}

// What a condition was about may be solved without the object going away.
func TestASolvedConditionLeavesTheStatus(t *testing.T) {
	a := newTestAmbitd(t)
	labelled := "apiVersion: v1\nkind: Namespace\nmetadata: {name: demo%s}\n"
	a.write("ns.yaml", fmt.Sprintf(labelled, ", labels: {istio.io/use-waypoint: wp}"))
	a.start()
	a.until("reported", func() bool { s := a.status(); return len(s.Problems) == 1 })
	if text := a.status().Problems[0].Text; !strings.HasPrefix(text, "Namespace demo: WaypointIsNotReady: ") {
		t.Errorf("the problem reads %q", text)
	}
	a.write("ns.yaml", fmt.Sprintf(labelled, ""))
	a.until("solved", func() bool { s := a.status(); return s.Changes == 2 && len(s.Problems) == 0 })
}

// A policy that is broken while ambitd is away is enforced as it was.
func TestARestartWithABrokenPolicyDoesNotWiden(t *testing.T) {
	a := newTestAmbitd(t)
	a.write("policy.yaml", policy)
	a.start()
	served := func() bool { return a.status().Resources["istio.security.Authorization"] == 2 } // with the static one
	a.until("served", served)
	a.stop()
	a.write("policy.yaml", strings.Replace(policy, "principals", "principalz", 1))
	a.start()
	a.until("served again", served)
	if s := a.status(); len(s.Problems) != 1 || !strings.Contains(s.Problems[0].Text, "did you mean \"principals\"?") {
		t.Errorf("problems: %v", s.Problems)
	}
	if log := a.log.String(); !strings.Contains(log, `its last good version is taken from before the restart	object="AuthorizationPolicy demo/only-a"`) {
		t.Errorf("not in the log:\n%s", log)
	}
}

// Dashboards and alerts depend on these names.
func TestExportedMetrics(t *testing.T) {
	golden.Run(t, "testdata/metrics.txtar", func(t *testing.T, ar *golden.Archive) {
		reg := prometheus.NewRegistry()
		c := Config{Sources: []string{t.TempDir()}, StateDir: t.TempDir(), Listen: []string{"127.0.0.1:0"}, Monitoring: "127.0.0.1:0"}.withDefaults()
		a, err := assemble(t.Context(), c, slog.New(slog.DiscardHandler), reg)
		if err != nil {
			t.Fatal(err)
		}
		defer a.close()
		ar.Want("metrics", golden.Metrics(reg))
	})
}
