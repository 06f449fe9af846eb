package app_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/cni"
	"github.com/ambit-mesh/ambit/ebpf/cni/install"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// distributionPlugins is where Debian and others put the reference plugins.
const distributionPlugins = "/usr/lib/cni"

// runtimeNode is a node whose pods a container runtime attaches with real plugins, ours behind
// them: a machine of its own, and no pod yet.
type runtimeNode struct {
	*meshed
	machine *netlab.Host
	server  netip.AddrPort
	cni     *libcni.CNIConfig
	list    *libcni.NetworkConfigList
}

func newRuntime(t *testing.T, timeout int) *runtimeNode {
	t.Helper()
	for _, p := range []string{"ptp", "host-local"} {
		if _, err := os.Stat(filepath.Join(distributionPlugins, p)); err != nil {
			t.Skipf("needs the reference CNI plugins (Debian: containernetworking-plugins): %v", err)
		}
	}
	cg := netlab.MustCgroups(t, "app", "proxy")
	r := &runtimeNode{
		meshed:  &meshed{node: newNode(t), app: cg[0], proxy: cg[1], root: filepath.Dir(cg[0].Path), bpffs: filepath.Join(netlab.MustBPFFS(t), "ambit")},
		machine: netlab.MustHost(t, "machine"), server: netip.MustParseAddrPort("10.99.0.1:8080"),
	}
	check(t, r.machine.Forward(), r.machine.Addr("lo", netip.PrefixFrom(r.server.Addr(), 32)))
	ln, err := r.machine.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp4", r.server.String())
	check(t, err)
	donec := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-donec })
	go func() {
		defer close(donec)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(c, "plain")
			c.Close()
		}
	}()
	r.install(timeout)
	return r
}

// install lets the installer chain this binary, in another role, to a configuration
// as a primary plugin writes it.
func (r *runtimeNode) install(timeout int) {
	t := r.t
	t.Helper()
	self, err := os.Executable()
	check(t, err, os.Mkdir(r.file("net.d"), 0o755), os.WriteFile(r.file("program"),
		fmt.Appendf(nil, "#!/bin/sh\nGORACE=atexit_sleep_ms=0 %s=plugin exec %s\n", roleEnv, self), 0o755))
	conf := r.file("net.d/10-ptp.conflist")
	check(t, os.WriteFile(conf, fmt.Appendf(nil, `{
  "cniVersion": "1.0.0", "name": "pods",
  "plugins": [
    {"type": "ptp", "mtu": 1500, "ipam": {"type": "host-local", "dataDir": %q,
      "ranges": [[{"subnet": "10.22.0.0/24"}], [{"subnet": "fd22::/64"}]],
      "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}
  ]
}`, r.file("ipam")), 0o644))
	i, err := install.New(install.Config{
		Program: r.file("program"), BinDir: r.file("bin"), ConfDir: r.file("net.d"),
		Entry: cni.Config{Socket: r.file("cni.sock"), StateDir: r.file("state"), TimeoutSeconds: timeout},
	})
	check(t, err)
	check(t, i.Install())
	r.cni = libcni.NewCNIConfigWithCacheDir([]string{r.file("bin"), distributionPlugins}, r.file("cache"), nil)
	r.list, err = libcni.NetworkConfFromFile(conf)
	check(t, err)
}

// describe puts a pod into the source as the API has it before it has an address.
func (r *runtimeNode) describe(namespace, uid string) {
	r.t.Helper()
	r.write(uid+".yaml", fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: web-%s, namespace: %s, uid: %s}
spec:
  nodeName: n1
  containers: [{name: app, image: app}]
`, uid, namespace, uid))
}

func (r *runtimeNode) runtimeConf(namespace, uid string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: "sandbox-" + uid, NetNS: r.file("netns-" + uid), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", namespace}, {"K8S_POD_NAME", "web-" + uid}, {"K8S_POD_UID", uid}},
	}
}

// sandbox makes a pod's namespace.
func (r *runtimeNode) sandbox(uid string) *netlab.Host {
	r.t.Helper()
	h, err := netlab.New(uid, r.file("netns-"+uid))
	check(r.t, err)
	r.t.Cleanup(h.Close)
	return h
}

// add is the runtime's ADD, from the machine's namespace.
func (r *runtimeNode) add(ctx context.Context, namespace, uid string) (types.Result, error) {
	var result types.Result
	err := r.machine.NS.Do(func() (err error) {
		result, err = r.cni.AddNetworkList(ctx, r.list, r.runtimeConf(namespace, uid))
		return err
	})
	return result, err
}

func (r *runtimeNode) del(namespace, uid string) {
	r.t.Helper()
	check(r.t, r.machine.NS.Do(func() error {
		return r.cni.DelNetworkList(context.Background(), r.list, r.runtimeConf(namespace, uid))
	}))
}

// firstCall is the first thing that an app does in the pod.
func (r *runtimeNode) firstCall(pod *netlab.Host) (line string, err error) {
	err = within(r.app, pod.NS, func() error {
		fd, err := dial(r.server)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		line, err = read(fd)
		return err
	})
	return line, err
}

func (r *runtimeNode) agentOn(redirect string) *process {
	return r.process("agent", nil, r.machine.NS,
		"--source", "dir:"+r.file("source"), "--node", "n1", "--zds-path", r.file("zds.sock"),
		"--cni-socket", r.file("cni.sock"), "--state-dir", r.file("state"),
		"--status-dir", r.file("status"), "--health-addr", "", "--bpffs-dir", r.bpffs, "--redirect", redirect,
		"--cgroup-root", r.root, "--dns-capture=false",
		"--unenrol-propagation", "10ms", "--unenrol-drain", "10ms")
}

func wantRetry(t *testing.T, why string, err error, texts ...string) {
	t.Helper()
	e, ok := errors.AsType[*types.Error](err)
	if !ok || e.Code != types.ErrTryAgainLater {
		t.Fatalf("%s: %v, want to be told to try again", why, err)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %q does not say %q", why, err, text)
		}
	}
}

func TestPodStartsCaptured(t *testing.T) {
	for _, redirect := range []string{"ebpf", "nftables"} {
		t.Run(redirect, func(t *testing.T) { testPodStartsCaptured(t, redirect) })
	}
}

func testPodStartsCaptured(t *testing.T, redirect string) {
	r := newRuntime(t, 60)
	r.namespace("istio.io/dataplane-mode: ambient")
	r.describe("shop", "u1")
	pod := r.sandbox("u1")
	r.agentOn(redirect)
	type added struct {
		result types.Result
		err    error
	}
	donec := make(chan added, 1)
	go func() {
		result, err := r.add(t.Context(), "shop", "u1")
		donec <- added{result, err}
	}()
	r.wantVia(agent.Pending, redirect, "no proxy is connected")
	select {
	case got := <-donec:
		t.Fatalf("the pod may start without a proxy: %+v", got)
	default:
	}
	r.startProxy(r.proxy)
	got := <-donec
	check(t, got.err)
	// The very first connection, with nothing in between.
	if line, err := r.firstCall(pod); err != nil || line != "15001 "+r.server.String() {
		t.Errorf("the pod's first connection was answered %q, %v; want the proxy", line, err)
	}
	result, err := types100.NewResultFromResult(got.result)
	check(t, err)
	if len(result.IPs) != 2 || len(result.Interfaces) != 2 {
		t.Errorf("the runtime got %+v, want ptp's result", result)
	}
	r.wantVia(agent.Enabled, redirect, "label")
	check(t, r.machine.NS.Do(func() error {
		return r.cni.CheckNetworkList(t.Context(), r.list, r.runtimeConf("shop", "u1"))
	}))
	r.del("shop", "u1")
	r.wantStatus("u1", "")
}

// After a reboot pods of the mesh wait for the agent, and others do not.
func TestNodeStartsWithoutTheAgent(t *testing.T) {
	r := newRuntime(t, 1)
	r.namespace("istio.io/dataplane-mode: ambient")
	r.write("plain.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: plain}\n")
	r.describe("shop", "u1")
	r.describe("plain", "u2")
	for _, uid := range []string{"u1", "u2", "u3", "u4", "u5"} {
		r.sandbox(uid)
	}
	_, err := r.add(t.Context(), "plain", "u2")
	wantRetry(t, "a node that never had an agent", err, "plain/web-u2", "does not answer")
	r.del("plain", "u2")
	a := r.agentOn("nftables")
	for range 100 { // until the agent is there
		_, err = r.add(t.Context(), "shop", "u1")
		r.del("shop", "u1")
		if err == nil || strings.Contains(err.Error(), "no proxy") {
			break
		}
	}
	wantRetry(t, "no proxy", err, "shop/web-u1", "no proxy is connected", "ambit-node status")
	a.stop(t)
	for uid, namespace := range map[string]string{"u2": "plain", "u3": "plain", "u4": "kube-system"} {
		began := time.Now()
		if _, err := r.add(t.Context(), namespace, uid); err != nil {
			t.Errorf("%s/web-%s does not start without the agent after %v: %v", namespace, uid, time.Since(began), err)
		}
	}
	_, err = r.add(t.Context(), "shop", "u1")
	wantRetry(t, "a pod of the mesh", err, "shop/web-u1", "the pod is in the mesh")
	r.del("shop", "u1")
	_, err = r.add(t.Context(), "shop", "u5")
	wantRetry(t, "one that was made meanwhile", err, "shop/web-u5", "the namespace is in the mesh")
	r.del("shop", "u5")
	r.agentOn("nftables")
	r.startProxy(r.proxy)
	for range 100 { // as kubelet does
		if _, err = r.add(t.Context(), "shop", "u1"); err == nil {
			break
		}
		r.del("shop", "u1")
	}
	check(t, err)
	r.wantVia(agent.Enabled, "nftables", "label")
}
