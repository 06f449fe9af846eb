// Package e2e runs the whole thing as a user would: the built programs, a lab, the
// machine's own tools. It needs namespaces, nft and curl.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// programs are built once, as `make build` builds them.
var programs = []string{"./xds/cmd/ambitd", "./ztunnel/cmd/ztunnel", "./ebpf/cmd/ambit-node", "./ebpf/cmd/ambit-cni", "./test/cmd/ambit-lab", "./test/cmd/ambit-sample"}

var bin string // where they are; set by TestMain

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "ambit-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("go", append([]string{"build", "-o", dir + "/"}, programs...)...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build programs: %v\n%s", err, out)
		return 1
	}
	bin = dir
	return m.Run()
}

// lab is a running lab of one test.
type lab struct {
	t    *testing.T
	name string
}

type result struct {
	out, err string
	code     int
}

func (l *lab) try(stdin string, args ...string) result {
	l.t.Helper()
	return l.tryFor(2*time.Minute, stdin, args...)
}

// tryFor is try for commands that take long by themselves.
func (l *lab) tryFor(limit time.Duration, stdin string, args ...string) result {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), limit)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "ambit-lab"), append([]string{"--name", l.name}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	_ = cmd.Run() // the exit code tells
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

func (l *lab) must(args ...string) string {
	l.t.Helper()
	r := l.try("", args...)
	if r.code != 0 {
		l.t.Fatalf("ambit-lab %s: exit status %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r.out
}

func (l *lab) apply(yaml string) {
	l.t.Helper()
	if r := l.try(yaml, "apply", "-f", "-"); r.code != 0 {
		l.t.Fatalf("apply: exit status %d\n%s", r.code, r.err)
	}
}

// untilLimit is what a failure takes, however slow the machine.
const untilLimit = 90 * time.Second

// until tries for untilLimit; the last answer is in the failure.
func (l *lab) until(what string, try func() (bool, string)) {
	l.t.Helper()
	deadline := time.Now().Add(untilLimit)
	for {
		ok, seen := try()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("%s: not so after %v; seen last: %s", what, untilLimit, seen)
		}
	}
}

// The redirectors. Tests that have nothing to do with them, or need minutes, run
// with either: the one that the lab prefers.
const (
	eBPF     = "ebpf"
	nftables = "nftables"
	either   = "auto"
)

// each runs a test with both redirectors; AMBIT_REDIRECT=ebpf or nftables with that
// one alone.
func each(t *testing.T, test func(t *testing.T, redirect string)) {
	for _, redirect := range []string{eBPF, nftables} {
		t.Run(redirect, func(t *testing.T) {
			if only := os.Getenv("AMBIT_REDIRECT"); only != "" && only != redirect {
				return
			}
			if redirect == eBPF {
				netlab.RequireEBPF(t)
			}
			test(t, redirect)
		})
	}
}

// up starts a lab that ends with the test.
func up(t *testing.T, redirect string, args ...string) *lab {
	t.Helper()
	if only := os.Getenv("AMBIT_REDIRECT"); only != "" && redirect == either {
		redirect = only
	}
	l := &lab{t, fmt.Sprintf("e2e-%d-%s", os.Getpid(), t.Name())}
	r := l.try("", append([]string{"up", "--redirect", redirect}, args...)...)
	if r.code != 0 && strings.Contains(r.err, "this machine does not allow") {
		if netlab.Required() {
			t.Fatalf("AMBIT_TEST_REQUIRE wants labs: %s", r.err)
		}
		t.Skipf("%s", r.err)
	}
	if r.code != 0 {
		t.Fatalf("up: exit status %d\n%s%s", r.code, r.out, r.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, c := range []string{"lab", "ambitd", "ztunnel@node-1", "ztunnel@node-2", "ambit-node@node-1"} {
				t.Logf("%s:\n%s", c, l.quiet("logs", c, "--tail", "15"))
			}
		}
		l.quiet("down")
	})
	return l
}

// quiet works after the test's context has ended.
func (l *lab) quiet(args ...string) string {
	out, _ := exec.Command(filepath.Join(bin, "ambit-lab"), append([]string{"--name", l.name}, args...)...).CombinedOutput() // shown as it is
	return string(out)
}

// status is part of `status -o json`.
type status struct {
	Components []struct {
		Name  string
		Ready bool
		Pid   int
	}
}

func (l *lab) status() status {
	l.t.Helper()
	var s status
	l.decode(&s, "status", "-o", "json")
	return s
}

// decode reads what a command prints.
func (l *lab) decode(v any, args ...string) {
	l.t.Helper()
	out := l.must(args...)
	if err := json.Unmarshal([]byte(out), v); err != nil {
		l.t.Fatalf("ambit-lab %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// held is a command that goes on until the test has seen what it wants to.
type held struct {
	cmd      *exec.Cmd
	out, err bytes.Buffer
}

// hold starts a command in a pod.
func (l *lab) hold(args ...string) *held {
	l.t.Helper()
	h := &held{cmd: exec.Command(filepath.Join(bin, "ambit-lab"), append([]string{"--name", l.name, "exec"}, args...)...)}
	h.cmd.Stdout, h.cmd.Stderr = &h.out, &h.err
	if err := h.cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = h.cmd.Process.Kill() }) // one that ended is no matter
	return h
}

// end interrupts the command and returns what it said.
func (h *held) end() result {
	_ = h.cmd.Process.Signal(syscall.SIGINT) // it may have ended
	_ = h.cmd.Wait()                         // the exit code tells
	return result{h.out.String(), h.err.String(), h.cmd.ProcessState.ExitCode()}
}

// running lists the processes of programs of this run that name the lab or were
// started by it.
func running() []string {
	var found []string
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is valid
	for _, d := range dirs {
		exe, err := os.Readlink(d + "/exe")
		if err == nil && strings.HasPrefix(exe, bin) {
			found = append(found, filepath.Base(d)+" "+filepath.Base(exe))
		}
	}
	return found
}

func TestClusterWithoutMesh(t *testing.T) {
	l := up(t, either, "--no-mesh")
	l.must("apply", "-f", "echo")
	l.apply(headless)
	l.must("wait", "--timeout", "110s")
	tests := []struct {
		name, want string
		args       []string
	}{
		{"service by short name", `"method": "GET"`, []string{"curl", "-sS", "http://echo/"}},
		{"service by full name", `"method": "GET"`, []string{"curl", "-sS", "http://echo.default.svc.cluster.local/"}},
		{"IPv4", `"peer": "10.244.`, []string{"curl", "-4", "-sS", "http://echo/"}},
		{"headless pod by name", `"host": "db-1"`, []string{"curl", "-sS", "http://db-1.db:8080/"}},
		{"gRPC", `"proto":"gRPC"`, []string{"ambit-sample", "call", "grpc://echo:7070"}},
		{"server speaks first", "hello", []string{"ambit-sample", "call", "--greeting", "tcp://echo:9001"}},
		{"UDP", "hello", []string{"ambit-sample", "call", "udp://echo:9002"}},
		{"own host name", "client-", []string{"hostname"}},
		{"search domains", "default.svc.cluster.local", []string{"cat", "/etc/resolv.conf"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := l.try("", append([]string{"exec", "client", "--"}, tt.args...)...)
			if r.code != 0 || !strings.Contains(r.out, tt.want) {
				t.Errorf("exit status %d, output %q, errors %q; want %q in it", r.code, r.out, r.err, tt.want)
			}
		})
	}
	if _, err := os.Stat("/proc/net/if_inet6"); err == nil {
		if r := l.try("", "exec", "client", "--", "curl", "-6", "-sS", "http://echo/"); !strings.Contains(r.out, `"peer": "[fd00:`) {
			t.Errorf("over IPv6: %+v", r)
		}
	}
	if r := l.try("", "exec", "client", "--", "sh", "-c", "exit 7"); r.code != 7 {
		t.Errorf("exit status %d of a command that exits with 7", r.code)
	}
	if r := l.try("some input", "exec", "client", "--", "cat"); r.out != "some input" {
		t.Errorf("cat answers %q", r.out)
	}
	// The pod itself has no rule.
	if r := l.try("", "exec", "client", "--", "nft", "list", "ruleset"); strings.TrimSpace(r.out) != "" {
		t.Errorf("rules in a pod: %s", r.out)
	}
	if r := l.try("", "exec", "client", "--", "curl", "-sS", "--max-time", "5", "http://10.96.0.1/"); r.code == 0 {
		t.Error("an address that is no service answers")
	}
}

const headless = `
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: http, port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      containers:
      - {name: echo, image: echo, readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}
`

func TestPodsFollowTheirDeclaration(t *testing.T) {
	l := up(t, either, "--no-mesh", "--nodes", "1")
	l.apply(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: web, image: echo, livenessProbe: {httpGet: {path: /health, port: 8080}, periodSeconds: 1}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: once}
spec:
  template:
    spec:
      restartPolicy: Never
      containers: [{name: once, image: busybox, command: [sh, -c, "echo done by $NAME"], env: [{name: NAME, value: lab}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: strange}
spec: {containers: [{name: c, image: example.com/strange:1}]}
`)
	count := func() int { return strings.Count(l.must("get", "pods", "-l", "app=web", "-o", "name"), "pod/") }
	l.until("two replicas", func() (bool, string) { return count() == 2, l.must("get", "pods") })
	l.until("the job is done", func() (bool, string) {
		all := l.must("get", "pods")
		return strings.Contains(all, "Succeeded"), all
	})
	if out := l.must("logs", "once"); out != "done by lab\n" {
		t.Errorf("log of the job is %q", out)
	}
	l.until("the unknown image is named", func() (bool, string) {
		y := l.must("get", "pod", "strange", "-o", "yaml")
		return strings.Contains(y, "ErrImagePull") && strings.Contains(y, "ambit-sample"), y
	})
	l.until("all replicas run", func() (bool, string) {
		y := l.must("get", "pods", "-l", "app=web", "-o", "yaml")
		return strings.Count(y, "running:") == 2, y
	})
	l.must("kill", "web", "-s", "KILL")
	l.until("a killed container is started again", func() (bool, string) {
		y := l.must("get", "pods", "-l", "app=web", "-o", "yaml")
		return strings.Contains(y, "restartCount: 1"), y
	})
	if r := l.try("apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {selektor: {a: b}}\n", "apply", "-f", "-"); r.code == 0 || !strings.Contains(r.err, "selektor") {
		t.Errorf("a field that does not exist: %+v", r)
	}
	l.must("delete", "deployment", "web")
	l.until("no replica", func() (bool, string) { return count() == 0, l.must("get", "pods") })
}

func TestMesh(t *testing.T) { each(t, testMesh) }

func testMesh(t *testing.T, redirect string) {
	l := up(t, redirect)
	l.must("apply", "-f", "echo")
	l.must("wait", "--timeout", "110s")
	if r := l.try("", "up"); r.code != 0 || !strings.Contains(r.out, "runs already") {
		t.Errorf("a second up: %+v", r)
	}
	call := func(pod string) result {
		return l.try("", "exec", pod, "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "20", "http://echo/")
	}
	log := func(words ...string) bool {
		for line := range strings.SplitSeq(l.must("logs", "ztunnel@node-2"), "\n") {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				return true
			}
		}
		return false
	}
	l.must("label", "ns", "default", "istio.io/dataplane-mode=ambient")
	l.must("wait", "--timeout", "110s")
	l.until("mutual TLS", func() (bool, string) {
		r := call("client")
		return r.out == "200" && log("connection complete", "sa/client", "sa/echo", "inbound"), r.err
	})
	l.apply("apiVersion: v1\nkind: Pod\nmetadata: {name: outsider, namespace: outside}\nspec: {containers: [{name: c, image: curl}]}\n")
	l.must("wait", "-n", "outside", "--timeout", "110s")
	l.apply("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: default}\nspec: {mtls: {mode: STRICT}}\n")
	l.until("STRICT", func() (bool, string) {
		r := l.try("", "exec", "-n", "outside", "outsider", "--", "curl", "-sS", "--max-time", "5", "http://echo.default/")
		return r.code != 0 && log("STRICT"), r.out + r.err
	})
	if r := call("client"); r.out != "200" {
		t.Errorf("a mesh client under STRICT: %+v", r)
	}
	l.apply(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-client, namespace: default}
spec: {selector: {matchLabels: {app: echo}}, rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]}]}
`)
	l.until("stranger is denied", func() (bool, string) {
		r := call("stranger")
		return r.code != 0 && log("sa/stranger", "no ALLOW policy"), r.out + r.err
	})
	if r := call("client"); r.out != "200" {
		t.Errorf("an allowed client: %+v", r)
	}
	l.must("restart", "ztunnel@node-1")
	l.until("traffic after a restart", func() (bool, string) { r := call("client"); return r.out == "200", r.err })
	for _, c := range l.status().Components {
		if !c.Ready {
			t.Errorf("%s is not ready", c.Name)
		}
	}
}

func TestNothingStaysBehind(t *testing.T) {
	tests := []struct {
		name string
		end  func(l *lab)
	}{
		{"down", func(l *lab) { l.must("down") }},
		{"daemon killed", func(l *lab) { kill(l.t, "daemon") }},
		{"first process killed", func(l *lab) { kill(l.t, "sandbox-init") }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			mounts, links := read(t, "/proc/self/mounts"), read(t, "/proc/net/dev")
			l := up(t, either)
			l.must("apply", "-f", "echo")
			l.must("label", "ns", "default", "istio.io/dataplane-mode=ambient")
			l.must("wait", "--timeout", "110s")
			cgroup := l.cgroup()
			tt.end(l)
			l.until("no process is left", func() (bool, string) { r := running(); return len(r) == 0, strings.Join(r, ", ") })
			if now := read(t, "/proc/self/mounts"); now != mounts {
				t.Errorf("mounts changed:\n%s\nwere:\n%s", now, mounts)
			}
			if now := read(t, "/proc/net/dev"); strings.Count(now, "\n") != strings.Count(links, "\n") {
				t.Errorf("links changed:\n%s\nwere:\n%s", now, links)
			}
			// What the kernel does not take back: the cgroup, empty, until the next command.
			if tt.name != "down" {
				l.try("", "down")
			}
			if cgroup != "" {
				if left, err := find(cgroup); err != nil || len(left) > 0 {
					t.Errorf("cgroups left: %v, %v", left, err)
				}
			}
			// A process that is killed has no command line left a moment before its sockets are closed.
			l.until("status says that no lab runs", func() (bool, string) {
				r := l.try("", "status")
				return r.code != 0 && strings.Contains(r.err, "no lab runs"), fmt.Sprintf("%+v", r)
			})
		})
	}
}

// cgroup is the name of the directory of the lab's cgroup, "" without one.
func (l *lab) cgroup() string {
	l.t.Helper()
	out := l.try("", "exec", "node-1", "--", "grep", "^0::", "/proc/self/cgroup").out // none without cgroup2
	for elem := range strings.SplitSeq(out, "/") {
		if strings.HasPrefix(elem, "ambit-lab-") {
			return elem
		}
	}
	return ""
}

// find looks for cgroups of that name below the test's own, which the lab's was too.
func find(name string) ([]string, error) {
	dir, err := os.MkdirTemp("", "cgroup2-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(dir)
	own, err := netlab.MountCgroup2(dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }() // of this look alone
	return filepath.Glob(filepath.Join(own, name))
}

// kill ends one of the lab's own processes as a crash would. It is found by its
// command line, as the pid in status is the one inside.
func kill(t *testing.T, verb string) {
	t.Helper()
	for _, p := range running() {
		pid, name, _ := strings.Cut(p, " ")
		cmdline, _ := os.ReadFile("/proc/" + pid + "/cmdline") // others may just have ended
		if name == "ambit-lab" && strings.Contains(string(cmdline), "\x00"+verb+"\x00") {
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("no %s among %v", verb, running())
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The demo is what everybody runs, with eBPF where that is available; here it runs
// with the other redirector.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("short: the demo takes a minute")
	}
	up(t, either, "--no-mesh") // names what is missing where labs are not possible
	out, err := exec.Command(filepath.Join(bin, "ambit-lab"), "--name", fmt.Sprintf("demo-%d", os.Getpid()), "demo", "--redirect", nftables).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "checks passed, 0 failed") {
		t.Errorf("%v\n%s", err, out)
	}
}
