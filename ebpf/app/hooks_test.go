package app_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/app"
	"github.com/ambit-mesh/ambit/ebpf/cni/command"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// Programs tell processes apart by their cgroup, so the agent and the proxy of
// these tests are processes: this binary, run again.
const roleEnv = "AMBIT_TEST_ROLE"

func playRole(role string) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	// Who started us has moved us to our cgroup once it says so.
	if role == "plugin" {
		return command.Main(ctx, nil, os.Stdout, os.Stderr)
	}
	if role == "agent at once" {
		role = "agent"
	} else if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return 1
	}
	switch role {
	case "bounded":
		return bounded(strings.Split(os.Getenv(capsEnv), ","))
	case "agent", "agent in a cgroup namespace":
		return app.Main(ctx, os.Args[1:], os.Stdout, os.Stderr)
	case "proxy":
		p := &listeners{pods: map[string][]net.Listener{}}
		c := handoff.NewClient(handoff.ClientConfig{Path: os.Args[1], Handler: p})
		if err := c.Run(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	default:
		<-ctx.Done()
		return 0
	}
}

// capsEnv lists capabilities, by number.
const capsEnv = "AMBIT_TEST_CAPS"

// bounded becomes an agent that has the named capabilities alone.
func bounded(keep []string) int {
	runtime.LockOSThread() // the set is a thread's, and what it executes has it
	for c := range unix.CAP_LAST_CAP + 1 {
		if !slices.Contains(keep, strconv.Itoa(c)) {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
	}
	if err := os.Setenv(roleEnv, "agent at once"); err == nil {
		err = unix.Exec("/proc/self/exe", os.Args, os.Environ())
		fmt.Fprintln(os.Stderr, err)
	}
	return 1
}

// listeners is a proxy that tells whoever it accepts where it wanted to go.
type listeners struct{ pods map[string][]net.Listener }

func (l *listeners) AddPod(ctx context.Context, p handoff.Pod) error {
	defer p.NS.Close()
	if len(l.pods[p.UID]) > 0 {
		return nil // as ztunnel: a pod that it has keeps its listeners
	}
	for _, port := range []string{"15001", "15006", "15008"} {
		lc := &net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) {
				err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, redirect.MarkProxy),
					unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
					unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
			})
			return errors.Join(cerr, err)
		}}
		lc.SetMultipathTCP(false)
		ln, err := p.NS.Listen(ctx, lc, "tcp4", "0.0.0.0:"+port)
		if err != nil {
			return err
		}
		l.pods[p.UID] = append(l.pods[p.UID], ln)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					fmt.Fprintf(c, "%s %s\n", port, wanted(c.(*net.TCPConn)))
					_, _ = io.Copy(c, c)
				}()
			}
		}()
	}
	fmt.Fprintf(os.Stderr, "listening in %s\n", p.UID)
	return nil
}

// wanted is SO_ORIGINAL_DST, or the address that was dialled.
func wanted(c *net.TCPConn) (a netip.AddrPort) {
	a = c.LocalAddr().(*net.TCPAddr).AddrPort()
	raw, err := c.SyscallConn()
	if err != nil {
		return a
	}
	_ = raw.Control(func(fd uintptr) {
		// A struct sockaddr_in fits into the multicast request that is as long.
		if m, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST); err == nil {
			a = netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Multiaddr[4:8])), uint16(m.Multiaddr[2])<<8|uint16(m.Multiaddr[3]))
		}
	})
	return a
}

func (l *listeners) DelPod(uid string) error {
	for _, ln := range l.pods[uid] {
		_ = ln.Close()
	}
	delete(l.pods, uid)
	return nil
}

func (l *listeners) SnapshotDone([]string) {}

// meshed is a node whose pods are captured by programs: a pod and a client that is none.
type meshed struct {
	*node
	app, proxy  *netlab.Cgroup
	root, bpffs string
	pod, client *netlab.Host
	processes   []*process
}

var (
	podAddr   = netip.MustParseAddr("10.0.0.1")
	plainAddr = netip.MustParseAddrPort("10.0.0.2:8080")
)

func newMeshed(t *testing.T) *meshed {
	t.Helper()
	cg := netlab.MustCgroups(t, "app", "proxy")
	m := &meshed{node: newNode(t), app: cg[0], proxy: cg[1], root: filepath.Dir(cg[0].Path), bpffs: filepath.Join(netlab.MustBPFFS(t), "ambit")}
	m.namespace("istio.io/dataplane-mode: ambient")
	m.pod, m.client = m.node.pod("u1"), netlab.MustHost(t, "client")
	check(t, netlab.Cable(m.pod, "eth0", m.client, "eth0"), m.pod.Up("eth0"), m.client.Up("eth0"),
		m.pod.Addr("eth0", netip.PrefixFrom(podAddr, 24)), m.client.Addr("eth0", netip.PrefixFrom(plainAddr.Addr(), 24)))
	var ln net.Listener
	check(t, within(m.app, m.client.NS, func() (err error) {
		ln, err = net.Listen("tcp4", plainAddr.String())
		return err
	}))
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
	return m
}

// within runs f on a thread of cg inside ns.
func within(cg *netlab.Cgroup, ns *netns.NS, f func() error) error {
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

// call connects from the pod as an app and returns the first line it is told.
func (m *meshed) call() (line string, err error) {
	err = within(m.app, m.pod.NS, func() error {
		fd, err := dial(plainAddr)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		line, err = read(fd)
		return err
	})
	return line, err
}

func dial(to netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	tv := unix.Timeval{Sec: 20} // what only a failure reaches
	if err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		connect(fd, to)); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// connect is connect(2) that goes on after a signal, which a socket with a time-out does
// not by itself: the runtime and processes that end send some.
func connect(fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	if !errors.Is(err, unix.EINTR) {
		return err
	}
	for errors.Is(err, unix.EINTR) {
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 20_000)
	}
	if err != nil {
		return err
	}
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = unix.Errno(code)
	}
	return err
}

func read(fd int) (string, error) {
	b := make([]byte, 256)
	n, err := unix.Read(fd, b)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(fd, b)
	}
	return strings.TrimSpace(string(b[:max(n, 0)])), err
}

// process starts this binary in a role, inside cg (nil: above the pods).
func (m *meshed) process(role string, cg *netlab.Cgroup, ns *netns.NS, args ...string) *process {
	m.t.Helper()
	self, err := os.Executable()
	check(m.t, err)
	p := &process{cmd: exec.Command(self, args...)}
	m.processes = append(m.processes, p)
	// The race detector makes a process linger for a second at its end.
	p.cmd.Env = append(os.Environ(), roleEnv+"="+role, "GORACE=atexit_sleep_ms=0")
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	in, err := p.cmd.StdinPipe()
	check(m.t, err)
	if role == "agent in a cgroup namespace" {
		p.cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWCGROUP
	}
	start := p.cmd.Start
	if ns != nil {
		start = func() error { return ns.Do(p.cmd.Start) }
		p.cmd.SysProcAttr.Pdeathsig = 0 // the thread that starts it may end
	}
	check(m.t, start())
	m.t.Cleanup(p.kill)
	if cg != nil {
		check(m.t, os.WriteFile(filepath.Join(cg.Path, "cgroup.procs"), []byte(strconv.Itoa(p.cmd.Process.Pid)), 0o644))
	}
	_, err = io.WriteString(in, "go\n")
	check(m.t, err)
	return p
}

type process struct {
	cmd  *exec.Cmd
	out  buffer
	once sync.Once
}

// buffer is written by a process while the test reads it.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func (p *process) kill() {
	p.once.Do(func() {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
}

func (p *process) stop(t *testing.T) {
	t.Helper()
	p.once.Do(func() {
		_ = p.cmd.Process.Signal(unix.SIGTERM)
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, p.out.String())
		}
	})
}

func (m *meshed) agent(args ...string) *process {
	m.t.Helper()
	return m.agentAs("agent", args...)
}

func (m *meshed) agentAs(role string, args ...string) *process {
	m.t.Helper()
	return m.process(role, nil, nil, append([]string{
		"--source", "dir:" + m.file("source"), "--node", "n1", "--zds-path", m.file("zds.sock"),
		"--cni-socket", m.file("cni.sock"), "--state-dir", m.file("state"),
		"--status-dir", m.file("status"), "--health-addr", "", "--bpffs-dir", m.bpffs,
		"--cgroup-root", m.root, "--host-probes=false", "--dns-capture=false",
		"--unenrol-propagation", "10ms", "--unenrol-drain", "10ms",
	}, args...)...)
}

func (m *meshed) startProxy(cg *netlab.Cgroup) *process {
	m.t.Helper()
	return m.process("proxy", cg, nil, m.file("zds.sock"))
}

// patience is how many looks of 5 ms a process gets on a machine that has much else
// to do.
const patience = 12_000

// wantVia waits for the pod's status.
func (m *meshed) wantVia(want agent.Redirection, via, reason string) {
	m.t.Helper()
	var last []byte
	for range patience {
		last, _ = os.ReadFile(m.file("status/u1.json"))
		var s agent.Status
		if json.Unmarshal(last, &s) == nil && s.Redirection == want && s.Via == via && strings.Contains(s.Reason, reason) {
			return
		}
		time.Sleep(5 * time.Millisecond) // another process's file
	}
	for _, p := range m.processes {
		m.t.Logf("%v:\n%s", p.cmd.Args, p.out.String())
	}
	m.t.Fatalf("status is %s, want %s via %s with %q", last, want, via, reason)
}

func (m *meshed) wantLog(p *process, text string) {
	m.t.Helper()
	for range patience {
		if strings.Contains(p.out.String(), text) {
			return
		}
		time.Sleep(5 * time.Millisecond) // another process's output
	}
	m.t.Fatalf("%v did not say %q:\n%s", p.cmd.Args, text, p.out.String())
}

func (m *meshed) wantCaptured(when string) {
	m.t.Helper()
	if line, err := m.call(); err != nil || line != "15001 "+plainAddr.String() {
		m.t.Fatalf("%s: answered %q, %v, want the proxy", when, line, err)
	}
}

func (m *meshed) nodeStatus() agent.NodeStatus {
	m.t.Helper()
	d, err := agent.OpenStatusDir(m.file("status"))
	check(m.t, err)
	s, err := d.Node()
	check(m.t, err)
	return s
}

func (m *meshed) cleanup() {
	m.t.Helper()
	var out bytes.Buffer
	if code := app.Main(m.t.Context(), []string{"cleanup", "--status-dir", m.file("status"), "--bpffs-dir", m.bpffs}, &out, &out); code != 0 {
		m.t.Errorf("cleanup: %d, %s", code, out.String())
	}
	if left, err := os.ReadDir(m.bpffs); !errors.Is(err, os.ErrNotExist) {
		m.t.Errorf("cleanup left %v, %v", left, err)
	}
}

func TestProgramsCapture(t *testing.T) {
	m := newMeshed(t)
	a := m.agent("--redirect", "auto")
	m.wantVia(agent.Pending, "ebpf", "no proxy is connected")
	if line, err := m.call(); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("without a proxy: answered %q, %v, want a refusal", line, err)
	}
	p := m.startProxy(m.proxy)
	m.wantVia(agent.Enabled, "ebpf", "label")
	m.wantCaptured("enrolled")
	m.wantRules(m.pod.NS, false)
	if s := m.nodeStatus(); s.Redirector != "ebpf" || s.Requested != "auto" || len(s.Limits)+len(s.Missing)+len(s.Obstacles) > 0 {
		t.Errorf("the node's status is %+v", s)
	}
	a.stop(t)
	m.wantCaptured("without an agent")
	a = m.agent()
	m.wantLog(a, "proxy connected")
	m.wantCaptured("with the next agent")
	// Two proxies during an upgrade, the second one in another cgroup.
	next := filepath.Join(m.root, "next")
	check(t, os.Mkdir(next, 0o755), os.WriteFile(filepath.Join(next, "cgroup.type"), []byte("threaded"), 0o644))
	t.Cleanup(func() { _ = os.Remove(next) })
	second := m.startProxy(&netlab.Cgroup{Path: next})
	m.wantLog(second, "listening in u1") // that it is connected does not say so
	m.wantCaptured("with two proxies")
	p.kill()
	m.wantCaptured("with the second proxy")
	m.wantVia(agent.Enabled, "ebpf", "label")

	m.namespace("")
	m.wantStatus("u1", "")
	for range patience {
		if line, err := m.call(); err == nil && line == "plain" {
			break
		}
		time.Sleep(5 * time.Millisecond) // the kernel's state
	}
	if line, err := m.call(); err != nil || line != "plain" {
		t.Errorf("out of the mesh: answered %q, %v", line, err)
	}
	a.stop(t)
	second.kill()
	m.cleanup()
}

// TestAgentKilledAtAnyPoint kills the agent at ever other points of its start: the
// pod is captured by a live proxy throughout.
func TestAgentKilledAtAnyPoint(t *testing.T) {
	m := newMeshed(t)
	a := m.agent("--redirect", "ebpf")
	m.startProxy(m.proxy)
	m.wantVia(agent.Enabled, "ebpf", "label")
	for i := range 8 {
		a.kill()
		m.wantCaptured("without an agent")
		a = m.agent("--redirect", "ebpf")
		for end := time.Now().Add(time.Duration(i) * 20 * time.Millisecond); time.Now().Before(end); {
			m.wantCaptured("while the agent starts")
		}
	}
	m.wantLog(a, "proxy connected")
	m.wantVia(agent.Enabled, "ebpf", "label")
	m.wantCaptured("in the end")
	// The same while pods change over, when the proxy may be asked to listen again.
	for i := range 8 {
		a.kill()
		a = m.agent("--redirect", []string{"nftables", "ebpf"}[i%2])
		for end := time.Now().Add(time.Duration(i+2) * 30 * time.Millisecond); time.Now().Before(end); {
			if line, err := m.call(); err == nil && line != "15001 "+plainAddr.String() {
				t.Fatalf("while pods change over: answered %q", line)
			}
		}
	}
	m.wantVia(agent.Enabled, "ebpf", "label")
	m.wantCaptured("changed over in the end")
	a.kill()
	m.cleanup()
	if line, err := m.call(); err != nil || line != "plain" {
		t.Errorf("after cleanup: answered %q, %v", line, err)
	}
}

// TestRebuiltState finds state of a layout that it does not know: nothing leaves in
// clear text, and a proxy that runs on is made to listen again.
func TestRebuiltState(t *testing.T) {
	m := newMeshed(t)
	a := m.agent("--redirect", "ebpf")
	m.startProxy(m.proxy)
	m.wantVia(agent.Enabled, "ebpf", "label")
	a.stop(t)
	check(t, os.Remove(filepath.Join(m.bpffs, "maps/mesh_enrolled")))
	a = m.agent("--redirect", "ebpf")
	// The proxy lets go of the pod after the word and before it listens again.
	began := time.Now()
	for again := false; ; {
		line, err := m.call()
		// Which destination it had may be lost with the state; a proxy closes then.
		if err == nil && !strings.HasPrefix(line, "15001 ") {
			t.Fatalf("while state is rebuilt: answered %q", line)
		}
		if again && err == nil && line == "15001 "+plainAddr.String() {
			break
		}
		again = again || strings.Contains(a.out.String(), "has to listen again")
		if time.Since(began) > time.Minute {
			t.Fatalf("while state is rebuilt: answered %q, %v:\n%s", line, err, a.out.String())
		}
	}
	m.wantLog(a, "will be rebuilt")
	m.wantVia(agent.Enabled, "ebpf", "label")
	// Who is in no mesh is no longer held.
	if err := within(m.app, m.client.NS, func() error {
		fd, err := dial(plainAddr)
		if err == nil {
			_ = unix.Close(fd)
		}
		return err
	}); err != nil {
		t.Errorf("a pod that is not enrolled cannot connect: %v", err)
	}
	// A pod that was captured and cannot be captured again stays closed.
	a.stop(t)
	good, err := os.ReadFile(m.file("source/u1.yaml"))
	check(t, err, os.Remove(filepath.Join(m.bpffs, "maps/mesh_enrolled")))
	m.write("u1.yaml", strings.Replace(string(good), "podIPs: [", "podIPs: [{ip: 'fd00::1'}, ", 1))
	check(t, m.pod.Sysctl("net/ipv6/conf/all/disable_ipv6", "1"))
	a = m.agent("--redirect", "ebpf")
	m.wantVia(agent.Enabled, "ebpf", "IPv6")
	if line, err := m.call(); !errors.Is(err, unix.EPERM) {
		t.Errorf("a pod that cannot be captured again: answered %q, %v, want EPERM", line, err)
	}
	m.write("u1.yaml", string(good))
	m.wantVia(agent.Enabled, "ebpf", "label")
	m.wantCaptured("captured after all")
	a.stop(t)
	m.cleanup()
}

// The kernel names the proxy's cgroup relative to the agent's namespace.
func TestAgentInACgroupNamespace(t *testing.T) {
	m := newMeshed(t)
	a := m.agentAs("agent in a cgroup namespace", "--redirect", "ebpf")
	m.startProxy(m.proxy)
	m.wantVia(agent.Enabled, "ebpf", "label")
	m.wantCaptured("enrolled")
	a.stop(t)
	m.cleanup()
}

// TestChangeOfRedirector restarts the agent with the other redirector, to and fro,
// under traffic: no connection is made in clear text, and those that are open stay.
func TestChangeOfRedirector(t *testing.T) {
	m := newMeshed(t)
	a := m.agent("--redirect", "nftables")
	m.startProxy(m.proxy)
	m.wantVia(agent.Enabled, "nftables", "label")
	stop, donec := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(donec)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if line, err := m.call(); err == nil && line != "15001 "+plainAddr.String() {
				t.Errorf("while the redirector changes: answered %q", line)
			}
		}
	}()
	var open []int
	for _, kind := range []string{"ebpf", "nftables", "ebpf"} {
		check(t, within(m.app, m.pod.NS, func() error {
			fd, err := dial(plainAddr)
			if err != nil {
				return err
			}
			open = append(open, fd)
			_, err = read(fd) // the greeting
			return err
		}))
		a.stop(t)
		a = m.agent("--redirect", kind)
		m.wantVia(agent.Enabled, kind, "label")
		m.wantCaptured("changed over to " + kind)
		if s := m.nodeStatus(); s.Redirector != kind || kind == "nftables" != (len(s.Limits) > 0) {
			t.Errorf("the node's status is %+v", s)
		}
		for i, fd := range open {
			_, err := unix.Write(fd, []byte("still there?"))
			line, rerr := read(fd)
			if err != nil || rerr != nil || line != "still there?" {
				t.Errorf("connection %d after the change to %s: %q, %v, %v", i, kind, line, err, rerr)
			}
		}
	}
	close(stop)
	<-donec
	for _, fd := range open {
		_ = unix.Close(fd)
	}
	a.stop(t)
	m.cleanup()
	m.wantRules(m.pod.NS, false)
}

// TestProxyAmongOthers: whatever shares the proxy's cgroup would be believed to be
// the proxy.
func TestProxyAmongOthers(t *testing.T) {
	m := newMeshed(t)
	a := m.agent("--redirect", "ebpf")
	m.wantVia(agent.Pending, "ebpf", "no proxy is connected")
	m.process("idle", m.app, m.pod.NS)
	p := m.startProxy(m.app)
	m.wantLog(a, "of pod shop/web-u1, which would be believed to be the proxy")
	p.kill()
	p = m.startProxy(nil)
	m.wantLog(a, "which holds the pods' cgroup root")
	p.kill()
	// What comes to be below the proxy's cgroup would be the proxy too.
	parent := &netlab.Cgroup{Path: filepath.Join(m.root, "parent")}
	for _, dir := range []string{parent.Path, filepath.Join(parent.Path, "child")} {
		check(t, os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "cgroup.type"), []byte("threaded"), 0o644))
		t.Cleanup(func() { _ = os.Remove(dir) })
	}
	p = m.startProxy(parent)
	m.wantLog(a, "which holds others (child)")
	p.kill()
	m.wantVia(agent.Pending, "ebpf", "no proxy is connected")
	m.startProxy(m.proxy)
	m.wantVia(agent.Enabled, "ebpf", "label")
	a.kill()
	m.cleanup()
}

func TestAutoFallsBack(t *testing.T) {
	m := newMeshed(t)
	a := m.agent("--redirect", "auto", "--bpffs-dir", m.file("nowhere/ambit"))
	m.wantVia(agent.Pending, "nftables", "no proxy")
	s := m.nodeStatus()
	if s.Redirector != "nftables" || !strings.Contains(s.Reason, "mount -t bpf") || !slices.Contains(s.Limits, string(redirect.LimitMark)) {
		t.Errorf("the node's status is %+v", s)
	}
	p := m.startProxy(m.proxy)
	m.wantLog(a, "rules know the proxy by its cgroup")
	m.wantVia(agent.Enabled, "nftables", "label")
	p.kill()
	a.stop(t)
	a = m.agent("--redirect", "ebpf", "--bpffs-dir", m.file("nowhere/ambit"))
	m.wantLog(a, "--redirect=ebpf: ")
	a.kill()
	a = m.agent("--redirect", "auto", "--cgroup-root", m.dir)
	m.wantLog(a, "is not a cgroup2 directory")
	a.stop(t)
	m.cleanup()
}

// TestLeastCapabilities runs the agent with what it says it needs.
func TestLeastCapabilities(t *testing.T) {
	m := newMeshed(t)
	m.startProxy(m.proxy)
	for _, kind := range []string{"nftables", "ebpf"} {
		t.Setenv(capsEnv, strings.Join(app.Capabilities(kind), ","))
		a := m.agentAs("bounded", "--redirect", kind, "--host-probes="+strconv.FormatBool(kind == "ebpf"))
		m.wantVia(agent.Enabled, kind, "label")
		m.wantCaptured("by " + kind)
		m.namespace("")
		m.wantStatus("u1", "")
		m.wantRules(m.pod.NS, false)
		m.namespace("istio.io/dataplane-mode: ambient")
		m.wantVia(agent.Enabled, kind, "label")
		if s := m.nodeStatus(); len(s.Missing) > 0 {
			t.Errorf("it says that it lacks %v", s.Missing)
		}
		a.stop(t)
	}
	without := slices.DeleteFunc(app.Capabilities("ebpf"), func(c string) bool { return c == strconv.Itoa(unix.CAP_SYS_PTRACE) })
	t.Setenv(capsEnv, strings.Join(without, ","))
	a := m.agentAs("bounded", "--redirect", "ebpf")
	m.wantLog(a, `capability="CAP_SYS_PTRACE`)
	m.wantLog(a, "(takes CAP_SYS_PTRACE)")
	a.kill()
	m.cleanup()
}
