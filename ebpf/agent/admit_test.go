package agent_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
)

// attachment is what the runtime says about w.pod(uid), before any status has it.
func (w *world) attachment(uid, container string) attach.Attachment {
	p := w.pod(uid)
	return attach.Attachment{
		Network: "net", ContainerID: container, UID: uid, Namespace: p.Namespace, Name: p.Name, NetNS: p.NetNS,
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")},
	}
}

// starting is w.pod(uid) as the API has it then.
func (w *world) starting(uid string) agent.Pod {
	p := w.pod(uid)
	p.NetNS, p.Addrs = "", nil
	return p
}

type admission struct {
	inMesh bool
	why    string
	err    error
	waited time.Duration
}

// admit asks in the background, as the plugin does, for at most 30 s.
func (w *world) admit(a *agent.Agent, at attach.Attachment) <-chan admission {
	synctest.Wait() // until the agent has taken over what the source listed
	c := make(chan admission, 1)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	go func() {
		defer cancel()
		began := time.Now()
		inMesh, why, err := a.Admit(ctx, at)
		c <- admission{inMesh, why, err, time.Since(began)}
	}()
	return c
}

func waits(t *testing.T, why string, c <-chan admission) {
	t.Helper()
	synctest.Wait()
	select {
	case got := <-c:
		t.Fatalf("%s: the pod was answered %+v", why, got)
	default:
	}
}

func wantRefusal(t *testing.T, why string, got admission, texts ...string) {
	t.Helper()
	refusal, ok := errors.AsType[*attach.Refusal](got.err)
	if !ok || refusal.Final {
		t.Errorf("%s: %+v, want a refusal that is tried again", why, got)
		return
	}
	for _, text := range texts {
		if !strings.Contains(refusal.Error(), text) {
			t.Errorf("%s: %q does not say %q", why, refusal.Error(), text)
		}
	}
}

func TestPodStartsOnceItIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.hang = make(chan struct{})
		a := w.start()
		got := <-w.admit(a, w.attachment("hang", "c1"))
		wantRefusal(t, "the agent knows no pods yet", got, "pod shop/web-hang", "does not know the node's pods")
		if refusal, ok := errors.AsType[*attach.Refusal](got.err); !ok || !refusal.Unready || got.waited != 0 {
			t.Errorf("%+v, want to be told at once that facts decide", got)
		}
		if a.Ready() == nil {
			t.Error("ready before the source listed the pods")
		}
		w.pods <- nil
		c := w.admit(a, w.attachment("hang", "c1"))
		waits(t, "the source does not know the pod yet", c)
		if err := a.Ready(); err != nil {
			t.Error(err)
		}
		w.pods <- []agent.Pod{w.starting("hang")}
		waits(t, "the proxy has not acknowledged", c)
		close(w.hang)
		if got := <-c; got.err != nil || !got.inMesh || got.why != "labelled" {
			t.Errorf("%+v", got)
		}
		w.want("both families, by the runtime's addresses", "probes [10.0.0.7 fd00::7]", "add hang web", "apply inbound=true v6=true")
		w.wantStatus("hang", agent.Enabled, "")
		// Its status comes later and changes nothing.
		p := w.starting("hang")
		p.Addrs = []netip.Addr{netip.MustParseAddr("10.0.0.7")}
		w.pods <- []agent.Pod{p}
		synctest.Wait()
		w.mu.Lock()
		defer w.mu.Unlock()
		if slices.ContainsFunc(w.log, func(s string) bool { return strings.HasPrefix(s, "apply") || s == "release" || s == "del hang" }) {
			t.Errorf("done once more: %v", w.log)
		}
	})
}

func TestPodOutsideTheMeshStartsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		p := w.starting("a")
		p.Enrolled, p.Why = false, "no label"
		w.pods <- []agent.Pod{p}
		if got := <-w.admit(a, w.attachment("a", "c1")); got.err != nil || got.inMesh || got.why != "no label" || got.waited != 0 {
			t.Errorf("%+v", got)
		}
		// When it is labelled later, its namespace is known.
		w.pods <- []agent.Pod{w.starting("a")}
		w.want("enrolment", "probes [10.0.0.7 fd00::7]", "add a web", "apply inbound=true v6=true")
		w.wantStatus("a", agent.Enabled, "")
	})
}

func TestWhatIsMissingIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		w.pods <- nil
		got := <-w.admit(a, w.attachment("a", "c1"))
		wantRefusal(t, "unknown pod", got, "pod shop/web-a", "not heard of the pod", "--source")
		if got.waited != 30*time.Second {
			t.Errorf("waited %v", got.waited)
		}
		p := w.starting("a")
		p.Undecided, p.Enrolled = true, false
		w.pods <- []agent.Pod{p}
		wantRefusal(t, "unknown namespace", <-w.admit(a, w.attachment("a", "c1")), "does not know the namespace shop")
		w.failing("add a web", errors.New("no proxy is connected"))
		w.pods <- []agent.Pod{w.starting("a")}
		wantRefusal(t, "no proxy", <-w.admit(a, w.attachment("a", "c1")), "no proxy is connected", "ambit-node status")
		bare := w.attachment("a", "c2")
		bare.Addrs = nil
		w.pods <- []agent.Pod{w.starting("b")}
		bare.UID = "b"
		wantRefusal(t, "no address", <-w.admit(a, bare), "no address")
		gone := w.attachment("a", "c1")
		gone.NetNS = filepath.Join(w.dir, "nowhere")
		wantRefusal(t, "no namespace", <-w.admit(a, gone), "no such file", "mount propagation")
	})
}

// A pod of a namespace that the plugin excludes and the agent does not.
func TestPodThatDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		w.pods <- []agent.Pod{w.starting("a")}
		at := w.attachment("a", "c1")
		if err := a.Attach(t.Context(), at); err != nil {
			t.Fatal(err)
		}
		w.want("enrolled", "add a web", "apply inbound=true v6=true")
		at.UID, at.Name = "", "unknown"
		wantRefusal(t, "nobody knows it", admission{err: a.Attach(t.Context(), at)}, "shop/unknown")
	})
}

// A pod that leaves the mesh while it waits starts.
func TestPodThatIsUnlabelledWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.failing("add a web", errors.New("no proxy is connected"))
		a := w.start()
		w.pods <- []agent.Pod{w.starting("a")}
		c := w.admit(a, w.attachment("a", "c1"))
		waits(t, "no proxy", c)
		p := w.starting("a")
		p.Enrolled, p.Why = false, "no label"
		w.pods <- []agent.Pod{p}
		if got := <-c; got.err != nil || got.inMesh {
			t.Errorf("%+v", got)
		}
	})
}

// The runtime may remove an old sandbox after it has made the next one.
func TestSandboxMadeAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		w.pods <- []agent.Pod{w.starting("a")}
		old := w.attachment("a", "c1")
		if got := <-w.admit(a, old); got.err != nil {
			t.Fatal(got.err)
		}
		w.failing("add a web", errors.New("not yet"))
		next := old
		next.ContainerID, next.Addrs = "c2", []netip.Addr{netip.MustParseAddr("10.0.0.8")}
		c := w.admit(a, next)
		if got := <-c; got.err != nil || !got.inMesh { // the same namespace, which is served
			t.Fatalf("%+v", got)
		}
		if err := a.Detach(t.Context(), old); err != nil {
			t.Fatal(err)
		}
		w.want("the newest address counts", "probes [10.0.0.8]")
		synctest.Wait()
		w.wantStatus("a", agent.Enabled, "")
	})
}

func TestDetachLetsGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		w.pods <- []agent.Pod{w.starting("a")}
		at := w.attachment("a", "c1")
		if got := <-w.admit(a, at); got.err != nil {
			t.Fatal(got.err)
		}
		for range 2 {
			if err := a.Detach(t.Context(), at); err != nil {
				t.Fatal(err)
			}
		}
		w.want("the proxy lets go, and the rules stay as long as the namespace", "del a")
		w.wantStatus("a", "", "")
		p := w.starting("a") // still listed, with the address it had
		p.Addrs = at.Addrs
		w.pods <- []agent.Pod{p}
		synctest.Wait()
		w.wantStatus("a", "", "")
		w.mu.Lock()
		if slices.Contains(w.log, "release") || slices.Contains(w.log, "remove") {
			t.Errorf("capture ended before the namespace did: %v", w.log)
		}
		w.mu.Unlock()
		at.ContainerID = "c2" // kubelet tries again
		if got := <-w.admit(a, at); got.err != nil || !got.inMesh {
			t.Errorf("%+v", got)
		}
	})
}

func TestDetachedWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		w.pods <- nil
		at := w.attachment("a", "c1")
		c := w.admit(a, at)
		waits(t, "unknown pod", c)
		if err := a.Detach(t.Context(), at); err != nil {
			t.Fatal(err)
		}
		a.SnapshotResult("unknown", nil)
		wantRefusal(t, "detached", <-c, "removed or replaced")
	})
}

func TestCollectForgetsTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		w.pods <- []agent.Pod{w.starting("a"), w.starting("b"), w.starting("other")}
		for _, at := range []attach.Attachment{w.attachment("a", "c1"), w.attachment("b", "c2"), w.attachment("other", "c3")} {
			if at.UID == "other" {
				at.Network = "another"
			}
			if got := <-w.admit(a, at); got.err != nil {
				t.Fatal(got.err)
			}
		}
		if err := a.Collect(t.Context(), "net", []string{"c1"}); err != nil {
			t.Fatal(err)
		}
		w.want("the one that is not valid goes", "del b")
		w.wantStatus("b", "", "")
		w.wantStatus("a", agent.Enabled, "")
		w.wantStatus("other", agent.Enabled, "")
	})
}

func TestStaticPodsAndRuntimesWithoutUIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		static := w.starting("mirror")
		static.RuntimeUID = "config-hash"
		w.pods <- []agent.Pod{static, w.starting("a")}
		at := w.attachment("mirror", "c1")
		at.UID = "config-hash"
		if got := <-w.admit(a, at); got.err != nil || !got.inMesh {
			t.Errorf("static pod: %+v", got)
		}
		w.wantStatus("mirror", agent.Enabled, "")
		at = w.attachment("a", "c2")
		at.UID = ""
		if got := <-w.admit(a, at); got.err != nil || !got.inMesh {
			t.Errorf("no uid: %+v", got)
		}
		if err := a.Detach(t.Context(), attach.Attachment{ContainerID: "c2"}); err != nil {
			t.Fatal(err)
		}
		w.wantStatus("a", "", "")
	})
}

// The next agent finds what runtimes told the one before it.
func TestAttachmentsOutliveTheAgent(t *testing.T) {
	dir := t.TempDir()
	store, err := attach.OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	run := func(f func(w *world, a *agent.Agent)) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.store, w.dir = store, dir
			f(w, w.start())
		})
	}
	var pods []agent.Pod
	run(func(w *world, a *agent.Agent) {
		pods = []agent.Pod{w.starting("a"), w.starting("b")}
		w.pods <- pods
		for _, at := range []attach.Attachment{w.attachment("a", "c1"), w.attachment("b", "c2")} {
			if got := <-w.admit(a, at); got.err != nil {
				t.Fatal(got.err)
			}
		}
	})
	// b ends while no agent runs.
	if err := os.Remove(filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
	run(func(w *world, _ *agent.Agent) {
		w.pods <- pods
		w.want("in the first snapshot", "track a", "add a web", "apply inbound=true v6=true")
		w.wantStatus("a", agent.Enabled, "")
		w.wantStatus("b", "", "")
		// And one whose end nobody reports.
		if err := os.Remove(filepath.Join(dir, "a")); err != nil {
			t.Fatal(err)
		}
		w.want("noticed", "del a")
		time.Sleep(31 * time.Second) // the bubble's clock, until the next look at attachments
		w.wantStatus("a", "", "")
	})
}

func TestCheckRepairsOrSaysWhatIsWrong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.start()
		w.pods <- []agent.Pod{w.starting("a")}
		at := w.attachment("a", "c1")
		if got := <-w.admit(a, at); got.err != nil {
			t.Fatal(got.err)
		}
		w.want("enrolment", "apply inbound=true v6=true")
		if inMesh, _, err := a.Check(t.Context(), at); err != nil || !inMesh {
			t.Errorf("%t, %v", inMesh, err)
		}
		w.want("compared with the kernel", "check")
		w.failing("check", errors.New("gone"))
		w.failing("apply inbound=true v6=true", errors.New("the kernel says no"))
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, _, err := a.Check(ctx, at)
		wantRefusal(t, "damaged", admission{err: err}, "the kernel says no")
	})
}
