package redirect_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// stage is a topology whose pod is steered by programs. Sockets of the app are made
// in the pods' cgroup, those of the proxy in its own.
type stage struct {
	*topology
	hooks      *redirect.Hooks
	cfg        redirect.HooksConfig
	app, proxy *netlab.Cgroup
}

var everything = redirect.PodRules{DNS: true, IPv6: netlab.IPv6()}

func newStage(t testing.TB) *stage {
	t.Helper()
	s := quietStage(t)
	s.open(t)
	t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
	return s
}

// quietStage is a stage without programs.
func quietStage(t testing.TB) *stage {
	t.Helper()
	cg := netlab.MustCgroups(t, "pods", "proxy")
	s := &stage{topology: newTopology(t), app: cg[0], proxy: cg[1]}
	// The proxy is below the root, as in a pod of its own; see TestHooksProxyElsewhere.
	s.cfg = redirect.HooksConfig{CgroupRoot: filepath.Dir(s.app.Path), Dir: netlab.MustBPFFS(t), Node: s.node.NS}
	return s
}

func (s *stage) open(t testing.TB) {
	t.Helper()
	h, err := redirect.OpenHooks(s.cfg)
	check(t, err)
	check(t, h.Proxy(s.proxy.Path))
	s.hooks = h
}

func (s *stage) enrol(t testing.TB) {
	t.Helper()
	check(t, s.hooks.Apply(s.pod.NS, everything), s.hooks.Check(s.pod.NS, everything))
}

// in runs f on a thread of cg inside ns: for calls that make sockets and may wait.
func in(cg *netlab.Cgroup, ns *netns.NS, f func() error) error {
	return cg.Do(func() error {
		home, err := netns.Current()
		if err != nil {
			return err
		}
		defer home.Close()
		if err := unix.Setns(ns.FD(), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return errors.Join(f(), unix.Setns(home.FD(), unix.CLONE_NEWNET))
	})
}

// listen makes a TCP listener in cg and ns.
func listen(t testing.TB, cg *netlab.Cgroup, ns *netns.NS, addr string, control func(string, string, syscall.RawConn) error) net.Listener {
	t.Helper()
	var ln net.Listener
	check(t, in(cg, ns, func() (err error) {
		lc := &net.ListenConfig{Control: control}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(t.Context(), "tcp", addr)
		return err
	}))
	return ln
}

// answer tells each client who accepted it, whom the client wanted, and who it is.
func answer(t testing.TB, ln net.Listener, name string) {
	t.Helper()
	var handled sync.WaitGroup
	donec := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-donec; handled.Wait() })
	go func() {
		defer close(donec)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s %s %s", name, originalDst(c.(*net.TCPConn)), c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
			// What a client sent by Fast Open is unread, and a close would reset it.
			_ = c.(*net.TCPConn).CloseWrite()
			_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
			handled.Go(func() { _, _ = io.Copy(io.Discard, c); c.Close() })
		}
	}()
}

// listenProxy starts the proxy's listeners.
func (s *stage) listenProxy(t testing.TB) (stop func()) {
	t.Helper()
	var lns []net.Listener
	for _, port := range []string{"15001", "15006", "15008"} {
		ln := listen(t, s.proxy, s.pod.NS, "[::]:"+port, proxyOptions)
		lns = append(lns, ln)
		answer(t, ln, port)
	}
	return func() {
		for _, ln := range lns {
			ln.Close()
		}
	}
}

// call is what an app sees of a connection.
type call struct {
	local, peer netip.AddrPort
	line        string
}

// connect opens a connection as a process of cg would, without Go's dialer, whose
// goroutines run on any thread.
func connect(cg *netlab.Cgroup, ns *netns.NS, to netip.AddrPort, prepare func(fd int) error) (c call, err error) {
	err = in(cg, ns, func() error {
		family := unix.AF_INET
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		tv := unix.Timeval{Sec: 3}
		if err := errors.Join(
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)); err != nil {
			return err
		}
		if prepare != nil {
			if err := prepare(fd); err != nil {
				return err
			}
		}
		if err := unix.Connect(fd, sockaddr(to)); err != nil {
			return err
		}
		local, err := unix.Getsockname(fd)
		if err != nil {
			return err
		}
		peer, err := unix.Getpeername(fd)
		if err != nil {
			return err
		}
		c.local, c.peer = addrPort(local), addrPort(peer)
		b := make([]byte, 256)
		for {
			n, err := unix.Read(fd, b)
			if err != nil {
				return err
			}
			if n == 0 {
				return nil
			}
			c.line += string(b[:n])
		}
	})
	return c, err
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func mapped(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }

func bindTo(a netip.AddrPort) func(int) error {
	return func(fd int) error { return unix.Bind(fd, sockaddr(a)) }
}

func TestHooksOutbound(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	s.enrol(t)
	vip4, vip6 := netip.MustParseAddr("10.96.7.7"), netip.MustParseAddr("fd00:96::7")
	for _, tc := range []struct {
		name      string
		to, local netip.Addr
		prepare   func(int) error
		line      string
		port      uint16 // local, if given
	}{
		{name: "IPv4", to: clientV4, local: podV4, line: "15001 10.9.0.2:8080 10.8.0.2"},
		{name: "IPv4 address without route", to: vip4, local: podV4, line: "15001 10.96.7.7:8080 10.8.0.2"},
		{name: "IPv6", to: clientV6, local: podV6, line: "15001 [fd00:9::2]:8080 fd00:8::2"},
		{name: "IPv6 virtual address", to: vip6, local: podV6, line: "15001 [fd00:96::7]:8080 fd00:8::2"},
		{name: "IPv4 in an IPv6 socket", to: mapped(clientV4), local: mapped(podV4), line: "15001 10.9.0.2:8080 10.8.0.2"},
		{name: "own address bound", to: clientV4, local: podV4, prepare: bindTo(netip.AddrPortFrom(podV4, 0)), line: "15001 10.9.0.2:8080 10.8.0.2"},
		{name: "own address and port bound", to: clientV4, local: podV4, port: 33001, prepare: bindTo(netip.AddrPortFrom(podV4, 33001)), line: "15001 10.9.0.2:8080 10.8.0.2"},
		{name: "port bound", to: clientV4, local: podV4, port: 33002, prepare: bindTo(netip.MustParseAddrPort("0.0.0.0:33002")), line: "15001 10.9.0.2:8080 127.0.0.1"},
		{name: "IPv6 port bound", to: clientV6, local: podV6, port: 33003, prepare: bindTo(netip.MustParseAddrPort("[::]:33003")), line: "15001 [fd00:9::2]:8080"},
		{name: "device bound", to: clientV4, local: podV4, prepare: func(fd int) error { return unix.BindToDevice(fd, "eth0") }, line: "15001 10.9.0.2:8080 10.8.0.2"},
		{name: "proxy's marks", to: clientV4, local: podV4, prepare: func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, redirect.MarkProxy)
		}, line: "15001 10.9.0.2:8080 10.8.0.2"},
		{name: "mark of the way back", to: clientV4, local: podV4, prepare: func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, redirect.MarkReturn)
		}, line: "15001 10.9.0.2:8080 10.8.0.2"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.to.Is6() && !tc.to.Is4In6() && !netlab.IPv6() {
				t.Skip("needs IPv6")
			}
			to := netip.AddrPortFrom(tc.to, 8080)
			c, err := connect(s.app, s.pod.NS, to, tc.prepare)
			check(t, err)
			if !strings.HasPrefix(c.line, tc.line) {
				t.Errorf("connection to %v was answered %q, want %q", to, c.line, tc.line)
			}
			if c.peer != to {
				t.Errorf("getpeername tells %v, want %v", c.peer, to)
			}
			if c.local.Addr() != tc.local || tc.port != 0 && c.local.Port() != tc.port {
				t.Errorf("getsockname tells %v, want %v port %d", c.local, tc.local, tc.port)
			}
		})
	}
}

// TestHooksProxyElsewhere has a proxy that is not below the pods' root.
func TestHooksProxyElsewhere(t *testing.T) {
	cg := netlab.MustCgroups(t, "pods", "proxy", "host")
	s := &stage{topology: newTopology(t), app: cg[0], proxy: cg[1]}
	s.cfg = redirect.HooksConfig{CgroupRoot: s.app.Path, Dir: netlab.MustBPFFS(t), Node: s.node.NS, NodeCgroup: filepath.Dir(s.app.Path)}
	s.open(t)
	t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	s.enrol(t)
	s.wantCaptured(t, "enrolled")
	c, err := connect(s.proxy, s.pod.NS, netip.AddrPortFrom(clientV4, 8080), nil)
	if want := "plain 10.9.0.2:8080 10.8.0.2"; err != nil || c.line != want {
		t.Errorf("the proxy's connection was answered %q, %v, want %q", c.line, err, want)
	}

	// Probes of the node's own processes, and what only looks like them.
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	for _, tc := range []struct {
		name string
		cg   *netlab.Cgroup
		ns   *netns.NS
		to   netip.Addr
		line string
	}{
		{"probe", cg[2], s.node.NS, podV4, "app 10.8.0.2:8080 10.8.0.1"},
		{"probe by IPv6", cg[2], s.node.NS, podV6, "app [fd00:8::2]:8080 fd00:8::1"},
		{"pod in the node's namespace", s.app, s.node.NS, podV4, "15006 10.8.0.2:8080 10.8.0.1"},
		{"process of the node in another namespace", cg[2], s.client.NS, podV4, "15006 10.8.0.2:8080 10.9.0.2"},
	} {
		c, err := connect(tc.cg, tc.ns, netip.AddrPortFrom(tc.to, 8080), nil)
		if err != nil || c.line != tc.line {
			t.Errorf("%s was answered %q, %v, want %q", tc.name, c.line, err, tc.line)
		}
	}
}

// TestHooksSocketKinds has connects that do not look like one socket, one connect.
func TestHooksSocketKinds(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	s.enrol(t)
	for _, a := range []struct {
		to, loopback netip.Addr
		family       int
	}{{clientV4, netip.MustParseAddr("127.0.0.1"), unix.AF_INET}, {clientV6, netip.IPv6Loopback(), unix.AF_INET6}} {
		to, loopback := netip.AddrPortFrom(a.to, 8080), netip.AddrPortFrom(a.loopback, 8080)
		wantLine := fmt.Sprintf("15001 %s ", to)
		open := func(flags, proto int) (int, error) {
			fd, err := unix.Socket(a.family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags, proto)
			if err != nil {
				return fd, err
			}
			return fd, errors.Join(
				unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 3}),
				unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 3}))
		}
		wantAnswer := func(t *testing.T, fd int, to netip.AddrPort, line string) {
			peer, err := unix.Getpeername(fd)
			if err != nil || addrPort(peer) != to {
				t.Errorf("getpeername tells %v, %v, want %v", addrPort(peer), err, to)
			}
			b := make([]byte, 256)
			n, err := unix.Read(fd, b)
			if err != nil || !strings.HasPrefix(string(b[:n]), line) {
				t.Errorf("connection was answered %q, %v, want %q", b[:max(n, 0)], err, line)
			}
		}
		for _, tc := range []struct {
			name string
			run  func(t *testing.T) error
		}{
			{"MPTCP", func(t *testing.T) error {
				fd, err := open(0, unix.IPPROTO_MPTCP)
				if errors.Is(err, unix.EPROTONOSUPPORT) {
					t.Skip("needs MPTCP")
				}
				defer unix.Close(fd)
				if err := errors.Join(err, unix.Connect(fd, sockaddr(to))); err != nil {
					return err
				}
				wantAnswer(t, fd, to, wantLine)
				return nil
			}},
			{"MPTCP connected again", func(t *testing.T) error {
				fd, err := open(0, unix.IPPROTO_MPTCP)
				if errors.Is(err, unix.EPROTONOSUPPORT) {
					t.Skip("needs MPTCP")
				}
				defer unix.Close(fd)
				if err := errors.Join(err, unix.Connect(fd, sockaddr(to))); err != nil {
					return err
				}
				wantAnswer(t, fd, to, wantLine)
				if err := disconnect(fd); err != nil {
					return err
				}
				if err := unix.Connect(fd, sockaddr(loopback)); err != nil {
					return fmt.Errorf("connect to loopback: %w", err)
				}
				wantAnswer(t, fd, loopback, "app ")
				return nil
			}},
			{"TCP Fast Open", func(t *testing.T) error {
				fd, err := open(0, 0)
				defer unix.Close(fd)
				if err := errors.Join(err, unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, sockaddr(to))); err != nil {
					return err
				}
				// sendto may return before the connection is there.
				if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 3000); err != nil {
					return err
				}
				wantAnswer(t, fd, to, wantLine)
				return nil
			}},
			{"non-blocking", func(t *testing.T) error {
				fd, err := open(unix.SOCK_NONBLOCK, 0)
				defer unix.Close(fd)
				if err != nil {
					return err
				}
				if err := unix.Connect(fd, sockaddr(to)); !errors.Is(err, unix.EINPROGRESS) && err != nil {
					return err
				}
				if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 3000); err != nil {
					return err
				}
				wantAnswer(t, fd, to, wantLine)
				return nil
			}},
			{"connected again", func(t *testing.T) error {
				fd, err := open(0, 0)
				defer unix.Close(fd)
				if err := errors.Join(err, unix.Connect(fd, sockaddr(to))); err != nil {
					return err
				}
				wantAnswer(t, fd, to, wantLine)
				if err := disconnect(fd); err != nil {
					return err
				}
				if err := unix.Connect(fd, sockaddr(loopback)); err != nil {
					return fmt.Errorf("connect to loopback: %w", err)
				}
				wantAnswer(t, fd, loopback, "app ")
				return nil
			}},
			{"one port, two destinations", func(t *testing.T) error {
				other := netip.AddrPortFrom(to.Addr(), 8081)
				any := netip.IPv4Unspecified()
				if a.family == unix.AF_INET6 {
					any = netip.IPv6Unspecified()
				}
				var fds []int
				for _, dst := range []netip.AddrPort{to, other} {
					fd, err := open(0, 0)
					defer unix.Close(fd)
					if err := errors.Join(err,
						unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
						unix.Bind(fd, sockaddr(netip.AddrPortFrom(any, 33100))),
						unix.Connect(fd, sockaddr(dst))); err != nil {
						return fmt.Errorf("connect to %v: %w", dst, err)
					}
					fds = append(fds, fd)
				}
				wantAnswer(t, fds[0], to, wantLine)
				wantAnswer(t, fds[1], other, fmt.Sprintf("15001 %s ", other))
				return nil
			}},
		} {
			t.Run(fmt.Sprintf("%s to %v", tc.name, a.to), func(t *testing.T) {
				if a.family == unix.AF_INET6 && !netlab.IPv6() {
					t.Skip("needs IPv6")
				}
				check(t, in(s.app, s.pod.NS, func() error { return tc.run(t) }))
			})
		}
	}
}

// disconnect is connect(2) to AF_UNSPEC, which x/sys has no type for.
func disconnect(fd int) error {
	var sa unix.RawSockaddr
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
	if errno != 0 {
		return fmt.Errorf("disconnect: %w", errno)
	}
	return nil
}

// TestHooksHandOverBetweenProxies has the listener of one proxy followed by another's.
func TestHooksHandOverBetweenProxies(t *testing.T) {
	s := newStage(t)
	s.enrol(t)
	reuse := func(n, a string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		})
		return errors.Join(cerr, err, proxyOptions(n, a, c))
	}
	want := func(when, line string) {
		t.Helper()
		for range 8 {
			c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil)
			if name, _, _ := strings.Cut(c.line, " "); err != nil || name != line {
				t.Errorf("%s: answered %q, %v, want %q", when, c.line, err, line)
			}
		}
	}
	old := listen(t, s.proxy, s.pod.NS, "[::]:15001", reuse)
	answer(t, old, "old")
	want("one proxy", "old")
	next := listen(t, s.proxy, s.pod.NS, "[::]:15001", reuse)
	answer(t, next, "next")
	want("both listen", "next")
	old.Close()
	want("the old one is gone", "next")
	next.Close()
	if c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("both are gone: answered %q, %v, want ECONNREFUSED", c.line, err)
	}
}

func TestHooksLeaveAlone(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	s.enrol(t)
	for _, tc := range []struct {
		name string
		cg   *netlab.Cgroup
		ns   *netns.NS
		to   netip.Addr
		line string
	}{
		{"loopback", s.app, s.pod.NS, netip.MustParseAddr("127.0.0.1"), "app "},
		{"IPv6 loopback", s.app, s.pod.NS, netip.IPv6Loopback(), "app "},
		{"unspecified address", s.app, s.pod.NS, netip.IPv4Unspecified(), "app "},
		{"itself", s.app, s.pod.NS, podV4, "app "},
		{"itself by IPv6", s.app, s.pod.NS, podV6, "app "},
		{"the proxy's sockets", s.proxy, s.pod.NS, clientV4, "plain 10.9.0.2:8080 10.8.0.2"},
		{"the proxy's sockets by IPv6", s.proxy, s.pod.NS, clientV6, "plain [fd00:9::2]:8080 fd00:8::2"},
		{"the proxy to the app", s.proxy, s.pod.NS, podV4, "app "},
		{"another pod", s.app, s.node.NS, clientV4, "plain "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := connect(tc.cg, tc.ns, netip.AddrPortFrom(tc.to, 8080), nil)
			check(t, err)
			if !strings.HasPrefix(c.line, tc.line) {
				t.Errorf("connection to %v was answered %q, want %q", tc.to, c.line, tc.line)
			}
		})
	}
}

func TestHooksInbound(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	s.enrol(t)
	for _, tc := range []struct{ to, line string }{
		{"10.8.0.2:8080", "15006 10.8.0.2:8080 10.9.0.2"},
		{"10.8.0.2:9999", "15006 10.8.0.2:9999 10.9.0.2"}, // nobody but the proxy has to listen there
		{"10.8.0.2:15001", "15006 10.8.0.2:15001 10.9.0.2"},
		{"10.8.0.2:15008", "15008 10.8.0.2:15008 10.9.0.2"},
		{"[fd00:8::2]:8080", "15006 [fd00:8::2]:8080 fd00:9::2"},
		{"[fd00:8::2]:15008", "15008 [fd00:8::2]:15008 fd00:9::2"},
	} {
		c, err := connect(s.app, s.client.NS, netip.MustParseAddrPort(tc.to), nil)
		if err != nil || c.line != tc.line {
			t.Errorf("connection to %s was answered %q, %v, want %q", tc.to, c.line, err, tc.line)
		}
	}

	// In the client's name, and the answer finds its way back. What comes from that
	// client's port afterwards is the client's own.
	for _, a := range []struct{ client, pod netip.Addr }{{clientV4, podV4}, {clientV6, podV6}} {
		asClient := func(port uint16) func(int) error {
			return func(fd int) error {
				return errors.Join(
					ignoreFamily(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)),
					ignoreFamily(unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)),
					unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), // no TIME_WAIT
					unix.Bind(fd, sockaddr(netip.AddrPortFrom(a.client, port))))
			}
		}
		c, err := connect(s.proxy, s.pod.NS, netip.AddrPortFrom(a.pod, 8080), asClient(20000))
		if want := fmt.Sprintf("app %s %s", netip.AddrPortFrom(a.pod, 8080), a.client); err != nil || c.line != want {
			t.Errorf("the proxy's dial as %v was answered %q, %v, want %q", a.client, c.line, err, want)
		}
		if _, err := connect(s.proxy, s.pod.NS, netip.AddrPortFrom(a.pod, 9999), asClient(20001)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("the proxy's dial to a port where nobody listens: %v, want ECONNREFUSED", err)
		}
		for port, to := range map[uint16]uint16{20000: 8080, 20001: 9999} {
			c, err := connect(s.app, s.client.NS, netip.AddrPortFrom(a.pod, to), bindTo(netip.AddrPortFrom(a.client, port)))
			if !strings.HasPrefix(c.line, "15006 ") {
				t.Errorf("the client's own connection from port %d was answered %q, %v", port, c.line, err)
			}
		}
	}
}

func TestHooksFailClosed(t *testing.T) {
	s := newStage(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	s.enrol(t)
	refused := func(what string, cg *netlab.Cgroup, ns *netns.NS, to string) {
		t.Helper()
		c, err := connect(cg, ns, netip.MustParseAddrPort(to), nil)
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s to %s was answered %q, %v, want ECONNREFUSED", what, to, c.line, err)
		}
	}
	all := func(what string) {
		t.Helper()
		for _, to := range []string{"10.9.0.2:8080", "[fd00:9::2]:8080"} {
			refused(what, s.app, s.pod.NS, to)
		}
		for _, to := range []string{"10.8.0.2:8080", "10.8.0.2:15008", "[fd00:8::2]:8080", "[fd00:8::2]:15008"} {
			refused(what, s.app, s.client.NS, to)
		}
	}
	all("without a proxy")
	// An app that sits on the proxy's ports gets nothing.
	for _, port := range []string{"15001", "15006", "15008"} {
		answer(t, listen(t, s.app, s.pod.NS, "[::]:"+port, nil), "thief")
	}
	all("with another on the proxy's ports")
	drops, err := s.hooks.Drops()
	check(t, err)
	if drops["no-listener"] < 12 {
		t.Errorf("drops are %v, want at least 12 for no-listener", drops)
	}
}

// TestHooksListenerWins has an app on the proxy's ports before the proxy.
func TestHooksListenerWins(t *testing.T) {
	s := newStage(t)
	answer(t, listen(t, s.app, s.pod.NS, "127.0.0.1:15001", nil), "thief")
	answer(t, listen(t, s.app, s.pod.NS, "10.8.0.2:15006", nil), "thief")
	s.enrol(t)
	answer(t, listen(t, s.proxy, s.pod.NS, "[::1]:15001", nil), "15001")
	answer(t, listen(t, s.proxy, s.pod.NS, "127.0.0.2:15001", nil), "15001")
	answer(t, listen(t, s.proxy, s.pod.NS, "127.0.0.2:15006", nil), "15006")
	for _, tc := range []struct {
		ns       *netns.NS
		to, line string
	}{
		{s.pod.NS, "10.9.0.2:8080", "15001 10.9.0.2:8080 10.8.0.2"},
		{s.client.NS, "10.8.0.2:15006", "15006 10.8.0.2:15006 10.9.0.2"},
	} {
		c, err := connect(s.app, tc.ns, netip.MustParseAddrPort(tc.to), nil)
		if err != nil || c.line != tc.line {
			t.Errorf("connection to %s was answered %q, %v, want %q", tc.to, c.line, err, tc.line)
		}
	}
}

// TestHooksGate sends SYNs past all connect hooks.
func TestHooksGate(t *testing.T) {
	s := newStage(t)
	s.enrol(t)
	syn := []byte{0x80, 0x01, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0}
	ip4 := slices.Concat([]byte{0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0}, podV4.AsSlice(), clientV4.AsSlice(), syn)
	ip6 := slices.Concat([]byte{0x60, 0, 0, 0, 0, 20, 6, 64}, podV6.AsSlice(), clientV6.AsSlice(), syn)
	ip6ext := slices.Concat([]byte{0x60, 0, 0, 0, 0, 28, 60, 64}, podV6.AsSlice(), clientV6.AsSlice(), []byte{6, 0, 1, 4, 0, 0, 0, 0}, syn)
	tiny := slices.Concat([]byte{0x45, 0, 0, 28, 0, 1, 0x20, 0, 64, 6, 0, 0}, podV4.AsSlice(), clientV4.AsSlice(), syn[:8])
	overlap := slices.Concat([]byte{0x45, 0, 0, 32, 0, 1, 0, 1, 64, 6, 0, 0}, podV4.AsSlice(), clientV4.AsSlice(), syn[8:])
	for _, tc := range []struct {
		name, reason string
		send         func(eth0 int) error
	}{
		{"raw socket", "leak", func(int) error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return errors.Join(
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, redirect.MarkProxy),
				ignoreDrop(unix.Sendto(fd, syn, 0, &unix.SockaddrInet4{Addr: clientV4.As4()})))
		}},
		{"packet socket", "leak", func(i int) error { return packet(i, ip4, unix.ETH_P_IP, false) }},
		{"packet socket past the queue", "leak", func(i int) error { return packet(i, ip4, unix.ETH_P_IP, true) }},
		{"IPv6", "leak", func(i int) error { return packet(i, ip6, unix.ETH_P_IPV6, true) }},
		{"IPv6 with an extension", "leak", func(i int) error { return packet(i, ip6ext, unix.ETH_P_IPV6, true) }},
		{"fragment without flags", "malformed", func(i int) error { return packet(i, tiny, unix.ETH_P_IP, true) }},
		{"fragment with flags only", "malformed", func(i int) error { return packet(i, overlap, unix.ETH_P_IP, true) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before, err := s.hooks.Drops()
			check(t, err, in(s.app, s.pod.NS, func() error {
				eth0, err := net.InterfaceByName("eth0")
				if err != nil {
					return err
				}
				return tc.send(eth0.Index)
			}))
			after, err := s.hooks.Drops()
			check(t, err)
			if after[tc.reason] != before[tc.reason]+1 {
				t.Errorf("drops are %v, want one %s more than %v", after, tc.reason, before)
			}
		})
	}
}

// packet sends a frame through a packet socket, on request past the device's queue
// and all programs there.
func packet(index int, payload []byte, proto uint16, bypass bool) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if bypass {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return err
		}
	}
	to := &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8, Ifindex: index, Halen: 6, Addr: [8]uint8{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	return ignoreDrop(unix.Sendto(fd, payload, 0, to))
}

// ignoreDrop: a dropped packet may be told as a full queue.
func ignoreDrop(err error) error {
	if errors.Is(err, unix.ENOBUFS) {
		return nil
	}
	return err
}

func TestHooksReleaseAndRemove(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	present := func(want bool) {
		t.Helper()
		if have, err := s.hooks.Present(s.pod.NS); err != nil || have != want {
			t.Errorf("present is %v, %v, want %v", have, err, want)
		}
	}
	present(false)
	s.enrol(t)
	present(true)
	for _, step := range []struct {
		name string
		do   func(*netns.NS) error
	}{{"release", s.hooks.Release}, {"remove", s.hooks.Remove}, {"remove again", s.hooks.Remove}} {
		check(t, step.do(s.pod.NS))
		if c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil); err != nil || !strings.HasPrefix(c.line, "plain ") {
			t.Errorf("after %s an outbound connection was answered %q, %v", step.name, c.line, err)
		}
		if c, err := connect(s.app, s.client.NS, netip.MustParseAddrPort("10.8.0.2:8080"), nil); err != nil || !strings.HasPrefix(c.line, "app ") {
			t.Errorf("after %s an inbound connection was answered %q, %v", step.name, c.line, err)
		}
		if err := s.hooks.Check(s.pod.NS, everything); !errors.Is(err, redirect.ErrDrift) {
			t.Errorf("after %s Check says %v, want ErrDrift", step.name, err)
		}
	}
	present(false)
}

func (s *stage) wantCaptured(t *testing.T, when string) {
	t.Helper()
	const want = "15001 10.9.0.2:8080 10.8.0.2"
	if c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil); err != nil || c.line != want {
		t.Errorf("%s: answered %q, %v, want %q", when, c.line, err, want)
	}
	const inbound = "15006 10.8.0.2:8080 10.9.0.2"
	if c, err := connect(s.app, s.client.NS, netip.MustParseAddrPort("10.8.0.2:8080"), nil); err != nil || c.line != inbound {
		t.Errorf("%s: answered %q, %v, want %q", when, c.line, err, inbound)
	}
}

func TestHooksSurviveTheirProcess(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t)
	s.wantCaptured(t, "enrolled")
	check(t, s.hooks.Close())
	s.wantCaptured(t, "with nobody there")
	s.open(t)
	if s.hooks.Rebuilt() {
		t.Error("state of the same layout was rebuilt")
	}
	s.wantCaptured(t, "taken over")
	if have, err := s.hooks.Present(s.pod.NS); err != nil || !have {
		t.Errorf("present is %v, %v after a restart", have, err)
	}
	s.enrol(t)
	s.wantCaptured(t, "applied again")
}

// TestHooksUpgradeUnderTraffic replaces all programs while connections are opened.
func TestHooksUpgradeUnderTraffic(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t)
	stop, donec := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				donec <- n
				return
			default:
			}
			s.wantCaptured(t, "while programs are replaced")
			n++
		}
	}()
	for range 4 {
		check(t, s.hooks.Close())
		s.open(t)
		s.enrol(t)
	}
	close(stop)
	if n := <-donec; n < 4 {
		t.Errorf("%d connections in all: too few to tell", n)
	}
	drops, err := s.hooks.Drops()
	check(t, err)
	for reason, n := range drops {
		if n != 0 {
			t.Errorf("%d drops for %s", n, reason)
		}
	}
}

func TestHooksPrune(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t)
	gone, err := netlab.New("gone", "")
	check(t, err, s.hooks.Apply(gone.NS, redirect.PodRules{}))
	former := filepath.Join(filepath.Dir(s.proxy.Path), "former")
	check(t, os.Mkdir(former, 0o755), s.hooks.Proxy(former))
	pins := func() int {
		n := 0
		for _, dir := range []string{"pods", "proxy"} {
			dirs, err := os.ReadDir(filepath.Join(s.cfg.Dir, dir))
			check(t, err)
			n += len(dirs)
		}
		return n
	}
	check(t, s.hooks.Prune())
	if n := pins(); n != 4 {
		t.Fatalf("%d pods and proxies are pinned, want 4", n)
	}
	gone.Close()
	check(t, os.Remove(former))
	// The kernel takes namespaces away in its own time.
	for deadline := time.Now().Add(10 * time.Second); pins() != 2; {
		check(t, s.hooks.Prune())
		if time.Now().After(deadline) {
			t.Fatal("a pod without namespace or a proxy without cgroup is still pinned")
		}
		runtime.Gosched()
	}
	check(t, s.hooks.Check(s.pod.NS, everything))
	s.wantCaptured(t, "after another pod was forgotten")
}

// TestHooksOutsideTheRoot has a process in the pod whose cgroup no hook is above:
// its connections are not captured, and the gate does not let them out.
func TestHooksOutsideTheRoot(t *testing.T) {
	cg := netlab.MustCgroups(t, "pods", "proxy", "host")
	s := &stage{topology: newTopology(t), app: cg[0], proxy: cg[1]}
	s.cfg = redirect.HooksConfig{CgroupRoot: s.app.Path, Dir: netlab.MustBPFFS(t)}
	s.open(t)
	t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	s.enrol(t)
	for _, to := range []netip.Addr{clientV4, clientV6} {
		c, err := connect(cg[2], s.pod.NS, netip.AddrPortFrom(to, 8080), func(fd int) error {
			return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 200000})
		})
		if err == nil {
			t.Errorf("connection to %v was answered %q", to, c.line)
		}
	}
	drops, err := s.hooks.Drops()
	check(t, err)
	if drops["leak"] < 2 {
		t.Errorf("drops are %v, want at least 2 leaks", drops)
	}
}

// TestHooksManyConnections gives the pod 100 ports and has it hold 300 connections
// to as many destinations: one proxy address for all of them would not do.
func TestHooksManyConnections(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	s.enrol(t)
	check(t, s.pod.Sysctl("net/ipv4/ip_local_port_range", "40000 40099"))
	for _, base := range []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00:96::1")} {
		t.Run(base.String(), func(t *testing.T) {
			family := unix.AF_INET
			if base.Is6() {
				family = unix.AF_INET6
			}
			check(t, in(s.app, s.pod.NS, func() error {
				a := base
				for i := range 300 {
					a = a.Next()
					fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
					if err != nil {
						return err
					}
					defer unix.Close(fd)
					to := netip.AddrPortFrom(a, 8080)
					if err := errors.Join(
						unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 3}),
						unix.Connect(fd, sockaddr(to))); err != nil {
						return fmt.Errorf("connection %d: %w", i, err)
					}
					b := make([]byte, 256)
					n, err := unix.Read(fd, b)
					if want := fmt.Sprintf("15001 %s ", to); err != nil || !strings.HasPrefix(string(b[:n]), want) {
						return fmt.Errorf("connection %d was answered %q, %w, want %q", i, b[:max(n, 0)], err, want)
					}
				}
				return nil
			}))
		})
	}
}

// TestHooksOneFamily has a pod without IPv6 address: apps that try both go on to IPv4.
func TestHooksOneFamily(t *testing.T) {
	s := newStage(t)
	s.listenProxy(t)
	lone := netlab.MustHost(t, "lone")
	check(t, netlab.Cable(lone, "eth0", s.node, "lone"), lone.Up("eth0"), s.node.Up("lone"),
		lone.Addr("eth0", netip.MustParsePrefix("10.7.0.2/24")))
	if _, ok := errors.AsType[*redirect.UnsupportedError](s.hooks.Apply(lone.NS, redirect.PodRules{IPv6: true})); !ok {
		t.Error("IPv6 was promised to a pod that has none")
	}
	check(t, s.hooks.Apply(lone.NS, redirect.PodRules{}))
	if c, err := connect(s.app, lone.NS, netip.AddrPortFrom(clientV6, 8080), nil); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("connection to %v: %q, %v, want ENETUNREACH", clientV6, c.line, err)
	}
	if c, err := connect(s.app, lone.NS, netip.AddrPortFrom(clientV4, 8080), nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connection to %v: %q, %v, want ECONNREFUSED", clientV4, c.line, err)
	}
}

// TestHooksRebuild finds state of another layout, and a start that died half way.
func TestHooksRebuild(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(dir string) error
	}{
		{"a map is missing", func(dir string) error { return os.Remove(filepath.Join(dir, "maps/mesh_enrolled")) }},
		{"a map is another", func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "maps/mesh_enrolled")),
				os.Rename(filepath.Join(dir, "maps/mesh_dials"), filepath.Join(dir, "maps/mesh_enrolled")))
		}},
		{"half done", func(dir string) error { return os.Mkdir(filepath.Join(dir, "maps-next"), 0o700) }},
		{"all maps are missing", func(dir string) error { return os.RemoveAll(filepath.Join(dir, "maps")) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStage(t)
			stop := s.listenProxy(t)
			answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
			answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
			s.enrol(t)
			check(t, s.hooks.Close(), tc.spoil(s.cfg.Dir))
			s.open(t)
			if !s.hooks.Rebuilt() {
				t.Fatal("an unknown layout was taken for a known one")
			}
			noPlaintext := func(when string) {
				t.Helper()
				c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil)
				if err == nil && !strings.HasPrefix(c.line, "15001 ") {
					t.Errorf("%s: answered %q", when, c.line)
				}
				c, err = connect(s.app, s.client.NS, netip.MustParseAddrPort("10.8.0.2:8080"), nil)
				if err == nil && !strings.HasPrefix(c.line, "15006 ") {
					t.Errorf("%s: answered %q", when, c.line)
				}
			}
			// The pod's old gate would stop the SYN too, but the app is told at once.
			if c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.9.0.2:8080"), nil); !errors.Is(err, unix.EPERM) {
				t.Errorf("on hold: answered %q, %v, want EPERM", c.line, err)
			}
			if drops, err := s.hooks.Drops(); err != nil || drops["hold"] != 1 {
				t.Errorf("drops are %v, %v, want one for hold", drops, err)
			}
			if c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("127.0.0.1:8080"), nil); err != nil || !strings.HasPrefix(c.line, "app ") {
				t.Errorf("on hold, to itself: answered %q, %v", c.line, err)
			}
			noPlaintext("before the pod is applied")
			s.enrol(t)
			noPlaintext("before ready")
			check(t, s.hooks.Ready())
			noPlaintext("ready")
			// The proxy listens again.
			stop()
			s.listenProxy(t)
			s.wantCaptured(t, "with the proxy back")
		})
	}
}

func TestHooksDNS(t *testing.T) {
	s := newStage(t)
	s.enrol(t)
	for _, tc := range []struct {
		name    string
		listen  netip.AddrPort
		servers []netip.Addr
	}{
		{"IPv4", netip.MustParseAddrPort("0.0.0.0:15053"), []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("10.96.0.11"), netip.MustParseAddr("8.8.8.8")}},
		{"IPv6", netip.MustParseAddrPort("[::]:15053"), []netip.Addr{netip.MustParseAddr("fd00:96::10"), netip.MustParseAddr("fd00:96::11"), clientV6}},
		{"IPv4 in an IPv6 socket", netip.MustParseAddrPort("[::]:15053"), []netip.Addr{mapped(netip.MustParseAddr("10.96.0.10")), mapped(netip.MustParseAddr("10.96.0.11")), mapped(clientV4)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			server := resolve(t, s, tc.listen)
			defer server()
			family := unix.AF_INET
			if tc.servers[0].Is6() {
				family = unix.AF_INET6
			}
			check(t, in(s.app, s.pod.NS, func() error {
				fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 3}); err != nil {
					return err
				}
				want := map[string]netip.AddrPort{}
				for i, a := range tc.servers {
					to := netip.AddrPortFrom(a, 53)
					q := fmt.Sprintf("query %d", i)
					want[q] = to
					if err := unix.Sendto(fd, []byte(q), 0, sockaddr(to)); err != nil {
						return fmt.Errorf("ask %v: %w", to, err)
					}
				}
				for range tc.servers {
					b := make([]byte, 64)
					n, from, err := unix.Recvfrom(fd, b, 0)
					if err != nil {
						return fmt.Errorf("receive: %w", err)
					}
					if q := string(b[:n]); addrPort(from) != want[q] {
						t.Errorf("the answer to %q came from %v, want %v", q, addrPort(from), want[q])
					}
				}
				// A connected socket hears its server only.
				to := netip.AddrPortFrom(tc.servers[1], 53)
				cfd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(cfd)
				if err := errors.Join(unix.SetsockoptTimeval(cfd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 3}), unix.Connect(cfd, sockaddr(to))); err != nil {
					return err
				}
				peer, err := unix.Getpeername(cfd)
				if err != nil || addrPort(peer) != to {
					t.Errorf("getpeername tells %v, %v, want %v", addrPort(peer), err, to)
				}
				if _, err := unix.Write(cfd, []byte("connected")); err != nil {
					return err
				}
				b := make([]byte, 64)
				n, from, err := unix.Recvfrom(cfd, b, 0)
				if err != nil || string(b[:n]) != "connected" || addrPort(from) != to {
					t.Errorf("connected: %q from %v, %v", b[:max(n, 0)], from, err)
				}
				return nil
			}))
		})
	}
	// The proxy asks the server by the alias that it was asked at.
	server := resolve(t, s, netip.MustParseAddrPort("[::]:15053"))
	defer server()
	for _, a := range []netip.Addr{clientV4, clientV6} {
		pc := packetConn(t, s.app, s.client.NS, netip.AddrPortFrom(a, 53))
		donec := make(chan string, 1)
		go func() {
			b := make([]byte, 64)
			n, _, _ := pc.ReadFromUDPAddrPort(b)
			donec <- string(b[:n])
		}()
		var alias netip.Addr
		check(t, in(s.app, s.pod.NS, func() error {
			fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			to := netip.AddrPortFrom(mapped(a), 53)
			b := make([]byte, 64)
			if err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 3}),
				unix.Sendto(fd, []byte("where"), 0, sockaddr(to))); err != nil {
				return err
			}
			n, _, err := unix.Recvfrom(fd, b, 0)
			if err == nil {
				alias, err = netip.ParseAddr(string(b[:n]))
			}
			return err
		}))
		check(t, in(s.proxy, s.pod.NS, func() error {
			family := unix.AF_INET
			if alias.Is6() {
				family = unix.AF_INET6
			}
			fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Sendto(fd, []byte("forwarded"), 0, sockaddr(netip.AddrPortFrom(alias, 53)))
		}))
		if got := <-donec; got != "forwarded" {
			t.Errorf("the server at %v got %q from the proxy", a, got)
		}
	}
	// DNS over TCP has a listener of its own.
	answer(t, listen(t, s.proxy, s.pod.NS, "127.0.0.1:15053", nil), "15053")
	c, err := connect(s.app, s.pod.NS, netip.MustParseAddrPort("10.96.0.10:53"), nil)
	if want := "15053 10.96.0.10:53 10.8.0.2"; err != nil || c.line != want {
		t.Errorf("DNS over TCP was answered %q, %v, want %q", c.line, err, want)
	}
	// The proxy's port for names is nobody else's.
	err = in(s.app, s.pod.NS, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Bind(fd, &unix.SockaddrInet4{Port: redirect.PortDNS, Addr: [4]byte{127, 64, 1, 1}})
	})
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("bind to the proxy's port for names: %v, want EPERM", err)
	}
}

// sentTo reads IP_PKTINFO or IPV6_PKTINFO.
func sentTo(oob []byte) netip.Addr {
	msgs, _ := unix.ParseSocketControlMessage(oob)
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_PKTINFO:
			return netip.AddrFrom4([4]byte(m.Data[8:12]))
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_PKTINFO:
			return netip.AddrFrom16([16]byte(m.Data[:16])).Unmap()
		}
	}
	return netip.Addr{}
}

// packetConn makes a UDP socket that ends with the test.
func packetConn(t *testing.T, cg *netlab.Cgroup, ns *netns.NS, addr netip.AddrPort) (pc *net.UDPConn) {
	t.Helper()
	check(t, in(cg, ns, func() (err error) {
		pc, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		return err
	}))
	t.Cleanup(func() { pc.Close() })
	check(t, pc.SetReadDeadline(time.Now().Add(3*time.Second)))
	return pc
}

// resolve answers datagrams with themselves, "where" with the address they were sent to, from the address that they were sent to.
func resolve(t *testing.T, s *stage, addr netip.AddrPort) func() {
	t.Helper()
	var pc *net.UDPConn
	check(t, in(s.proxy, s.pod.NS, func() error {
		lc := &net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) {
				// An IPv6 alias is local by route alone: answering from it takes a transparent socket.
				err = errors.Join(
					ignoreFamily(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_PKTINFO, 1)),
					ignoreFamily(unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1)))
			})
			return errors.Join(proxyOptions("", "", c), cerr, err)
		}}
		network := "udp4"
		if addr.Addr().Is6() {
			network = "udp"
		}
		p, err := lc.ListenPacket(t.Context(), network, addr.String())
		if err == nil {
			pc = p.(*net.UDPConn)
		}
		return err
	}))
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		b, oob := make([]byte, 512), make([]byte, 512)
		for {
			n, on, _, from, err := pc.ReadMsgUDPAddrPort(b, oob)
			if err != nil {
				return
			}
			if string(b[:n]) == "where" {
				n = copy(b, sentTo(oob[:on]).String())
			}
			// What came tells where it was sent to; sent back it tells where from.
			_, _, _ = pc.WriteMsgUDPAddrPort(b[:n], oob[:on], from)
		}
	}()
	return func() { pc.Close(); <-donec }
}
