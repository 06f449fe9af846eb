package redirect_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// flow is one connection and what both ends of it have to see.
type flow struct {
	name    string
	cg      *netlab.Cgroup // default: the app's
	ns      *netns.NS      // default: the pod's
	to      netip.AddrPort
	prepare func(fd int) error
	peer    netip.AddrPort // what getpeername tells; none: to
	line    string         // what the accepting side tells; the beginning of it, if it ends in a space
	local   netip.Addr     // what getsockname tells; none: anything
	port    uint16         // and its port, if given
	limits  limits
}

func (s *stage) flow(f flow) error {
	cg, ns := s.app, s.pod.NS
	if f.cg != nil {
		cg = f.cg
	}
	if f.ns != nil {
		ns = f.ns
	}
	c, err := connect(cg, ns, f.to, f.prepare)
	if err != nil {
		return fmt.Errorf("connect to %v: %w, want an answer by %q", f.to, err, f.line)
	}
	if c.line != f.line && !(strings.HasSuffix(f.line, " ") && strings.HasPrefix(c.line, f.line)) {
		return fmt.Errorf("connection to %v was answered %q, want %q", f.to, c.line, f.line)
	}
	if !f.peer.IsValid() {
		f.peer = f.to
	}
	if c.peer != f.peer {
		return fmt.Errorf("getpeername tells %v, want %v", c.peer, f.peer)
	}
	if f.local.IsValid() && c.local.Addr() != f.local || f.port != 0 && c.local.Port() != f.port {
		return fmt.Errorf("getsockname tells %v, want %v port %d", c.local, f.local, f.port)
	}
	return nil
}

// row runs one line of a table. A line that a redirector cannot pass has to name one
// of its limits, and to fail: a limit that is none any more is to be deleted.
func (s *stage) row(t *testing.T, name string, of limits, run func() error) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		t.Helper()
		err := run()
		limit, limited := of[s.kind]
		switch {
		case errors.Is(err, unix.EPROTONOSUPPORT):
			t.Skipf("the kernel has no such sockets: %v", err)
		case !limited && err != nil:
			t.Error(err)
		case limited && err == nil:
			t.Errorf("%s passes although a limit of it is: %s", s.kind, limit)
		case limited && !slices.Contains(s.redirector.Limits(), limit):
			t.Errorf("%v, and the limits of %s do not say: %s", err, s.kind, limit)
		case limited:
			t.Logf("%s, as expected (%v)", limit, err)
		}
	})
}

// TestFlows has one pod enrolled. What it opens the proxy gets with the address that
// the app wanted; so does what is opened to it.
func TestFlows(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.listenProxy(t)
		for name, h := range map[string]*netlab.Host{"client": s.client, "node": s.node, "near": s.near, "app": s.pod} {
			cg := s.app
			if h == s.node {
				cg = s.host
			}
			answer(t, listen(t, cg, h.NS, "[::]:8080", nil), name)
		}
		answer(t, listen(t, s.app, s.pod.NS, "[::]:8081", func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0x77) })
			return errors.Join(cerr, err)
		}), "marked")
		s.enrol(t)
		for _, a := range families() {
			t.Run(a.name, func(t *testing.T) {
				for _, f := range s.flows(a) {
					s.row(t, f.name, f.limits, func() error { return s.flow(f) })
				}
			})
		}
	})
}

func (s *stage) flows(a family) []flow {
	outbound := func(to netip.AddrPort) string { return fmt.Sprintf("15001 %s %s", to, a.pod) }
	inbound := func(to netip.AddrPort, from netip.Addr) string { return fmt.Sprintf("15006 %s %s", to, from) }
	client, pod, elsewhere := at(a.client, 8080), at(a.pod, 8080), at(a.vip, 80)
	all := []flow{
		{name: "pod to pod of another node", to: client, local: a.pod, line: outbound(client)},
		{name: "pod to pod of the same node", to: at(a.near, 8080), local: a.pod, line: outbound(at(a.near, 8080))},
		{name: "pod to its host", to: at(a.node, 8080), local: a.pod, line: outbound(at(a.node, 8080))},
		{name: "pod to virtual address", to: elsewhere, local: a.pod, line: outbound(elsewhere)},
		{name: "pod to nobody", to: at(a.client, 9999), local: a.pod, line: outbound(at(a.client, 9999))},
		{name: "pod to the proxy's port elsewhere", to: at(a.client, redirect.PortHBONE), line: outbound(at(a.client, redirect.PortHBONE))},
		{name: "pod to loopback", to: at(a.loopback, 8080), local: a.loopback, line: fmt.Sprintf("app %s %s", at(a.loopback, 8080), a.loopback)},
		{name: "pod to itself", to: pod, local: a.pod, line: fmt.Sprintf("app %s %s", pod, a.pod)},

		{name: "own address bound", to: client, local: a.pod, prepare: bindTo(at(a.pod, 0)), line: outbound(client)},
		{name: "own address and port bound", to: client, local: a.pod, port: 33001, prepare: bindTo(at(a.pod, 33001)), line: outbound(client)},
		{name: "port bound", to: client, local: a.pod, port: 33002, prepare: bindTo(at(a.any, 33002)), line: s.portBound(a, client)},
		{name: "device bound", to: client, local: a.pod, line: outbound(client),
			prepare: func(fd int) error { return both(unix.BindToDevice(fd, "eth0"), impatient(fd)) },
			limits:  limits{byRules: redirect.LimitDevice, byMarks: redirect.LimitDevice}},

		{name: "client to pod", ns: s.client.NS, to: pod, local: a.client, line: inbound(pod, a.client)},
		{name: "neighbour to pod", ns: s.near.NS, to: pod, local: a.near, line: inbound(pod, a.near)},
		{name: "client to a port without listener", ns: s.client.NS, to: at(a.pod, 9999), line: inbound(at(a.pod, 9999), a.client)},
		{name: "client to the proxy's outbound port", ns: s.client.NS, to: at(a.pod, 15001), line: inbound(at(a.pod, 15001), a.client)},
		{name: "client to the proxy's plaintext port", ns: s.client.NS, to: at(a.pod, 15006), line: inbound(at(a.pod, 15006), a.client)},
		{name: "client to the proxy's port for names", ns: s.client.NS, to: at(a.pod, 15053), line: inbound(at(a.pod, 15053), a.client)},
		{name: "client to HBONE", ns: s.client.NS, to: at(a.pod, 15008), line: fmt.Sprintf("15008 %s %s", at(a.pod, 15008), a.client)},
		{name: "host to pod, as probes do", cg: s.host, ns: s.node.NS, to: pod, line: fmt.Sprintf("app %s %s", pod, s.nodeProbe(a.pod))},

		{name: "proxy to the world", cg: s.proxy, prepare: asProxy, to: client, local: a.pod, line: fmt.Sprintf("client %s %s", client, a.pod)},
		{name: "proxy to its app", cg: s.proxy, prepare: asProxy, to: pod, line: fmt.Sprintf("app %s %s", pod, a.pod)},
		{name: "proxy to its app as the client", cg: s.proxy, to: pod, local: a.client, line: fmt.Sprintf("app %s %s", pod, a.client),
			prepare: func(fd int) error { return both(asProxy(fd), unix.Bind(fd, sockaddr(at(a.client, 0)))) }},
		{name: "proxy to an app that marks its listener", cg: s.proxy, to: at(a.pod, 8081), local: a.client, line: fmt.Sprintf("marked %s %s", at(a.pod, 8081), a.client),
			prepare: func(fd int) error {
				return errors.Join(asProxy(fd), impatient(fd), unix.Bind(fd, sockaddr(at(a.client, 0))))
			}, limits: limits{byHooks: redirect.LimitListener}},

		{name: "not enrolled to not enrolled", ns: s.near.NS, to: client, local: a.near, line: fmt.Sprintf("client %s %s", client, a.near)},
	}
	if a.pod.Is4() {
		for _, f := range all[:4] {
			f.name += ", in an IPv6 socket"
			f.to, f.local = at(mapped(f.to.Addr()), f.to.Port()), mapped(f.local)
			all = append(all, f)
		}
		all = append(all, flow{name: "pod to unspecified address", to: at(a.any, 8080), peer: at(a.loopback, 8080), line: fmt.Sprintf("app %s %s", at(a.loopback, 8080), a.loopback)})
	}
	if s.kind == byHooks {
		all = append(all,
			flow{name: "pod in the host's namespace to pod", ns: s.node.NS, to: pod, line: inbound(pod, a.node)},
			flow{name: "process of the host in another namespace", cg: s.host, ns: s.client.NS, to: pod, line: inbound(pod, a.client)})
	}
	return all
}

// portBound: a port without an address cannot be given an address later. Hooks put
// right what the app is told; to the proxy such a client is loopback.
func (s *stage) portBound(a family, to netip.AddrPort) string {
	if s.kind == byHooks {
		return fmt.Sprintf("15001 %s ", to)
	}
	return fmt.Sprintf("15001 %s %s", to, a.pod)
}

func both(a, b error) error {
	if a != nil {
		return a
	}
	return b
}
