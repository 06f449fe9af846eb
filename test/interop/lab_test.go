//go:build interop

package interop

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	bin    string // our programs; set by TestMain
	self   string // this program
	theirs = os.Getenv("AMBIT_INTEROP_ZTUNNEL")
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Verb {
		os.Exit(Main(os.Args[2:]))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if _, err := os.Stat(theirs); err != nil {
		fmt.Fprintln(os.Stderr, "AMBIT_INTEROP_ZTUNNEL must name the other proxy's program: make interop ZTUNNEL=/path/to/ztunnel:", err)
		return 2
	}
	dir, err := os.MkdirTemp("", "ambit-interop-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("go", "build", "-o", dir+"/", "./xds/cmd/ambitd", "./ztunnel/cmd/ztunnel", "./ebpf/cmd/ambit-node", "./ebpf/cmd/ambit-cni", "./test/cmd/ambit-lab", "./test/cmd/ambit-sample")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build programs: %v\n%s", err, out)
		return 1
	}
	bin = dir
	if self, err = os.Executable(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	results.print(os.Stdout)
	return code
}

// route is a direction: from a client's node to a server's.
type route struct{ name, from, to string }

func (r route) client() string { return "client-" + r.from }
func (r route) server() string { return "server-" + r.to }

// routes are the four directions. The first one is not interop: it says whether a
// case works at all.
var routes = []route{
	{"ours→ours", "node-1", "node-4"},
	{"ours→theirs", "node-1", "node-2"},
	{"theirs→ours", "node-2", "node-1"},
	{"theirs→theirs", "node-2", "node-3"},
}

// nodes by proxy.
var (
	allNodes   = []string{"node-1", "node-2", "node-3", "node-4"}
	ourNodes   = []string{"node-1", "node-4"}
	theirNodes = []string{"node-2", "node-3"}
)

// lab is a running lab of one test.
type lab struct {
	t     *testing.T
	name  string
	began map[string]int // restarts awaited, by component
}

type result struct {
	out, err string
	code     int
}

// up starts a lab of four nodes that ends with the test.
func up(t *testing.T, args ...string) *lab {
	t.Helper()
	l := &lab{t, fmt.Sprintf("interop-%d-%s", os.Getpid(), strings.ToLower(t.Name())), map[string]int{}}
	args = append([]string{"up", "--nodes", "4"}, args...)
	for _, n := range theirNodes {
		args = append(args, "--ztunnel", n+"="+theirs)
	}
	release := l.held()
	if r := l.do("", args...); r.code != 0 {
		release()
		t.Fatalf("up: exit status %d\n%s%s", r.code, r.out, r.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			l.keepLogs()
		}
		l.do("", "down")
		release()
	})
	return l
}

// held has the lab end also when this process is killed: what holds it reads a pipe
// that only this process writes to.
func (l *lab) held() (release func()) {
	l.t.Helper()
	cmd := l.command(context.Background(), "hold")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what a terminal tells this process is not for it
	life, err := cmd.StdinPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	return func() {
		_ = cmd.Process.Kill() // it has nothing to do any more
		_ = life.Close()
		_ = cmd.Wait() // killed
	}
}

// keepLogs copies the components' logs to where AMBIT_INTEROP_LOGS says.
func (l *lab) keepLogs() {
	dir := os.Getenv("AMBIT_INTEROP_LOGS")
	if dir == "" {
		return
	}
	for _, c := range []string{"lab", "ambitd"} {
		l.keepLog(dir, c)
	}
	for _, n := range allNodes {
		l.keepLog(dir, "ztunnel@"+n)
		l.keepLog(dir, "ambit-node@"+n)
	}
}

func (l *lab) keepLog(dir, component string) {
	if err := os.WriteFile(filepath.Join(dir, l.name+"-"+component+".log"), []byte(l.do("", "logs", component).out), 0o644); err != nil {
		l.t.Log(err)
	}
}

func (l *lab) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, filepath.Join(bin, "ambit-lab"), append([]string{"--name", l.name}, args...)...)
}

// do runs a command of the lab; it works after the test's context has ended.
func (l *lab) do(stdin string, args ...string) result {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := l.command(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	_ = cmd.Run() // the exit code tells
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

func (l *lab) must(t *testing.T, args ...string) string {
	t.Helper()
	r := l.do("", args...)
	if r.code != 0 {
		t.Fatalf("ambit-lab %s: exit status %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r.out
}

func (l *lab) apply(t *testing.T, yaml string) {
	t.Helper()
	if r := l.do(yaml, "apply", "-f", "-"); r.code != 0 || strings.Contains(r.err, "warning") {
		t.Fatalf("apply: exit status %d\n%s%s", r.code, r.out, r.err)
	}
}

// remove deletes what a text names; what is gone already is no fault.
func (l *lab) remove(yaml string) { l.do(yaml, "delete", "-f", "-") }

// traffic runs a case of this program in a pod: NAME or NAMESPACE/NAME.
func (l *lab) traffic(pod string, args ...string) result {
	return l.do("", append([]string{"exec", pod, "--", self, Verb}, args...)...)
}

func (l *lab) call(t *testing.T, pod string, args ...string) string {
	t.Helper()
	r := l.traffic(pod, args...)
	if r.code != 0 {
		t.Errorf("%s: %s: exit status %d: %s%s", pod, strings.Join(args, " "), r.code, r.out, r.err)
	}
	return strings.TrimSpace(r.out)
}

// until tries for a while; the last answer is in the failure.
func until(t *testing.T, limit time.Duration, what string, try func() (bool, string)) bool {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		ok, seen := try()
		if ok {
			return true
		}
		if time.Now().After(deadline) {
			t.Errorf("%s: not so after %s; seen last: %s", what, limit, seen)
			return false
		}
	}
}

// background is a case that runs beside the test.
type background struct {
	cmd   *exec.Cmd
	donec chan struct{}

	mu  sync.Mutex
	out bytes.Buffer // guarded by mu
}

// Write collects the output.
func (b *background) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.out.Write(p)
}

func (b *background) text() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.TrimSpace(b.out.String())
}

func (b *background) last() string {
	s := b.text()
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// begin starts a case and waits until it says its first line.
func (l *lab) begin(t *testing.T, pod string, args ...string) *background {
	t.Helper()
	b := &background{donec: make(chan struct{})}
	b.cmd = l.command(context.Background(), append([]string{"exec", pod, "--", self, Verb}, args...)...)
	b.cmd.Stdout, b.cmd.Stderr = b, b
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = b.cmd.Wait() // the text tells
		close(b.donec)
	}()
	t.Cleanup(func() { b.stop() })
	until(t, 20*time.Second, strings.Join(args, " ")+" begins", func() (bool, string) {
		time.Sleep(10 * time.Millisecond)
		return b.text() != "" || b.ended(0), b.text()
	})
	return b
}

func (b *background) ended(within time.Duration) bool {
	select {
	case <-b.donec:
		return true
	case <-time.After(within):
		return false
	}
}

// stop interrupts the case and returns its last line.
func (b *background) stop() string {
	_ = b.cmd.Process.Signal(syscall.SIGINT) // it may have ended
	if !b.ended(20 * time.Second) {
		_ = b.cmd.Process.Kill() // it does not listen
		<-b.donec
	}
	return b.last()
}

// load reads what a stopped load counted.
func (b *background) load(t *testing.T) Load {
	t.Helper()
	var l Load
	if out := b.stop(); json.Unmarshal([]byte(out), &l) != nil {
		t.Fatalf("the load says %q", b.text())
	}
	return l
}

// address finds a pod's address of a family: 4 or 6.
func (l *lab) address(t *testing.T, pod string, family int) string {
	t.Helper()
	return l.addresses(t, pod)[family]
}

func (l *lab) addresses(t *testing.T, pod string) map[int]string {
	t.Helper()
	ns, name := "default", pod
	if before, after, ok := strings.Cut(pod, "/"); ok {
		ns, name = before, after
	}
	var p struct {
		Status struct{ PodIPs []struct{ IP string } }
	}
	if err := json.Unmarshal([]byte(l.must(t, "get", "pod", name, "-n", ns, "-o", "json")), &p); err != nil {
		t.Fatal(err)
	}
	return families(p.Status.PodIPs)
}

func (l *lab) vips(t *testing.T, service string) map[int]string {
	t.Helper()
	var s struct{ Spec struct{ ClusterIPs []string } }
	if err := json.Unmarshal([]byte(l.must(t, "get", "service", service, "-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	var ips []struct{ IP string }
	for _, ip := range s.Spec.ClusterIPs {
		ips = append(ips, struct{ IP string }{ip})
	}
	return families(ips)
}

func families(ips []struct{ IP string }) map[int]string {
	m := map[int]string{}
	for _, ip := range ips {
		if strings.Contains(ip.IP, ":") {
			m[6] = ip.IP
		} else {
			m[4] = ip.IP
		}
	}
	return m
}

// logged is how much a component has logged.
func (l *lab) logged(component string) int { return len(l.do("", "logs", component).out) }

// lines are those logged after mark that have all the words; a log is written a
// moment after the connection it tells of.
func (l *lab) lines(mark int, component string, words ...string) []string {
	var found []string
	for deadline := time.Now().Add(3 * time.Second); len(found) == 0 && time.Now().Before(deadline); {
		text := l.do("", "logs", component).out
		for line := range strings.SplitSeq(text[min(mark, len(text)):], "\n") {
			all := true
			for _, w := range words {
				all = all && strings.Contains(line, w)
			}
			if all {
				found = append(found, line)
			}
		}
	}
	return found
}

// get asks a node's proxy over HTTP.
func (l *lab) get(t *testing.T, node, url string) string {
	t.Helper()
	return l.must(t, "exec", node, "--", "curl", "-sS", "--max-time", "10", url)
}
