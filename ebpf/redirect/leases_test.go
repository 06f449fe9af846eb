package redirect_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/lease"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// pairStage is a stage whose client is a pod too, both accelerated. Applications
// listen on 8080 in the client and answer "app".
type pairStage struct {
	*stage
	outside         *netlab.Cgroup // not below the hooks
	leases          *redirect.Leases
	heard           *heard
	podID, clientID uint64
	accelerated     redirect.PodRules
	stopRun         func()
}

var (
	leaseVIP4 = netip.MustParseAddrPort("10.96.7.7:80")
	leaseVIP6 = netip.MustParseAddrPort("[fd00:96::7]:80")
)

func newPairStage(t testing.TB) *pairStage {
	t.Helper()
	cg := netlab.MustCgroups(t, "pods", "proxy", "outside")
	s := &pairStage{stage: &stage{topology: newTopology(t), app: cg[0], proxy: cg[1]}, outside: cg[2], heard: newHeard(), accelerated: everything}
	s.cfg = redirect.HooksConfig{CgroupRoot: s.app.Path, Dir: netlab.MustBPFFS(t), Node: s.node.NS}
	s.open(t)
	t.Cleanup(func() { check(t, s.hooks.Uninstall(), s.hooks.Close()) })
	s.accelerated.Accelerate = true
	var err error
	s.podID, err = s.pod.NS.Cookie()
	check(t, err)
	s.clientID, err = s.client.NS.Cookie()
	check(t, err)
	s.listenProxy(t)
	for _, port := range []string{"15001", "15006", "15008"} {
		answer(t, listen(t, s.proxy, s.client.NS, "[::]:"+port, proxyOptions), port)
	}
	check(t, s.hooks.Apply(s.pod.NS, s.accelerated), s.hooks.Apply(s.client.NS, s.accelerated),
		s.hooks.Check(s.pod.NS, s.accelerated))
	s.run(t)
	return s
}

// run starts what grants leases, as an agent does.
func (s *pairStage) run(t testing.TB) {
	t.Helper()
	var err error
	s.leases, err = s.hooks.NewLeases()
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan error, 1)
	go func() { donec <- s.leases.Run(ctx) }()
	s.stopRun = sync.OnceFunc(func() {
		cancel()
		if err := <-donec; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(s.stopRun)
}

func (s *pairStage) key(a netip.AddrPort) lease.Key { return lease.Key{NetNS: s.podID, Addr: a} }

func (s *pairStage) target(a netip.Addr, share uint32) lease.Target {
	return lease.Target{NetNS: s.clientID, Addr: netip.AddrPortFrom(a, 8080), Share: share}
}

func (s *pairStage) grant(t testing.TB, to netip.AddrPort, targets ...lease.Target) {
	t.Helper()
	check(t, s.leases.Grant(s.heard, lease.Grant{Key: s.key(to), Targets: targets}))
}

func (s *pairStage) end(t testing.TB, to netip.AddrPort) {
	t.Helper()
	check(t, s.leases.Grant(s.heard, lease.Grant{Key: s.key(to), Cut: true}))
}

// heard collects events.
type heard struct {
	mu     sync.Mutex
	opened map[uint64]lease.Opened
	closed map[uint64]lease.Closed
	morec  chan struct{}
}

func newHeard() *heard {
	return &heard{opened: map[uint64]lease.Opened{}, closed: map[uint64]lease.Closed{}, morec: make(chan struct{}, 1)}
}

func (h *heard) Opened(o lease.Opened) {
	h.mu.Lock()
	h.opened[o.Conn] = o
	h.mu.Unlock()
	h.more()
}

func (h *heard) Closed(c lease.Closed) {
	h.mu.Lock()
	h.closed[c.Conn] = c
	h.mu.Unlock()
	h.more()
}

func (h *heard) more() {
	select {
	case h.morec <- struct{}{}:
	default:
	}
}

// wait waits until f, called with the lock, is true.
func (h *heard) wait(t testing.TB, what string, f func() bool) {
	t.Helper()
	late := time.After(60 * time.Second)
	for {
		h.mu.Lock()
		ok := f()
		h.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-h.morec:
		case <-late:
			t.Fatalf("%s: not heard of (%d opened, %d closed)", what, len(h.opened), len(h.closed))
		}
	}
}

// listening counts the listeners of both pods.
func (s *pairStage) listening(t testing.TB) (n int) {
	t.Helper()
	for _, ns := range []*netns.NS{s.pod.NS, s.client.NS} {
		all, err := sockdiag.List(ns, sockdiag.Of(sockdiag.Listen))
		check(t, err)
		n += len(all)
	}
	return n
}

// hold opens a connection of the pod's application and keeps it.
func (s *pairStage) hold(t testing.TB, to netip.AddrPort) (fd int) {
	t.Helper()
	check(t, in(s.app, s.pod.NS, func() (err error) {
		family := unix.AF_INET
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}), dial(fd, to))
	}))
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// echo makes the application on 8080 send back what it gets, and tells how many
// connections it has.
func (s *pairStage) echo(t testing.TB) (live func() int) {
	t.Helper()
	ln := listen(t, s.app, s.client.NS, "[::]:8080", nil)
	var (
		mu sync.Mutex
		n  int
		wg sync.WaitGroup
	)
	donec := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-donec; wg.Wait() })
	go func() {
		defer close(donec)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			n++
			mu.Unlock()
			wg.Go(func() {
				_, _ = io.Copy(c, c)
				c.Close()
				mu.Lock()
				n--
				mu.Unlock()
			})
		}
	}()
	return func() int { mu.Lock(); defer mu.Unlock(); return n }
}

func roundTrip(fd int, msg string) error {
	if _, err := unix.Write(fd, []byte(msg)); err != nil {
		return err
	}
	b := make([]byte, len(msg))
	for at := 0; at < len(b); {
		n, err := read(fd, b[at:])
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		at += n
	}
	if string(b) != msg {
		return fmt.Errorf("echo of %q is %q", msg, b)
	}
	return nil
}

func TestLeasesDirect(t *testing.T) {
	s := newPairStage(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "app")
	direct4 := netip.AddrPortFrom(clientV4, 8080)
	for _, tc := range []struct {
		name    string
		to, key netip.AddrPort
		target  netip.Addr
		prepare func(int) error
		line    string // with a lease
	}{
		{name: "address of the pod", to: direct4, key: direct4, target: clientV4, line: "app 10.9.0.2:8080 10.8.0.2"},
		{name: "virtual address", to: leaseVIP4, key: leaseVIP4, target: clientV4, line: "app 10.9.0.2:8080 10.8.0.2"},
		{name: "IPv6", to: leaseVIP6, key: leaseVIP6, target: clientV6, line: "app [fd00:9::2]:8080 fd00:8::2"},
		{name: "IPv4 in an IPv6 socket", to: netip.AddrPortFrom(mapped(leaseVIP4.Addr()), 80), key: leaseVIP4, target: clientV4, line: "app 10.9.0.2:8080 10.8.0.2"},
		{name: "own address bound", to: leaseVIP4, key: leaseVIP4, target: clientV4, prepare: bindTo(netip.AddrPortFrom(podV4, 0)), line: "app 10.9.0.2:8080 10.8.0.2"},
		// What wants something of its own takes the ordinary way.
		{name: "port bound", to: leaseVIP4, key: leaseVIP4, target: clientV4, prepare: bindTo(netip.MustParseAddrPort("0.0.0.0:33007")), line: "15001 10.96.7.7:80"},
		{name: "foreign address bound", to: leaseVIP4, key: leaseVIP4, target: clientV4, prepare: func(fd int) error {
			return errors.Join(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1), unix.Bind(fd, sockaddr(netip.MustParseAddrPort("10.9.0.77:0"))))
		}, line: "15001 10.96.7.7:80 10.9.0.77"},
		{name: "marked", to: leaseVIP4, key: leaseVIP4, target: clientV4, prepare: func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, redirect.MarkReturn)
		}, line: "15001 10.96.7.7:80"},
		{name: "device bound", to: leaseVIP4, key: leaseVIP4, target: clientV4, prepare: func(fd int) error { return unix.BindToDevice(fd, "eth0") }, line: "15001 10.96.7.7:80"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.target.Is6() && !netlab.IPv6() {
				t.Skip("needs IPv6")
			}
			captured := "15001 " + tc.key.String()
			for _, step := range []struct {
				name, line string
				grant      func()
			}{
				{"before", captured, func() {}},
				{"leased", tc.line, func() { s.grant(t, tc.key, s.target(tc.target, lease.All)) }},
				{"after", captured, func() { s.end(t, tc.key) }},
			} {
				step.grant()
				if step.name != "leased" && strings.Contains(tc.name, "foreign") {
					continue // its answer does not find back either way
				}
				c, err := connect(s.app, s.pod.NS, tc.to, tc.prepare)
				if strings.Contains(tc.name, "foreign") && err != nil {
					continue // captured: the proxy's answer goes to a stranger
				}
				check(t, err)
				if !strings.HasPrefix(c.line, step.line) {
					t.Errorf("%s: answered %q, want %q", step.name, c.line, step.line)
				}
				if c.peer != tc.to {
					t.Errorf("%s: getpeername tells %v, want %v", step.name, c.peer, tc.to)
				}
			}
		})
	}
}

// TestLeasesAccount has bytes as applications count them, however they close.
func TestLeasesAccount(t *testing.T) {
	s := newPairStage(t)
	s.echo(t)
	s.grant(t, leaseVIP4, s.target(clientV4, lease.All))
	for _, tc := range []struct {
		name           string
		end            func(fd int)
		sent, received uint64
	}{
		{"closed", func(fd int) { unix.Close(fd) }, 5, 5},
		{"half-closed", func(fd int) {
			check(t, unix.Shutdown(fd, unix.SHUT_WR))
			_, _ = read(fd, make([]byte, 1))
			unix.Close(fd)
		}, 5, 5},
		{"half-closed after more", func(fd int) {
			_, err := unix.Write(fd, []byte("more"))
			check(t, err, unix.Shutdown(fd, unix.SHUT_WR))
			for {
				if n, err := read(fd, make([]byte, 16)); n <= 0 || err != nil {
					break
				}
			}
			unix.Close(fd)
		}, 9, 9},
		{"reset", func(fd int) {
			check(t, unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
			unix.Close(fd)
		}, 5, 5},
	} {
		h := s.heard
		h.mu.Lock()
		clear(h.opened)
		clear(h.closed)
		h.mu.Unlock()
		var fd int
		check(t, in(s.app, s.pod.NS, func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			return errors.Join(err, dial(fd, leaseVIP4), roundTrip(fd, "hello"))
		}))
		h.wait(t, tc.name+": opened", func() bool { return len(h.opened) == 1 })
		tc.end(fd)
		h.wait(t, tc.name+": closed", func() bool { return len(h.closed) == 1 })
		for cookie, c := range h.closed {
			if c.Sent != tc.sent || c.Received != tc.received || c.Lost {
				t.Errorf("%s: %d bytes sent and %d received (lost %v), want %d and %d", tc.name, c.Sent, c.Received, c.Lost, tc.sent, tc.received)
			}
			o := h.opened[cookie]
			if o.Key != s.key(leaseVIP4) || o.Src.Addr() != podV4 || o.Dst != netip.AddrPortFrom(clientV4, 8080) || o.Target != s.clientID {
				t.Errorf("%s: opened %+v", tc.name, o)
			}
		}
	}
}

func TestLeasesShare(t *testing.T) {
	s := newPairStage(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "app")
	s.grant(t, leaseVIP4, s.target(clientV4, lease.All/4))
	direct := 0
	const n = 200
	for range n {
		c, err := connect(s.app, s.pod.NS, leaseVIP4, nil)
		check(t, err)
		if strings.HasPrefix(c.line, "app") {
			direct++
		}
	}
	// Six standard deviations.
	if direct < n/4-37 || direct > n/4+37 {
		t.Errorf("%d of %d connections went straight, want a quarter", direct, n)
	}
}

// TestLeasesEnd has each way in which a lease ends, and what becomes of a live
// connection then.
func TestLeasesEnd(t *testing.T) {
	for _, tc := range []struct {
		name  string
		end   func(t *testing.T, s *pairStage)
		lives bool
	}{
		{"cut", func(t *testing.T, s *pairStage) { s.end(t, leaseVIP4) }, false},
		{"not asked for any more", func(t *testing.T, s *pairStage) {
			check(t, s.leases.Grant(s.heard, lease.Grant{Key: s.key(leaseVIP4)}))
		}, true},
		{"the proxy is gone", func(t *testing.T, s *pairStage) { s.leases.Abandon(s.heard) }, false},
		{"the source opts out", func(t *testing.T, s *pairStage) { check(t, s.hooks.Apply(s.pod.NS, everything)) }, false},
		{"the destination opts out", func(t *testing.T, s *pairStage) { check(t, s.hooks.Apply(s.client.NS, everything)) }, false},
		{"the destination leaves", func(t *testing.T, s *pairStage) { check(t, s.hooks.Release(s.client.NS)) }, true},
		{"the destination has left", func(t *testing.T, s *pairStage) {
			check(t, s.hooks.Release(s.client.NS), s.hooks.Remove(s.client.NS))
		}, false},
		{"nobody renews it", func(t *testing.T, s *pairStage) {
			s.leases.SetTTL(time.Millisecond)
			check(t, s.leases.Renew(s.heard))
			s.heard.wait(t, "its connection's end", func() bool { return len(s.heard.closed) == 1 })
		}, false},
		{"the agent dies", func(t *testing.T, s *pairStage) {
			s.stopRun()
			s.leases.SetTTL(time.Millisecond)
			check(t, s.leases.Renew(s.heard))
			unix.Nanosleep(&unix.Timespec{Nsec: 2_000_000}, nil) // the kernel's clock decides
		}, true},
		{"another agent, and nobody asks again", func(t *testing.T, s *pairStage) {
			s.stopRun()
			leases, err := s.hooks.NewLeases()
			check(t, err)
			check(t, leases.Sweep())
			leases.Abandon(nil)
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newPairStage(t)
			live := s.echo(t)
			s.grant(t, leaseVIP4, s.target(clientV4, lease.All))
			fd := s.hold(t, leaseVIP4)
			check(t, roundTrip(fd, "before"))
			if live() != 1 {
				t.Fatalf("%d connections reached the application directly, want 1", live())
			}
			s.heard.wait(t, "the connection", func() bool { return len(s.heard.opened) == 1 })
			listening := s.listening(t)
			tc.end(t, s)
			// The kernel finds a listener where the connection is gone.
			if after := s.listening(t); after != listening {
				t.Errorf("%d sockets listen in both pods, before it were %d", after, listening)
			}
			if err := roundTrip(fd, "after"); (err == nil) != tc.lives {
				t.Errorf("the live connection says %v, want it alive: %v", err, tc.lives)
			}
			c, err := connect(s.app, s.pod.NS, leaseVIP4, nil)
			if err != nil || !strings.HasPrefix(c.line, "15001") {
				t.Errorf("the next connection is answered %q, %v, want it captured", c.line, err)
			}
		})
	}
}

// TestLeasesHooksComeAndGo: pods that are not accelerated pay for no sockops program.
func TestLeasesHooksComeAndGo(t *testing.T) {
	s := newPairStage(t)
	attached := func() bool {
		_, err := os.Stat(filepath.Join(s.cfg.Dir, "lease", "lease_sockops"))
		return err == nil
	}
	check(t, s.hooks.Prune(), s.hooks.Apply(s.pod.NS, everything), s.hooks.Prune())
	if !attached() {
		t.Fatal("detached while a pod is accelerated")
	}
	check(t, s.hooks.Apply(s.client.NS, everything), s.hooks.Prune())
	if attached() {
		t.Error("still attached")
	}
}

// TestLeasesNextProxy has a proxy that takes over from one that drains.
func TestLeasesNextProxy(t *testing.T) {
	s := newPairStage(t)
	s.echo(t)
	s.grant(t, leaseVIP4, s.target(clientV4, lease.All))
	fd := s.hold(t, leaseVIP4)
	old, next := s.heard, newHeard()
	old.wait(t, "the connection", func() bool { return len(old.opened) == 1 })
	s.heard = next
	s.grant(t, leaseVIP4, s.target(clientV4, lease.All))
	s.leases.Abandon(old)
	check(t, s.leases.Sweep(), roundTrip(fd, "after"))
	old.wait(t, "that it is another's", func() bool { return len(old.closed) == 1 })
	next.wait(t, "the connection", func() bool { return len(next.opened) == 1 })
}

// TestLeasesNextAgent has a lease and a connection that outlive the agent.
func TestLeasesNextAgent(t *testing.T) {
	s := newPairStage(t)
	s.echo(t)
	s.grant(t, leaseVIP4, s.target(clientV4, lease.All))
	fd := s.hold(t, leaseVIP4)
	check(t, roundTrip(fd, "before"))
	s.stopRun()
	check(t, s.hooks.Close())
	s.open(t)
	s.heard = newHeard()
	s.run(t)
	check(t, s.hooks.Apply(s.pod.NS, s.accelerated), s.hooks.Apply(s.client.NS, s.accelerated))
	s.grant(t, leaseVIP4, s.target(clientV4, lease.All))
	check(t, s.leases.Sweep(), roundTrip(fd, "after"))
	s.heard.wait(t, "the older connection", func() bool { return len(s.heard.opened) == 1 })
}

// TestLeasesAreNobodyElses has who would profit from a lease that is another's.
func TestLeasesAreNobodyElses(t *testing.T) {
	s := newPairStage(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "app")
	direct := netip.AddrPortFrom(clientV4, 8080)
	s.grant(t, direct, s.target(clientV4, lease.All))

	// A SYN that no hook has seen: a process outside the hooks' cgroup, as a raw
	// socket's would be.
	if c, err := connect(s.outside, s.pod.NS, direct, func(fd int) error {
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 200000})
	}); err == nil {
		t.Errorf("a SYN past the hooks was answered %q", c.line)
	}
	// The node is not the pod.
	c, err := connect(s.app, s.node.NS, direct, nil)
	if err != nil || !strings.HasPrefix(c.line, "15006") {
		t.Errorf("another source was answered %q, %v, want 15006", c.line, err)
	}
	for _, tc := range []struct {
		name string
		g    lease.Grant
	}{
		{"address of another pod", lease.Grant{Key: s.key(direct), Targets: []lease.Target{{NetNS: s.clientID, Addr: netip.AddrPortFrom(podV4, 8080), Share: 1}}}},
		{"proxy's port", lease.Grant{Key: s.key(direct), Targets: []lease.Target{{NetNS: s.clientID, Addr: netip.AddrPortFrom(clientV4, 15006), Share: 1}}}},
		{"itself", lease.Grant{Key: s.key(direct), Targets: []lease.Target{{NetNS: s.podID, Addr: netip.AddrPortFrom(podV4, 8080), Share: 1}}}},
		{"source not accelerated", lease.Grant{Key: lease.Key{NetNS: 1, Addr: direct}, Targets: []lease.Target{s.target(clientV4, 1)}}},
	} {
		if _, refused := errors.AsType[*lease.RefusedError](s.leases.Grant(s.heard, tc.g)); !refused {
			t.Errorf("%s: granted", tc.name)
		}
	}
}

// TestLeasesRace has connects at every moment of a lease's life. Once its end has
// returned, no connection that it let through lives.
func TestLeasesRace(t *testing.T) {
	s := newPairStage(t)
	live := s.echo(t)
	stopc := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stopc:
					return
				default:
				}
				_ = in(s.app, s.pod.NS, func() error {
					fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
					if err != nil {
						return err
					}
					defer unix.Close(fd)
					_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 2000})
					if err := unix.Connect(fd, sockaddr(leaseVIP4)); err != nil {
						return err
					}
					_, err = unix.Read(fd, make([]byte, 1)) // alive until the timeout
					return err
				})
			}
		})
	}
	reached := 0
	for range 60 {
		s.grant(t, leaseVIP4, s.target(clientV4, lease.All))
		for range 50 {
			if live() > 0 {
				reached++
				break
			}
			unix.Nanosleep(&unix.Timespec{Nsec: 100_000}, nil)
		}
		s.end(t, leaseVIP4)
		// The kernel has reset what lived; the application reads that in a moment.
		// Nothing new may come meanwhile.
		deadline := time.Now().Add(60 * time.Second)
		for live() > 0 {
			if time.Now().After(deadline) {
				t.Fatalf("%d connections live on after the end of their lease", live())
			}
			unix.Nanosleep(&unix.Timespec{Nsec: 100_000}, nil)
		}
	}
	close(stopc)
	wg.Wait()
	if reached == 0 {
		t.Error("no connection went straight")
	}
}

// TestLeasesNetworkPolicy has what a CNI does with packets between pods.
func TestLeasesNetworkPolicy(t *testing.T) {
	s := newPairStage(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "app")
	s.grant(t, leaseVIP4, s.target(clientV4, lease.All))
	var nft *nftables.Conn
	check(t, s.node.NS.Do(func() (err error) { nft, err = nftables.New(nftables.AsLasting()); return err }))
	defer nft.CloseLasting()
	drop := nftables.ChainPolicyDrop
	table := nft.AddTable(&nftables.Table{Name: "policy", Family: nftables.TableFamilyIPv4})
	nft.AddChain(&nftables.Chain{Name: "forward", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward,
		Priority: nftables.ChainPriorityFilter, Policy: &drop})
	check(t, nft.Flush())
	short := func(fd int) error {
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 200000})
	}
	if c, err := connect(s.app, s.pod.NS, leaseVIP4, short); err == nil {
		t.Errorf("a connection that the network forbids was answered %q", c.line)
	}
	nft.DelTable(table)
	check(t, nft.Flush())
	if c, err := connect(s.app, s.pod.NS, leaseVIP4, nil); err != nil || !strings.HasPrefix(c.line, "app") {
		t.Errorf("a connection that it allows was answered %q, %v", c.line, err)
	}
}
