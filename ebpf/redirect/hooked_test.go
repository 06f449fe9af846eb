package redirect_test

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"

	"net/netip"
)

// What only hooks have to do with: cgroups, and pods that lack an address family.

// TestHooksProxyAmongPods has the proxy's cgroup below the pods' root, as when it is
// a pod itself.
func TestHooksProxyAmongPods(t *testing.T) {
	s := quietStage(t)
	s.cfg.CgroupRoot = parent(s.app.Path)
	s.open(t)
	t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "client")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	s.enrol(t)
	for _, a := range families() {
		client, pod := at(a.client, 8080), at(a.pod, 8080)
		for _, f := range []flow{
			{name: "app", to: client, line: fmt.Sprintf("15001 %s %s", client, a.pod)},
			{name: "client", ns: s.client.NS, to: pod, line: fmt.Sprintf("15006 %s %s", pod, a.client)},
			{name: "proxy to the world", cg: s.proxy, to: client, line: fmt.Sprintf("client %s %s", client, a.pod)},
			{name: "proxy to its app", cg: s.proxy, to: pod, line: fmt.Sprintf("app %s %s", pod, a.pod)},
		} {
			s.row(t, a.name+" "+f.name, nil, func() error { return s.flow(f) })
		}
	}
}

// TestHooksOutsideTheRoot has a process in the pod whose cgroup no hook is above:
// its connections are not captured, and the gate does not let them out.
func TestHooksOutsideTheRoot(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "client")
	s.enrol(t)
	for _, a := range families() {
		if c, err := connect(s.host, s.pod.NS, at(a.client, 8080), impatient); err == nil {
			t.Errorf("connection to %v was answered %q", a.client, c.line)
		}
	}
	drops, err := s.hooks.Drops()
	check(t, err)
	if drops["leak"] < uint64(len(families())) {
		t.Errorf("drops are %v, want a leak for each family", drops)
	}
}

// TestHooksOneFamily has a pod without IPv6 address: apps that try both go on to IPv4.
func TestHooksOneFamily(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	lone := netlab.MustHost(t, "lone")
	check(t, netlab.Cable(lone, "eth0", s.node, "lone"), lone.Up("eth0"), s.node.Up("lone"),
		lone.Addr("eth0", netip.MustParsePrefix("10.6.0.2/24")))
	if _, ok := errors.AsType[*redirect.UnsupportedError](s.hooks.Apply(lone.NS, redirect.PodRules{IPv6: true})); !ok {
		t.Error("IPv6 was promised to a pod that has none")
	}
	check(t, s.hooks.Apply(lone.NS, redirect.PodRules{}))
	if c, err := connect(s.app, lone.NS, at(clientV6, 8080), nil); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("connection to %v: %q, %v, want ENETUNREACH", clientV6, c.line, err)
	}
	if c, err := connect(s.app, lone.NS, at(clientV4, 8080), nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connection to %v: %q, %v, want ECONNREFUSED", clientV4, c.line, err)
	}
}
