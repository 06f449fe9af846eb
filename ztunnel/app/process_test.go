package app

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/fakexds"
	"github.com/ambit-mesh/ambit/test/netlab"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/boot"
)

type nopCloser struct{}

func (nopCloser) Close() error { return nil }

// process is a whole ztunnel with its control plane and agent, in one test.
type process struct {
	t     *testing.T
	logs  *logBuffer
	ready string // URL
	stats string
	admin string
	stop  context.CancelFunc
	donec chan error
}

var listening = regexp.MustCompile(`addr="([^"]+)"`)

func startProcess(t *testing.T, w *world, xds *fakexds.Server, node, uds string, flags ...string) *process {
	t.Helper()
	cfg, err := Parse(append([]string{"--node-name", node, "--xds-address", xds.Addr(), "--auth-token", "a.b.c", "--inpod-uds", uds,
		"--admin-addr", "127.0.0.1:0", "--stats-addr", "127.0.0.1:0", "--readiness-addr", "127.0.0.1:0",
		"--connection-termination-deadline", "1s", fmt.Sprintf("--ipv6-enabled=%v", w.v6)}, flags...), nil, io.Discard)
	w.check(err)
	p := &process{t: t, logs: &logBuffer{c: make(chan struct{})}, donec: make(chan error, 1)}
	log, levels := boot.NewLogger(p.logs, "text", "debug")
	reg := prometheus.NewRegistry()
	a := assemble(cfg, log, reg, w)
	a.ca, a.xdsTLS = nopCloser{}, xds.TLS
	ctx, cancel := context.WithCancel(context.Background())
	p.stop = cancel
	go func() { p.donec <- a.run(ctx, levels, reg) }()
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("log of the process:\n%s", p.logs.text())
		}
	})
	url := func(port string) string {
		return "http://" + listening.FindStringSubmatch(p.logs.want(t, "listening", `port="`+port+`"`))[1]
	}
	p.ready, p.stats, p.admin = url("readiness")+"/healthz/ready", url("metrics")+"/metrics", url("admin")
	return p
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// eventually polls what has no event to wait for.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(waitLimit)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestProcessFromStartToDrain(t *testing.T) {
	w := newWorld(t)
	w.addNode("node-2")
	b := w.addPod("b", "node-2")
	w.listen(b, 8080, whoami)
	a := w.addHost("a")
	rules, err := redirect.New(redirect.Config{})
	w.check(err, rules.Apply(a.NS, redirect.PodRules{IPv6: w.v6}))

	uds := filepath.Join(t.TempDir(), "zds.sock")
	agent, err := handoff.Listen(handoff.ServerConfig{Path: uds})
	w.check(err)
	actx, astop := context.WithCancel(context.Background())
	agentDone := make(chan error, 1)
	go func() { agentDone <- agent.Run(actx) }()
	defer func() { astop(); <-agentDone }()

	xds := fakexds.New(t)
	w.setWorkload(a, "node-1")
	for _, p := range []*testPod{a, b} {
		node := map[*testPod]string{a: "node-1", b: "node-2"}[p]
		m := w.workload(p, node)
		xds.Set(m.GetWorkload().Uid, m)
	}
	p := startProcess(t, w, xds, "node-1", uds)
	eventually(t, "ready", func() bool { code, _ := get(t, p.ready); return code == 200 })
	r, err := xds.Wait(context.Background(), func(r fakexds.Request) bool { return r.Node != nil })
	w.check(err)
	if id := r.Node.GetId(); !strings.HasPrefix(id, "ztunnel~") {
		t.Errorf("node id %q", id)
	}
	ns, err := a.NS.Dup()
	w.check(err, agent.Add(context.Background(), handoff.Pod{UID: "uid-a", Name: "a", Namespace: "default", ServiceAccount: "a", NS: ns}))
	addr := fmt.Sprintf("%s:8080", b.ip)
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")

	// The control plane goes away and comes back: connections do not notice.
	xds.Stop()
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
	xds.Restart(t)

	_, body := get(t, p.admin+"/config_dump")
	var dump struct {
		Workloads     []struct{ UID, Protocol string }
		Certificates  []struct{ Identity, State string }
		WorkloadState map[string]struct{ State string }
	}
	w.check(json.Unmarshal([]byte(body), &dump))
	if len(dump.Workloads) != 2 || dump.WorkloadState["uid-a"].State != "Up" || len(dump.Certificates) != 1 || dump.Certificates[0].State != "Available" {
		t.Errorf("config dump: %s", body)
	}
	if strings.Contains(body, "a.b.c") {
		t.Error("config dump shows the token")
	}
	_, body = get(t, p.stats)
	for _, want := range []string{
		`istio_tcp_connections_opened_total{connection_security_policy="mutual_tls",destination_app="b"`, `reporter="source",request_protocol="tcp",response_flags="-",source_app="a"`,
		`connection_security_policy="mutual_tls"`, "workload_manager_active_proxy_count 1", "istio_build", `istio_tcp_received_bytes_total{`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("metrics lack %s", want)
		}
	}

	// The agent goes away: not ready, and the pod is still served.
	astop()
	<-agentDone
	agentDone <- nil
	eventually(t, "not ready without the agent", func() bool {
		code, body := get(t, p.ready)
		return code == 500 && strings.Contains(body, "workload proxy manager")
	})
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")

	// The end: a live connection gets its second, then it is cut.
	c, err := w.dial(a, addr)
	w.check(err)
	_, err = c.Read(make([]byte, 64))
	w.check(err)
	p.stop()
	if _, err := io.ReadAll(c); err == nil {
		t.Error("connection ended in order, want a reset at the deadline")
	}
	if err := <-p.donec; err != nil {
		t.Errorf("run: %v", err)
	}
	p.logs.want(t, "connection closed due to connection drain")
	if got, err := w.ask(a, addr); err == nil {
		t.Errorf("served after the end: %q", got)
	}
}

func TestControlPlaneAwayAtStart(t *testing.T) {
	netlab.Require(t)
	w := newWorld(t)
	xds := fakexds.New(t)
	xds.Stop()
	p := startProcess(t, w, xds, "node-1", filepath.Join(t.TempDir(), "nobody.sock"))
	code, body := get(t, p.ready)
	if code != 500 || !strings.Contains(body, "state manager") {
		t.Errorf("readiness %d %s", code, body)
	}
	p.logs.want(t, "warn\txds")
	xds.Restart(t)
	eventually(t, "synced", func() bool { _, b := get(t, p.ready); return !strings.Contains(b, "state manager") })
	_, err := xds.Wait(context.Background(), func(r fakexds.Request) bool { return r.TypeUrl == api.AddressType })
	w.check(err)
	p.stop()
	w.check(<-p.donec)
}
