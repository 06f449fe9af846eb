package app_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/app"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/test/netlab"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		os.Exit(playRole(role))
	}
	leak.Main(m)
}

func check(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// node is a directory of YAML, an agent over it, and pods with real namespaces.
type node struct {
	t     *testing.T
	dir   string
	rules *redirect.Dataplane
}

func newNode(t *testing.T) *node {
	t.Helper()
	netlab.Require(t)
	n := &node{t: t, dir: t.TempDir()}
	var err error
	n.rules, err = redirect.New(redirect.Config{})
	check(t, err, os.Mkdir(filepath.Join(n.dir, "source"), 0o755))
	return n
}

func (n *node) file(name string) string { return filepath.Join(n.dir, name) }

// write replaces a file of the source directory.
func (n *node) write(name, content string) {
	n.t.Helper()
	temp := n.file(name + ".tmp")
	check(n.t, os.WriteFile(temp, []byte(content), 0o644), os.Rename(temp, n.file("source/"+name)))
}

func (n *node) namespace(label string) {
	n.t.Helper()
	n.write("namespace.yaml", "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: {"+label+"}\n")
}

func (n *node) pod(uid string) *netlab.Host {
	n.t.Helper()
	h, err := netlab.New(uid, n.file("netns-"+uid))
	check(n.t, err)
	n.t.Cleanup(h.Close)
	n.write(uid+".yaml", fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: web-%s, namespace: shop, uid: %s, annotations: {ambit.dev/netns: %q}}
spec:
  nodeName: n1
  serviceAccountName: web
  containers: [{name: app, image: app}]
status:
  podIPs: [{ip: 10.0.0.1}]
`, uid, uid, h.Path()))
	return h
}

// run starts the real command, as main does.
func (n *node) run(args ...string) (stop func()) {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan int, 1)
	var out, errOut bytes.Buffer
	args = append([]string{
		"--source", "dir:" + n.file("source"), "--node", "n1", "--zds-path", n.file("zds.sock"),
		"--cni-socket", n.file("cni.sock"), "--state-dir", n.file("state"),
		"--status-dir", n.file("status"), "--health-addr", "127.0.0.1:0", "--redirect", "nftables", "--bpffs-dir", n.file("bpffs"),
		// The rule would be one of the machine that runs the test.
		"--host-probes=false", "--unenrol-propagation", "10ms", "--unenrol-drain", "10ms",
	}, args...)
	go func() { donec <- app.Main(ctx, args, &out, &errOut) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if code := <-donec; code != 0 {
			n.t.Errorf("the agent ended with status %d: %s", code, errOut.String())
		}
		if n.t.Failed() {
			n.t.Log(out.String())
		}
	})
	n.t.Cleanup(stop)
	return stop
}

func (n *node) wantStatus(uid string, want agent.Redirection) {
	n.t.Helper()
	last := []byte(nil)
	for range patience {
		data, err := os.ReadFile(n.file("status/" + uid + ".json"))
		last = data
		if errors.Is(err, os.ErrNotExist) && want == "" {
			return
		}
		var s agent.Status
		if err == nil && json.Unmarshal(data, &s) == nil && s.Redirection == want {
			return
		}
		time.Sleep(5 * time.Millisecond) // another process's file
	}
	n.t.Fatalf("status of %s is %q, want %q", uid, last, want)
}

func (n *node) wantRules(ns *netns.NS, want bool) {
	n.t.Helper()
	for range patience {
		present, err := n.rules.Present(ns)
		check(n.t, err)
		if present == want {
			return
		}
		time.Sleep(5 * time.Millisecond) // the kernel's state
	}
	n.t.Fatalf("rules present: %t, want %t", !want, want)
}

// ztunnel is a proxy that only keeps what it is given.
type ztunnel struct {
	events chan string
	mu     sync.Mutex
	pods   map[string]handoff.Pod
}

func (n *node) ztunnel() *ztunnel {
	z := &ztunnel{events: make(chan string, 100), pods: map[string]handoff.Pod{}}
	c := handoff.NewClient(handoff.ClientConfig{Path: n.file("zds.sock"), Handler: z})
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan error, 1)
	go func() { donec <- c.Run(ctx) }()
	n.t.Cleanup(func() {
		cancel()
		check(n.t, <-donec)
		for uid := range z.pods {
			check(n.t, z.DelPod(uid))
		}
	})
	return z
}

func (z *ztunnel) AddPod(_ context.Context, p handoff.Pod) error {
	z.mu.Lock()
	defer z.mu.Unlock()
	if old, ok := z.pods[p.UID]; ok {
		_ = old.NS.Close()
	}
	z.pods[p.UID] = p
	z.events <- fmt.Sprintf("add %s %s %s", p.UID, p.Name, p.ServiceAccount)
	return nil
}

func (z *ztunnel) DelPod(uid string) error {
	z.mu.Lock()
	defer z.mu.Unlock()
	if p, ok := z.pods[uid]; ok {
		_ = p.NS.Close()
		delete(z.pods, uid)
		z.events <- "del " + uid
	}
	return nil
}

func (z *ztunnel) SnapshotDone(known []string) { z.events <- fmt.Sprint("snapshot ", len(known)) }

func (z *ztunnel) want(t *testing.T, event string) {
	t.Helper()
	timeout := time.After(60 * time.Second)
	for {
		select {
		case got := <-z.events:
			if got == event {
				return
			}
		case <-timeout:
			t.Fatalf("ztunnel did not see %q", event)
		}
	}
}

func TestLabelledNamespaceJoinsAndLeaves(t *testing.T) {
	n := newNode(t)
	n.namespace("")
	pod := n.pod("u1")
	n.run()
	z := n.ztunnel()
	z.want(t, "snapshot 0")
	n.namespace("istio.io/dataplane-mode: ambient")
	z.want(t, "add u1 web-u1 web")
	n.wantStatus("u1", agent.Enabled)
	check(t, n.rules.Check(pod.NS, redirect.PodRules{}))
	z.mu.Lock()
	if z.pods["u1"].NS.Inode() != pod.NS.Inode() {
		t.Error("ztunnel got another namespace")
	}
	z.mu.Unlock()
	second := n.pod("u2")
	z.want(t, "add u2 web-u2 web")
	n.wantStatus("u2", agent.Enabled)

	n.namespace("")
	n.wantStatus("u1", "")
	n.wantStatus("u2", "")
	n.wantRules(pod.NS, false)
	n.wantRules(second.NS, false)
}

func TestRestartOfEitherSide(t *testing.T) {
	n := newNode(t)
	n.namespace("istio.io/dataplane-mode: ambient")
	pod := n.pod("u1")
	stop := n.run()
	n.wantStatus("u1", agent.Pending)
	n.wantRules(pod.NS, true) // closed until a proxy serves it
	z := n.ztunnel()
	n.wantStatus("u1", agent.Enabled)
	stop()
	n.wantStatus("u1", agent.Enabled) // pods stay in the mesh without an agent
	n.wantRules(pod.NS, true)
	for len(z.events) > 0 {
		<-z.events
	}
	// Somebody damages the rules meanwhile.
	check(t, n.rules.Release(pod.NS))
	n.run()
	z.want(t, "snapshot 1")
	n.wantStatus("u1", agent.Enabled)
	for range patience {
		if n.rules.Check(pod.NS, redirect.PodRules{}) == nil {
			return
		}
		time.Sleep(5 * time.Millisecond) // the kernel's state
	}
	t.Errorf("rules were not repaired: %v", n.rules.Check(pod.NS, redirect.PodRules{}))
}

func TestCleanupCommand(t *testing.T) {
	n := newNode(t)
	n.namespace("istio.io/dataplane-mode: ambient")
	pod := n.pod("u1")
	stop := n.run("--cleanup-on-exit")
	n.ztunnel()
	n.wantStatus("u1", agent.Enabled)
	stop()
	n.wantStatus("u1", "")
	n.wantRules(pod.NS, false)
}

// TestOneAgentAtATime has nobody else take away or write what an agent keeps.
func TestOneAgentAtATime(t *testing.T) {
	n := newNode(t)
	n.namespace("istio.io/dataplane-mode: ambient")
	n.pod("u1")
	stop := n.run()
	n.wantStatus("u1", agent.Pending) // it is at work
	cleanup := []string{"cleanup", "--status-dir", n.file("status"), "--bpffs-dir", n.file("bpffs")}
	another := []string{"run", "--source", "dir:" + n.file("source"), "--node", "n1", "--zds-path", n.file("other.sock"), "--status-dir", n.file("status")}
	for _, args := range [][]string{cleanup, another} {
		var out bytes.Buffer
		if code := app.Main(t.Context(), args, &out, &out); code != 1 || !strings.Contains(out.String(), "another ambit-node is at work there: stop it first") {
			t.Errorf("%s beside an agent: %d, %s", args[0], code, out.String())
		}
	}
	n.wantStatus("u1", agent.Pending)
	stop()
	var out bytes.Buffer
	if code := app.Main(t.Context(), cleanup, &out, &out); code != 0 {
		t.Errorf("cleanup after the agent: %d, %s", code, out.String())
	}
}

func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	status, err := agent.OpenStatusDir(filepath.Join(dir, "status"))
	check(t, err)
	run := func(args ...string) (int, string) {
		var out bytes.Buffer
		code := app.Main(t.Context(), args, &out, &out)
		return code, out.String()
	}
	if code, out := run("status", "--status-dir", filepath.Join(dir, "status")); code != 0 || !strings.Contains(out, "no pod") {
		t.Errorf("empty status: %d %q", code, out)
	}
	check(t, status.Write(agent.Status{
		UID: "u", Namespace: "shop", Name: "web", Redirection: agent.Pending, Reason: "no proxy", Via: "nftables", Since: time.Unix(0, 0).UTC(),
	}))
	want := "NAMESPACE   NAME   REDIRECTION   VIA        SINCE                  REASON\n" +
		"shop        web    pending       nftables   1970-01-01T00:00:00Z   no proxy\n"
	if code, out := run("status", "--status-dir", filepath.Join(dir, "status")); code != 0 || out != want {
		t.Errorf("status: %d\n%s\nwant\n%s", code, out, want)
	}
	var all struct {
		Node agent.NodeStatus
		Pods []agent.Status
	}
	if code, out := run("status", "-o", "json", "--status-dir", filepath.Join(dir, "status")); code != 0 || json.Unmarshal([]byte(out), &all) != nil || len(all.Pods) != 1 {
		t.Errorf("status as JSON: %d %s", code, out)
	}
	for _, tc := range []struct {
		args []string
		code int
		say  string
	}{
		{[]string{"version"}, 0, "ambit-node"},
		{[]string{"--help"}, 0, "ambit-node status"},
		{[]string{"dance"}, 2, `no command "dance"`},
		{[]string{"--no-such-flag"}, 2, "no-such-flag"},
		{[]string{"status", "extra"}, 2, "extra"},
		{[]string{"--source", "kube:", "--redirect", "magic"}, 1, "want dir:PATH"},
		{[]string{"--source", "kube:", "--redirect", "magic"}, 1, "want auto, ebpf or nftables"},
		{[]string{"--source", "kube:"}, 1, "--node is required"},
		{[]string{"--probe-ipv4", "x"}, 1, "--probe-ipv4"},
		{[]string{"status", "--status-dir", filepath.Join(dir, "nowhere")}, 1, "has the agent run"},
		{[]string{"status", "-o", "xml"}, 2, "want json or table"},
	} {
		if code, out := run(tc.args...); code != tc.code || !strings.Contains(out, tc.say) {
			t.Errorf("%v: status %d, %q; want %d and %q", tc.args, code, out, tc.code, tc.say)
		}
	}
}

func TestHealthAddressInUse(t *testing.T) {
	netlab.Require(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer ln.Close()
	dir := t.TempDir()
	var out bytes.Buffer
	code := app.Main(t.Context(), []string{
		"--source", "dir:" + dir, "--node", "n1", "--zds-path", filepath.Join(dir, "zds.sock"),
		"--cni-socket", "", "--state-dir", "",
		"--status-dir", dir, "--bpffs-dir", dir, "--redirect=nftables", "--host-probes=false", "--health-addr", ln.Addr().String(),
	}, &out, &out)
	if code != 1 || !strings.Contains(out.String(), "--health-addr") {
		t.Errorf("status %d, %q", code, out.String())
	}
}
