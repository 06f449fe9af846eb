package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/ambit-mesh/ambit/ebpf/cni"
	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/test/memnet"
)

func TestMain(m *testing.M) { leak.Main(m) }

// node is a plugin with a state directory and, from time to time, an agent.
type node struct {
	t      *testing.T
	dir    string
	stdout bytes.Buffer

	mu    sync.Mutex
	agent *memnet.Listener // nil: away
	heard []attach.Attachment
	calls []string

	admit func(ctx context.Context, a attach.Attachment) error
	ready error
}

func newNode(t *testing.T) *node { return &node{t: t, dir: t.TempDir()} }

func (n *node) Admit(ctx context.Context, a attach.Attachment) (bool, string, error) {
	n.mu.Lock()
	n.heard = append(n.heard, a)
	n.mu.Unlock()
	if n.admit == nil {
		return true, "", nil
	}
	return true, "", n.admit(ctx, a)
}

func (n *node) Check(ctx context.Context, a attach.Attachment) (bool, string, error) {
	return n.Admit(ctx, a)
}
func (n *node) Attach(_ context.Context, a attach.Attachment) error {
	n.calls = append(n.calls, fmt.Sprint("attach ", a.Pod(), a.Addrs))
	return nil
}

func (n *node) Detach(_ context.Context, a attach.Attachment) error {
	n.calls = append(n.calls, "detach "+a.ContainerID)
	return nil
}
func (n *node) Collect(_ context.Context, network string, valid []string) error {
	n.calls = append(n.calls, fmt.Sprint("collect ", network, valid))
	return nil
}
func (n *node) Ready() error { return n.ready }

// start brings the agent up until the test ends.
func (n *node) start() {
	ln := memnet.Listen(netip.MustParseAddrPort("127.0.0.1:1"))
	s := attach.Serve(ln, attach.ServerConfig{Handler: n})
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan error, 1)
	go func() { donec <- s.Run(ctx) }()
	n.t.Cleanup(func() {
		cancel()
		if err := <-donec; err != nil {
			n.t.Errorf("agent's socket: %v", err)
		}
	})
	n.mu.Lock()
	n.agent = ln
	n.mu.Unlock()
}

func (n *node) dial(ctx context.Context) (net.Conn, error) {
	n.mu.Lock()
	ln := n.agent
	n.mu.Unlock()
	if ln == nil {
		return nil, syscall.ECONNREFUSED
	}
	return ln.Dial(ctx, netip.MustParseAddr("127.0.0.2"))
}

func (n *node) facts(f attach.Facts) {
	n.t.Helper()
	w, err := attach.OpenFacts(n.dir)
	if err == nil {
		err = w.Write(f)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// prevResult has a field that no version of the specification knows, and an order
// of its own.
const prevResult = `{"vendor": {"z": 1, "a": 18446744073709551615},
	"ips": [{"interface": 1, "address": "10.0.0.7/24"}, {"address": "fd00::7/64", "interface": 1}, {"interface": 0, "address": "10.0.0.1/24"}],
	"interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/var/run/netns/c1"}], "cniVersion": "1.0.0"}`

const podArgs = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1"

// args is a call as a runtime makes it; fields are added to the plugin's entry.
func (n *node) args(cniArgs string, fields ...string) *skel.CmdArgs {
	entry := append([]string{`"cniVersion":"1.0.0"`, `"name":"net"`, `"type":"ambit-cni"`,
		fmt.Sprintf(`"stateDir":%q`, n.dir), `"prevResult":` + prevResult}, fields...)
	return &skel.CmdArgs{
		ContainerID: "c1", Netns: "/var/run/netns/c1", IfName: "eth0", Args: cniArgs,
		StdinData: []byte("{" + strings.Join(entry, ",") + "}"),
	}
}

func (n *node) plugin() *cni.Plugin { return &cni.Plugin{Stdout: &n.stdout, Dial: n.dial} }

func wantError(t *testing.T, why string, err error, code uint, texts ...string) {
	t.Helper()
	e, ok := errors.AsType[*types.Error](err)
	if !ok || e.Code != code {
		t.Errorf("%s: %v, want a CNI error of code %d", why, err, code)
		return
	}
	for _, text := range texts {
		if !strings.Contains(e.Error(), text) {
			t.Errorf("%s: %q does not say %q", why, e.Error(), text)
		}
	}
}

func TestPodOfTheMeshStartsWhenTheAgentSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.start()
		enrolled := make(chan struct{})
		n.admit = func(context.Context, attach.Attachment) error { <-enrolled; return nil }
		errc := make(chan error, 1)
		go func() { errc <- n.plugin().Add(t.Context(), n.args(podArgs)) }()
		time.Sleep(20 * time.Second) // the bubble's clock
		select {
		case err := <-errc:
			t.Fatalf("the pod started before the agent said so: %v", err)
		default:
		}
		close(enrolled)
		if err := <-errc; err != nil {
			t.Fatal(err)
		}
		if got := n.stdout.String(); got != prevResult {
			t.Errorf("result %q is not the one before, %q", got, prevResult)
		}
		want := attach.Attachment{Network: "net", ContainerID: "c1", UID: "u1", Namespace: "shop", Name: "web", NetNS: "/var/run/netns/c1",
			Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")}}
		if len(n.heard) != 1 || fmt.Sprint(n.heard[0]) != fmt.Sprint(want) {
			t.Errorf("the agent heard %+v, want %+v", n.heard, want)
		}
	})
}

func TestRefusalsReachTheRuntime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.start()
		n.admit = func(ctx context.Context, _ attach.Attachment) error {
			<-ctx.Done()
			return &attach.Refusal{Message: "pod shop/web waits for the mesh: no proxy is connected", Details: "is ztunnel running?"}
		}
		began := time.Now()
		err := n.plugin().Add(t.Context(), n.args(podArgs, `"timeoutSeconds":7`))
		wantError(t, "no proxy", err, types.ErrTryAgainLater, "shop/web", "no proxy is connected", "is ztunnel running?")
		if d := time.Since(began); d != 7*time.Second {
			t.Errorf("waited %v, want 7 s", d)
		}
		n.admit = func(context.Context, attach.Attachment) error { return &attach.Refusal{Message: "no", Final: true} }
		wantError(t, "a request that cannot succeed", n.plugin().Add(t.Context(), n.args(podArgs)), 100, "no")
		if n.stdout.Len() != 0 {
			t.Errorf("a result beside an error: %q", n.stdout.String())
		}
	})
}

func TestPodsThatNeverWait(t *testing.T) {
	n := newNode(t) // no agent, no facts
	for name, args := range map[string]*skel.CmdArgs{
		"kube-system":               n.args("K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns;K8S_POD_UID=u"),
		"the agent's own namespace": n.args("K8S_POD_NAMESPACE=ambit-system;K8S_POD_NAME=ztunnel;K8S_POD_UID=u"),
		"one that the entry names":  n.args(podArgs, `"excludeNamespaces":["shop"]`),
		"not Kubernetes":            n.args("IgnoreUnknown=1"),
		"no arguments at all":       n.args(""),
	} {
		n.stdout.Reset()
		if err := n.plugin().Add(t.Context(), args); err != nil || n.stdout.String() != prevResult {
			t.Errorf("%s: %v, result %q", name, err, n.stdout.String())
		}
	}
}

// The agent hears of them: its own flag may exclude less.
func TestAgentHearsOfExcludedPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.start()
		n.admit = func(ctx context.Context, _ attach.Attachment) error { <-ctx.Done(); return ctx.Err() }
		if err := n.plugin().Add(t.Context(), n.args(podArgs, `"excludeNamespaces":["shop"]`)); err != nil {
			t.Error(err)
		}
		if want := []string{"attach shop/web[10.0.0.7 fd00::7]"}; !slices.Equal(n.calls, want) {
			t.Errorf("calls %v, want %v", n.calls, want)
		}
	})
}

func TestWithoutTheAgentFactsDecide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		add := func(namespace, uid string) error {
			return n.plugin().Add(t.Context(), n.args("K8S_POD_NAMESPACE="+namespace+";K8S_POD_NAME=p;K8S_POD_UID="+uid))
		}
		wantError(t, "nothing is known", add("plain", "u"), types.ErrTryAgainLater, "plain/p", "facts", "is ambit-node running")
		n.facts(attach.Facts{Excluded: []string{"infra"}, Pods: map[string]bool{"in": true, "out": false},
			Namespaces: map[string]attach.Namespace{"shop": {InMesh: true}, "plain": {}}})
		began := time.Now()
		for _, p := range [][2]string{{"plain", "new"}, {"shop", "out"}, {"infra", "new"}} {
			if err := add(p[0], p[1]); err != nil {
				t.Errorf("%v: %v", p, err)
			}
		}
		if time.Since(began) != 0 {
			t.Error("pods outside the mesh waited for the agent")
		}
		wantError(t, "in the mesh", add("shop", "new"), types.ErrTryAgainLater, "shop/p", "the namespace is in the mesh", "does not answer")
		wantError(t, "in the mesh by its own label", add("plain", "in"), types.ErrTryAgainLater, "the pod is in the mesh")
		wantError(t, "unknown namespace", add("other", "new"), types.ErrTryAgainLater, "not known")
		if d := time.Since(began); d != 90*time.Second {
			t.Errorf("three pods waited %v, want 30 s each", d)
		}
	})
}

// An agent whose source is away knows no more than its facts.
func TestAgentThatIsNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.start()
		n.admit = func(context.Context, attach.Attachment) error {
			return &attach.Refusal{Message: "pod shop/web waits: nothing is listed", Details: "see there", Unready: true}
		}
		n.facts(attach.Facts{Namespaces: map[string]attach.Namespace{"shop": {}}})
		began := time.Now()
		if err := n.plugin().Add(t.Context(), n.args(podArgs)); err != nil || time.Since(began) != 0 {
			t.Errorf("outside the mesh: %v after %v", err, time.Since(began))
		}
		n.facts(attach.Facts{Namespaces: map[string]attach.Namespace{"shop": {InMesh: true}}})
		wantError(t, "in the mesh", n.plugin().Add(t.Context(), n.args(podArgs)), types.ErrTryAgainLater, "nothing is listed", "the namespace is in the mesh")
		if d := time.Since(began); d != 30*time.Second {
			t.Errorf("waited %v, want 30 s for the agent to become ready", d)
		}
	})
}

// A pod that waits starts as soon as the agent is there, in the same attempt.
func TestAgentThatComesIsFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.facts(attach.Facts{Namespaces: map[string]attach.Namespace{"shop": {InMesh: true}}})
		errc := make(chan error, 1)
		began := time.Now()
		go func() { errc <- n.plugin().Add(t.Context(), n.args(podArgs)) }()
		time.Sleep(10 * time.Second) // the bubble's clock
		n.start()
		if err := <-errc; err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 11*time.Second {
			t.Errorf("found after %v", d)
		}
	})
}

func TestDelAlwaysSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		bad := n.args(podArgs)
		bad.StdinData = []byte("{")
		for _, args := range []*skel.CmdArgs{n.args(podArgs), n.args(""), bad, n.args(podArgs, `"timeoutSeconds":-1`)} {
			if err := n.plugin().Del(t.Context(), args); err != nil {
				t.Errorf("without an agent: %v", err)
			}
		}
		n.start()
		noNetns := n.args(podArgs)
		noNetns.Netns = "" // as after a reboot
		if err := n.plugin().Del(t.Context(), noNetns); err != nil || !slices.Equal(n.calls, []string{"detach c1"}) {
			t.Errorf("%v, calls %v", err, n.calls)
		}
	})
}

func TestCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.start()
		if err := n.plugin().Check(t.Context(), n.args(podArgs)); err != nil || n.stdout.Len() != 0 {
			t.Errorf("%v, output %q", err, n.stdout.String())
		}
		n.admit = func(context.Context, attach.Attachment) error { return &attach.Refusal{Message: "rules are gone"} }
		wantError(t, "rules gone", n.plugin().Check(t.Context(), n.args(podArgs)), types.ErrTryAgainLater, "rules are gone")
	})
}

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		if err := n.plugin().Status(t.Context(), n.args("")); err != nil {
			t.Errorf("an agent that is away takes the node's network with it: %v", err)
		}
		strict := n.args("", `"strictStatus":true`)
		wantError(t, "away", n.plugin().Status(t.Context(), strict), 50, "does not answer", "ambit-node")
		n.start()
		if err := n.plugin().Status(t.Context(), strict); err != nil {
			t.Error(err)
		}
		n.ready = &attach.Refusal{Message: "the node agent does not know the node's pods yet"}
		wantError(t, "not ready", n.plugin().Status(t.Context(), strict), 50, "does not know the node's pods")
	})
}

func TestGC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		args := n.args("", `"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]`)
		if err := n.plugin().GC(t.Context(), args); err != nil {
			t.Errorf("without an agent: %v", err)
		}
		n.start()
		none := n.args("", `"cni.dev/valid-attachments":[]`)
		for _, a := range []*skel.CmdArgs{args, none, n.args("")} {
			if err := n.plugin().GC(t.Context(), a); err != nil {
				t.Error(err)
			}
		}
		if want := []string{"collect net[c1]", "collect net[]"}; !slices.Equal(n.calls, want) {
			t.Errorf("calls %v, want %v: a runtime that names none must not lose all", n.calls, want)
		}
	})
}

func TestBadConfiguration(t *testing.T) {
	n := newNode(t)
	for _, tc := range []struct {
		field string
		code  uint
		text  string
	}{
		{`"timeoutSeconds":1000`, types.ErrInvalidNetworkConfig, "timeoutSeconds: 1000"},
		{`"timeoutSeconds":-1`, types.ErrInvalidNetworkConfig, "timeoutSeconds: -1"},
		{`"timeoutSeconds":"long"`, types.ErrDecodingFailure, "timeoutSeconds"},
		{`"socket":"cni.sock"`, types.ErrInvalidNetworkConfig, "socket"},
		{`"prevResult":null`, types.ErrInvalidNetworkConfig, "no prevResult"},
		{`"prevResult":{"cniVersion":"1.0.0","ips":[{"address":"x"}]}`, types.ErrDecodingFailure, "prevResult"},
	} {
		wantError(t, tc.field, n.plugin().Add(t.Context(), n.args(podArgs, tc.field)), tc.code, tc.text)
	}
}

// Results of every version that the plugin claims to speak have their addresses read.
func TestResultsOfAllVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.start()
		for _, v := range cni.Versions().SupportedVersions() {
			result := fmt.Sprintf(`{"cniVersion":%q,"interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"version":"4","interface":0,"address":"10.0.0.7/24"}]}`, v)
			args := n.args(podArgs)
			args.StdinData = fmt.Appendf(nil, `{"cniVersion":%q,"name":"net","type":"ambit-cni","prevResult":%s}`, v, result)
			n.stdout.Reset()
			n.heard = nil
			if err := n.plugin().Add(t.Context(), args); err != nil || n.stdout.String() != result {
				t.Errorf("%s: %v, result %s", v, err, n.stdout.String())
			} else if got := n.heard[0].Addrs; !slices.Equal(got, []netip.Addr{netip.MustParseAddr("10.0.0.7")}) {
				t.Errorf("%s: addresses %v", v, got)
			}
		}
	})
}

// FuzzAdd: whatever a runtime sends, an enrolled pod's start is refused while there
// is no agent, unless it is not a pod or excluded.
func FuzzAdd(f *testing.F) {
	dir := f.TempDir()
	w, err := attach.OpenFacts(dir)
	if err == nil {
		err = w.Write(attach.Facts{Namespaces: map[string]attach.Namespace{"plain": {}}})
	}
	if err != nil {
		f.Fatal(err)
	}
	f.Add(podArgs, prevResult, "1.0.0")
	f.Add("K8S_POD_NAMESPACE=plain;K8S_POD_NAME=a", `{"ips":[]}`, "0.3.1")
	f.Add("K8S_POD_NAMESPACE==;;K8S_POD_NAME", `{"cniVersion":"0.4.0","ips":[{"version":"6","address":"::1/128","interface":-1}]}`, "0.4.0")
	f.Add("", "[]", "9")
	f.Fuzz(func(t *testing.T, args, prev, version string) {
		if !json.Valid([]byte(prev)) {
			t.Skip()
		}
		synctest.Test(t, func(t *testing.T) {
			var stdout bytes.Buffer
			p := cni.Plugin{Stdout: &stdout, Dial: func(context.Context) (net.Conn, error) { return nil, syscall.ECONNREFUSED }}
			err := p.Add(t.Context(), &skel.CmdArgs{ContainerID: "c", Netns: "/x", Args: args,
				StdinData: fmt.Appendf(nil, `{"cniVersion":%q,"name":"net","type":"ambit-cni","timeoutSeconds":1,"stateDir":%q,"prevResult":%s}`, version, filepath.Clean(dir), prev)})
			if _, ok := errors.AsType[*types.Error](err); err != nil && !ok {
				t.Errorf("not a CNI error: %v", err)
			}
			if err == nil && strings.Contains(";"+args+";", ";K8S_POD_NAMESPACE=shop;") && strings.Count(args, "K8S_POD_NAMESPACE") == 1 && strings.Contains(args, ";K8S_POD_NAME=web;") && strings.Count(args, "K8S_POD_NAME=") == 1 {
				t.Errorf("a pod of an unknown namespace started: %q", args)
			}
		})
	})
}
