package agent_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
	"github.com/ambit-mesh/ambit/test/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

// world is everything around an agent, and writes down what is done to it. Tests
// run in a synctest bubble: its clock goes on when nobody has anything to do.
type world struct {
	t      *testing.T
	dir    string
	status *agent.StatusDir
	pods   chan []agent.Pod

	mu            sync.Mutex
	log           []string
	changed       chan struct{} // closed and replaced at each line
	fail          map[string]error
	present       bool
	uncaptured    redirect.Uncaptured
	uncapturedErr error
	node          uint64
	// resolves: the proxy answers DNS
	resolves atomic.Bool
	hang     chan struct{} // when set, Add of "hang" waits for it
	store    *attach.Store
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{
		t: t, dir: t.TempDir(), pods: make(chan []agent.Pod), changed: make(chan struct{}), fail: map[string]error{},
	}
	var err error
	if w.status, err = agent.OpenStatusDir(filepath.Join(w.dir, "status")); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) do(line string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, line)
	close(w.changed)
	w.changed = make(chan struct{})
	return w.fail[line]
}

func (w *world) failing(line string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail[line] = err
}

// want waits until the line was done after everything wanted before.
func (w *world) want(why string, lines ...string) {
	w.t.Helper()
	timeout := time.After(5 * time.Minute)
	for _, line := range lines {
		for {
			w.mu.Lock()
			i, changed := slices.Index(w.log, line), w.changed
			if i >= 0 {
				w.log = w.log[i+1:]
			}
			all := strings.Join(w.log, "; ")
			w.mu.Unlock()
			if i >= 0 {
				break
			}
			select {
			case <-changed:
			case <-timeout:
				w.t.Fatalf("%s: %q did not happen, only %q", why, line, all)
			}
		}
	}
}

// wantStatus waits for a pod's status; "" for none.
func (w *world) wantStatus(uid string, r agent.Redirection, reason string) agent.Status {
	w.t.Helper()
	var last string
	for range 5000 {
		all, err := w.status.List()
		if err != nil {
			w.t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(s agent.Status) bool { return s.UID == uid })
		if i < 0 && r == "" {
			return agent.Status{}
		}
		if i >= 0 && all[i].Redirection == r && strings.Contains(all[i].Reason, reason) {
			return all[i]
		}
		last = fmt.Sprintf("%+v", all)
		time.Sleep(2 * time.Millisecond) // the bubble's clock
	}
	w.t.Fatalf("status of %s is not %q with %q: %s", uid, r, reason, last)
	return agent.Status{}
}

// The world's parts, as the agent sees them.
type source struct{ *world }

func (s source) Run(ctx context.Context, update func([]agent.Pod)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case p := <-s.pods:
			update(p)
		}
	}
}

type proxies struct{ *world }

func (p proxies) Run(ctx context.Context) error           { _ = p.do("proxies let in"); <-ctx.Done(); return nil }
func (p proxies) Track(hp handoff.Pod) error              { return p.do("track " + hp.UID) }
func (p proxies) Del(_ context.Context, uid string) error { return p.do("del " + uid) }
func (p proxies) Add(ctx context.Context, hp handoff.Pod) error {
	if hp.UID == "hang" && p.hang != nil {
		select {
		case <-p.hang:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return p.do("add " + hp.UID + " " + hp.ServiceAccount)
}

type rules struct{ *world }

func (r rules) Apply(_ *netns.NS, p redirect.PodRules) error {
	line := fmt.Sprintf("apply inbound=%t v6=%t", !p.BypassInbound, p.IPv6)
	if p.DNS {
		line += " dns"
	}
	return r.do(line)
}
func (r rules) Check(*netns.NS, redirect.PodRules) error { return r.do("check") }
func (r rules) Release(*netns.NS) error                  { return r.do("release") }
func (r rules) Remove(*netns.NS) error                   { return r.do("remove") }
func (r rules) Present(*netns.NS) (bool, error)          { return r.present, nil }
func (r rules) Uncaptured(*netns.NS, redirect.PodRules) (redirect.Uncaptured, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.uncaptured, r.uncapturedErr
}
func (r rules) Reset(_ *netns.NS, sockets []sockdiag.Socket) (int, error) {
	if len(sockets) == 0 {
		return 0, nil
	}
	return len(sockets), r.do(fmt.Sprintf("reset %d", len(sockets)))
}

type host struct{ *world }

func (h host) Set(pods []netip.Addr) error { return h.do(fmt.Sprintf("probes %v", pods)) }

// start runs an agent in w.
func (w *world) start() *agent.Agent {
	w.t.Helper()
	a := agent.New(agent.Config{
		Source: source{w}, Proxies: proxies{w}, Rules: rules{w}, Host: host{w}, Status: w.status, NodeNS: w.node, Attachments: w.store,
		Resolves: func(*netns.NS) (bool, error) { return w.resolves.Load(), nil },
	})
	a.ByPath() // all pods are in the test's own namespace
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan error, 1)
	go func() { donec <- a.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-donec; err != nil {
			w.t.Errorf("agent ended with %v", err)
		}
	})
	return a
}

// pod is enrolled and lives in the test's own namespace, which nobody touches.
func (w *world) pod(uid string) agent.Pod {
	w.t.Helper()
	path := filepath.Join(w.dir, uid)
	if err := os.Symlink("/proc/self/ns/net", path); err != nil && !errors.Is(err, os.ErrExist) {
		w.t.Fatal(err)
	}
	return agent.Pod{
		UID: uid, Namespace: "shop", Name: "web-" + uid, ServiceAccount: "web", NetNS: path,
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Enrolled: true, Why: "labelled",
	}
}

// TestDNSIsCapturedOnceTheProxyAnswersIt: rules without a listener would cut the
// pod off from every name.
func TestDNSIsCapturedOnceTheProxyAnswersIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		p := w.pod("a")
		p.DNS = true
		w.pods <- []agent.Pod{p}
		w.want("a proxy that does not answer", "add a web", "apply inbound=true v6=false")
		w.wantStatus("a", agent.Enabled, "")
		w.resolves.Store(true)
		a.SnapshotResult("a", errors.New("gone")) // the next proxy answers
		w.want("listener first", "add a web", "apply inbound=true v6=false dns")
		p.DNS = false
		w.pods <- []agent.Pod{p}
		w.want("opted out", "apply inbound=true v6=false")
		p.DNS = true
		w.pods <- []agent.Pod{p}
		w.want("opted in", "apply inbound=true v6=false dns")
		w.resolves.Store(false)
		w.want("rules stay while the proxy restarts", "check")
		a.SnapshotResult("a", errors.New("gone")) // the next one does not
		w.want("a proxy that no longer answers", "add a web", "apply inbound=true v6=false")
	})
}

func TestEnrolThenUnenrol(t *testing.T) { synctest.Test(t, testEnrolThenUnenrol) }

func testEnrolThenUnenrol(t *testing.T) {
	w := newWorld(t)
	w.start()
	p := w.pod("a")
	w.pods <- []agent.Pod{p}
	w.want("enrolment, listeners first", "track a", "probes [10.0.0.1]", "add a web", "apply inbound=true v6=false")
	first := w.wantStatus("a", agent.Enabled, "labelled")
	if first.Since.IsZero() || first.Name != "web-a" || first.Namespace != "shop" {
		t.Errorf("status %+v", first)
	}
	p.BypassInbound, p.Addrs = true, append(p.Addrs, netip.MustParseAddr("fd00::1"))
	w.pods <- []agent.Pod{p}
	w.want("other rules", "probes [10.0.0.1 fd00::1]", "apply inbound=false v6=true")
	p.ServiceAccount = "other"
	w.pods <- []agent.Pod{p}
	w.want("other account", "add a other")
	p.Enrolled = false
	w.pods <- []agent.Pod{p}
	w.want("un-enrolment", "release", "del a", "remove", "probes []")
	w.wantStatus("a", "", "")
	p.Enrolled = true
	w.pods <- []agent.Pod{p}
	w.want("again", "add a other", "apply inbound=false v6=true")
	w.wantStatus("a", agent.Enabled, "")
}

func TestProxiesWaitForAllPods(t *testing.T) { synctest.Test(t, testProxiesWaitForAllPods) }

func testProxiesWaitForAllPods(t *testing.T) {
	w := newWorld(t)
	if err := w.status.Write(agent.Status{UID: "stale", Redirection: agent.Enabled}); err != nil {
		t.Fatal(err)
	}
	since := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	if err := w.status.Write(agent.Status{UID: "a", Redirection: agent.Enabled, Since: since}); err != nil {
		t.Fatal(err)
	}
	w.start()
	unknown := w.pod("b")
	unknown.NetNS = ""
	w.pods <- []agent.Pod{w.pod("a"), unknown}
	w.want("first snapshot before first proxy", "track a", "track b", "proxies let in")
	w.wantStatus("stale", "", "")
	w.wantStatus("b", agent.Pending, "not known yet")
	if got := w.wantStatus("a", agent.Enabled, "labelled"); !got.Since.Equal(since) {
		t.Errorf("a new agent says enabled since %v, want %v", got.Since, since)
	}
}

func TestRefusedPodIsRetried(t *testing.T) { synctest.Test(t, testRefusedPodIsRetried) }

func testRefusedPodIsRetried(t *testing.T) {
	w := newWorld(t)
	w.failing("add a web", &handoff.RejectedError{Reason: "port 15008 is taken"})
	a := w.start()
	w.pods <- []agent.Pod{w.pod("a")}
	w.want("captured without a proxy: closed, not open", "add a web", "apply inbound=true v6=false")
	w.wantStatus("a", agent.Pending, "port 15008 is taken")
	w.failing("add a web", nil)
	w.wantStatus("a", agent.Enabled, "")
	// A proxy that comes later and refuses does not make the pod one that clients
	// may reach in clear text.
	w.failing("add a web", errors.New("still no"))
	a.SnapshotResult("a", errors.New("no"))
	w.wantStatus("a", agent.Enabled, "still no")
	a.SnapshotResult("unknown", nil)
}

// While the next agent waits for the proxy, the pods of the one before it are
// captured as they were; clients that heard otherwise would send clear text.
func TestRestartedAgentKeepsPodsEnabled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		p := w.pod("a")
		if err := w.status.Write(agent.Status{UID: "a", Namespace: p.Namespace, Name: p.Name, NetNS: p.NetNS, Redirection: agent.Enabled, Reason: p.Why}); err != nil {
			t.Fatal(err)
		}
		w.failing("add a web", errors.New("no proxy is connected"))
		w.start()
		w.pods <- []agent.Pod{p}
		w.want("tried", "add a web")
		w.wantStatus("a", agent.Enabled, "no proxy is connected")
		w.failing("add a web", nil)
		w.wantStatus("a", agent.Enabled, p.Why)
	})
}

func TestFailingRulesAreRetried(t *testing.T) { synctest.Test(t, testFailingRulesAreRetried) }

func testFailingRulesAreRetried(t *testing.T) {
	w := newWorld(t)
	w.failing("apply inbound=true v6=false", &redirect.UnsupportedError{Feature: "nat", Err: errors.New("no")})
	w.start()
	w.pods <- []agent.Pod{w.pod("a")}
	w.wantStatus("a", agent.Pending, "does not support nat")
	w.failing("apply inbound=true v6=false", nil)
	w.want("repair", "apply inbound=true v6=false")
	w.wantStatus("a", agent.Enabled, "")
}

// What an earlier agent captured stays captured first: there the order is about
// rules that somebody may have damaged.
func TestCapturedPodKeepsItsRulesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.present = true
		w.start()
		w.pods <- []agent.Pod{w.pod("a")}
		w.want("rules first", "apply inbound=true v6=false", "add a web")
	})
}

func TestOneBadPodDelaysNobody(t *testing.T) { synctest.Test(t, testOneBadPodDelaysNobody) }

func testOneBadPodDelaysNobody(t *testing.T) {
	w := newWorld(t)
	w.hang = make(chan struct{})
	w.start()
	var pods []agent.Pod
	for i := range 40 {
		pods = append(pods, w.pod(fmt.Sprintf("p%d", i)))
	}
	missing := w.pod("missing")
	missing.NetNS = filepath.Join(w.dir, "nowhere")
	w.pods <- append([]agent.Pod{w.pod("hang"), missing}, pods...)
	for _, p := range pods {
		w.wantStatus(p.UID, agent.Enabled, "")
	}
	w.wantStatus("missing", agent.Pending, "no such file")
	close(w.hang)
	w.wantStatus("hang", agent.Enabled, "")
}

func TestPodGone(t *testing.T) { synctest.Test(t, testPodGone) }

func testPodGone(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.pods <- []agent.Pod{w.pod("a"), w.pod("b")}
	w.wantStatus("a", agent.Enabled, "")
	w.pods <- []agent.Pod{w.pod("b")}
	w.want("the proxy lets go", "del a")
	w.wantStatus("a", "", "")
	w.wantStatus("b", agent.Enabled, "")
}

func TestVanishedNamespaceIsDropped(t *testing.T) { synctest.Test(t, testVanishedNamespaceIsDropped) }

func testVanishedNamespaceIsDropped(t *testing.T) {
	w := newWorld(t)
	w.start()
	p := w.pod("a")
	w.pods <- []agent.Pod{p}
	w.wantStatus("a", agent.Enabled, "")
	if err := os.Remove(p.NetNS); err != nil {
		t.Fatal(err)
	}
	w.want("noticed without being told", "del a")
	w.wantStatus("a", agent.Pending, "no such file")
	w.pod("a")
	w.wantStatus("a", agent.Enabled, "")
}

func TestDamagedRulesAreRepaired(t *testing.T) { synctest.Test(t, testDamagedRulesAreRepaired) }

func testDamagedRulesAreRepaired(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.pods <- []agent.Pod{w.pod("a")}
	w.wantStatus("a", agent.Enabled, "")
	w.want("enrolment", "apply inbound=true v6=false")
	w.want("sound rules are left alone", "check", "check")
	w.failing("check", fmt.Errorf("%w: no table", redirect.ErrDrift))
	w.want("repair", "check", "apply inbound=true v6=false")
	w.wantStatus("a", agent.Enabled, "")
}

func TestNodesOwnNamespaceIsNoPods(t *testing.T) { synctest.Test(t, testNodesOwnNamespaceIsNoPods) }

func testNodesOwnNamespaceIsNoPods(t *testing.T) {
	w := newWorld(t)
	home, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	w.node = home.Inode()
	w.start()
	w.pods <- []agent.Pod{w.pod("a")}
	w.wantStatus("a", agent.Pending, "the node's own")
	w.mu.Lock()
	defer w.mu.Unlock()
	if slices.Contains(w.log, "apply inbound=true v6=false") {
		t.Error("rules were made in the node's namespace")
	}
}

func TestLeftoversOfAnEarlierAgent(t *testing.T) { synctest.Test(t, testLeftoversOfAnEarlierAgent) }

func testLeftoversOfAnEarlierAgent(t *testing.T) {
	w := newWorld(t)
	w.present = true
	w.start()
	p := w.pod("a")
	p.Enrolled = false
	w.pods <- []agent.Pod{p}
	// What the proxy carries for the pod has its time, also if an agent died meanwhile.
	w.want("un-enrolled while no agent ran", "release")
	released := time.Now()
	w.want("drained", "del a", "remove")
	if d := time.Since(released); d < handoff.DrainTime {
		t.Errorf("redirection was removed after %v, want at least %v", d, handoff.DrainTime)
	}
}

func TestCleanup(t *testing.T) {
	w := newWorld(t)
	p := w.pod("a")
	for _, s := range []agent.Status{
		{UID: "a", Redirection: agent.Enabled, NetNS: p.NetNS},
		{UID: "b", Redirection: agent.Pending, NetNS: filepath.Join(w.dir, "gone")},
	} {
		if err := w.status.Write(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(w.dir, "status", "a.older"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	n, err := agent.Cleanup(w.status, rules{w}, nil)
	if n != 2 || err != nil {
		t.Errorf("Cleanup: %d, %v; want 2 pods", n, err)
	}
	w.want("rules go", "remove")
	if left, err := w.status.List(); err != nil || len(left) != 0 {
		t.Errorf("statuses left: %v, %v", left, err)
	}
	if left, err := os.ReadDir(filepath.Join(w.dir, "status")); err != nil || len(left) != 0 {
		t.Errorf("files left: %v, %v", left, err)
	}
}

func TestStatusFilesStayInTheirDirectory(t *testing.T) {
	w := newWorld(t)
	for _, uid := range []string{"", ".", "..", "../x", "a/b", ".hidden", "a\x00b", strings.Repeat("a", 200)} {
		if err := w.status.Write(agent.Status{UID: uid}); err == nil {
			t.Errorf("uid %q was taken for a file name", uid)
		}
	}
	if err := os.WriteFile(filepath.Join(w.dir, "status", "bad.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.status.Write(agent.Status{UID: "good"}); err != nil {
		t.Fatal(err)
	}
	all, err := w.status.List()
	if len(all) != 1 || err == nil || !strings.Contains(err.Error(), "bad.json") {
		t.Errorf("List: %v, %v; want the good one and an error that names the bad one", all, err)
	}
}
