package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/agent"
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/inpod"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// lab is a pod with real rules, the proxy's DNS in it, and servers behind a
// router. Each server says who it is.
//
//	pod 10.8.0.2 ── 10.8.0.1 servers 10.9.0.1 10.9.0.2 (and fd00:8::1, fd00:9::1)
type lab struct {
	t       *testing.T
	pod     *netlab.Host
	servers *netlab.Host
	rules   agent.Rules
	apps    *netlab.Cgroup // of the pod's processes, where programs capture; this process is the proxy's. nil: rules do
	pods    *inpod.Manager
	account *ledger.Account
}

// redirectors runs a test with rules and with programs.
func redirectors(t *testing.T, f func(t *testing.T, l *lab)) {
	for name, open := range map[string]func(*testing.T) *lab{"nftables": newLab, "eBPF": newHooksLab} {
		t.Run(name, func(t *testing.T) { f(t, open(t)) })
	}
}

// newHooksLab has programs for rules: the process is the proxy, and threads of
// the app's are in a cgroup of their own.
func newHooksLab(t *testing.T) *lab {
	t.Helper()
	cg := netlab.MustCgroups(t, "pods", "proxy")
	l := newLab(t)
	l.apps = cg[0]
	procs := func(dir string) {
		must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644))
	}
	procs(cg[1].Path)
	t.Cleanup(func() { procs(filepath.Dir(cg[1].Path)) })
	h, err := redirect.OpenHooks(redirect.HooksConfig{CgroupRoot: cg[0].Path, Dir: netlab.MustBPFFS(t), Node: l.servers.NS})
	must(t, err)
	must(t, h.Proxy(cg[1].Path), h.Ready())
	l.rules = h
	t.Cleanup(func() { must(t, h.Uninstall(), h.Close()) })
	return l
}

// app runs f as one of the pod's processes: on a thread that ends with it.
func (l *lab) app(f func() error) error {
	donec := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if l.apps != nil {
			err := os.WriteFile(filepath.Join(l.apps.Path, "cgroup.threads"), []byte(strconv.Itoa(unix.Gettid())), 0o644)
			if err != nil {
				donec <- err
				return
			}
		}
		if err := unix.Setns(l.pod.NS.FD(), unix.CLONE_NEWNET); err != nil {
			donec <- err
			return
		}
		donec <- f()
	}()
	return <-donec
}

// dial opens a connection of the app's.
func (l *lab) dial(d net.Dialer, network, addr string) (c net.Conn, err error) {
	err = l.app(func() error {
		d.SetMultipathTCP(false)
		c, err = d.DialContext(l.t.Context(), network, addr)
		return err
	})
	return c, err
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func newLab(t *testing.T) *lab {
	t.Helper()
	netlab.Require(t)
	l := &lab{t: t, pod: netlab.MustHost(t, "pod"), servers: netlab.MustHost(t, "servers")}
	p := netip.MustParsePrefix
	must(t, netlab.Cable(l.pod, "eth0", l.servers, "pod"), l.pod.Up("eth0"), l.servers.Up("pod"),
		l.pod.Addr("eth0", p("10.8.0.2/24")), l.servers.Addr("pod", p("10.8.0.1/24")),
		l.servers.Addr("pod", p("10.9.0.1/32")), l.servers.Addr("pod", p("10.9.0.2/32")),
		l.pod.Route(netlab.Route{Dst: p("0.0.0.0/0"), Via: ip("10.8.0.1")}),
		l.pod.Sysctl("net/ipv4/conf/all/rp_filter", "1"))
	if netlab.IPv6() {
		must(t, l.pod.Addr("eth0", p("fd00:8::2/64")), l.servers.Addr("pod", p("fd00:8::1/64")), l.servers.Addr("pod", p("fd00:9::1/128")), l.servers.Addr("pod", p("fd00:9::2/128")),
			l.pod.Route(netlab.Route{Dst: p("::/0"), Via: ip("fd00:8::1")}))
	}
	var err error
	l.rules, err = redirect.New(redirect.Config{})
	must(t, err)
	return l
}

// proxy serves the pod's DNS as ztunnel does, and then captures it.
func (l *lab) proxy(s *mesh.Snapshot) {
	l.t.Helper()
	self := endpoint("shop", "client", "10.8.0.2", "")
	books := ledger.New(ledger.DefaultLimits())
	l.account = books.Pod("client")
	l.pods = inpod.New(inpod.Config{
		Mark: redirect.MarkProxy, IPv6: true, DrainTimeout: time.Second,
		Serve: func(p handoff.Pod) (inpod.Handlers, error) {
			track := NewConntrack(p.NS)
			srv := NewServer(Config{
				Resolver: NewResolver(ResolverConfig{}), Namespace: "shop", Mesh: func() *mesh.Snapshot { return s },
				Known: func() *mesh.Workload { return self },
				Dial: func(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
					d := &net.Dialer{KeepAlive: -1, Control: sockopt.ControlFor(sockopt.Options{Mark: redirect.MarkProxy})}
					return p.NS.Dial(ctx, d, network, server.String())
				},
				OriginalDst: func(c net.Conn) (netip.AddrPort, error) { return sockopt.OriginalDst(c.(sockopt.Socket)) },
				DatagramDst: track.UDP, Account: l.account,
			})
			refuse := inpod.Blocking(func(_ context.Context, c sockopt.Socket) {})
			return inpod.Handlers{
				Outbound: refuse, Plaintext: refuse, HBONE: refuse, Account: l.account,
				DNSPacket: func(ctx context.Context, c *net.UDPConn) { srv.ServePacket(ctx, c) },
				DNSStream: inpod.Blocking(func(ctx context.Context, c sockopt.Socket) { srv.ServeStream(ctx, c) }),
				Close:     func() { srv.Close(); track.Close() },
			}, nil
		},
	})
	if listens, err := agent.ResolverListens(l.pod.NS); listens || err != nil {
		l.t.Fatalf("a resolver listens before there is one: %v", err)
	}
	ns, err := l.pod.NS.Dup()
	must(l.t, err, l.pods.AddPod(l.t.Context(), handoff.Pod{UID: "u", Name: "client", Namespace: "shop", ServiceAccount: "default", NS: ns}))
	l.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		l.pods.Shutdown(ctx)
		if n := l.account.InUse(ledger.Queries) + l.account.InUse(ledger.Connections); n != 0 {
			l.t.Errorf("%d queries and connections are still accounted to a pod that is gone", n)
		}
	})
	for _, find := range []func(*netns.NS) (bool, error){agent.ResolverListens, agent.ResolverListensToAll} {
		if listens, err := find(l.pod.NS); !listens || err != nil {
			l.t.Fatalf("the resolver is not found: %v", err)
		}
	}
	must(l.t, l.rules.Apply(l.pod.NS, redirect.PodRules{DNS: true, IPv6: netlab.IPv6()}))
}

// serve runs a DNS server in ns. It knows who.test, and from where it was asked.
func serve(t *testing.T, ns *netns.NS, addr string, h mdns.HandlerFunc) {
	t.Helper()
	pc, err := ns.ListenPacket(t.Context(), &net.ListenConfig{}, "udp", addr)
	must(t, err)
	ln, err := ns.Listen(t.Context(), &net.ListenConfig{}, "tcp", addr)
	must(t, err)
	for _, s := range []*mdns.Server{{PacketConn: pc, Handler: h}, {Listener: ln, Handler: h}} {
		started, ended := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { defer close(ended); _ = s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = s.Shutdown(); <-ended })
	}
}

// named answers TXT with its name, the protocol and the client's address.
func named(name string) mdns.HandlerFunc {
	return func(w mdns.ResponseWriter, q *mdns.Msg) {
		m := new(mdns.Msg)
		m.SetReply(q)
		m.RecursionAvailable = true
		host, _, _ := net.SplitHostPort(w.RemoteAddr().String())
		switch q.Question[0].Name {
		case "who.test.":
			m.Answer = append(m.Answer, &mdns.TXT{Hdr: mdns.RR_Header{Name: q.Question[0].Name, Rrtype: mdns.TypeTXT, Class: 1, Ttl: 7},
				Txt: []string{name, w.LocalAddr().Network(), host}})
		case "big.test.":
			for i := range 60 {
				m.Answer = append(m.Answer, &mdns.TXT{Hdr: mdns.RR_Header{Name: q.Question[0].Name, Rrtype: mdns.TypeTXT, Class: 1, Ttl: 7},
					Txt: []string{strings.Repeat(fmt.Sprint(i%10), 50)}})
			}
		case "refused.test.":
			m.Rcode = mdns.RcodeRefused
		default:
			m.Rcode = mdns.RcodeNameError
		}
		size := mdns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = int(o.UDPSize())
			m.SetEdns0(4096, o.Do())
			m.IsEdns0().Option = o.Option // cookies come back as they were
		}
		if w.LocalAddr().Network() == "udp" {
			m.Truncate(size)
		}
		_ = w.WriteMsg(m)
	}
}

// bigAnswer is dig's, its lines sorted.
var bigAnswer = func() string {
	var lines []string
	for i := range 60 {
		lines = append(lines, fmt.Sprintf("%q", strings.Repeat(fmt.Sprint(i%10), 50)))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}()

// ask queries from the pod.
func (l *lab) ask(network, server, name string, qtype uint16, change ...func(*mdns.Msg)) (*mdns.Msg, error) {
	l.t.Helper()
	c, err := l.dial(net.Dialer{Timeout: 30 * time.Second}, network, netip.AddrPortFrom(ip(server), 53).String())
	if err != nil {
		return nil, err
	}
	conn := &mdns.Conn{Conn: c, UDPSize: 65535}
	defer conn.Close()
	q := new(mdns.Msg)
	q.SetQuestion(name, qtype)
	for _, f := range change {
		f(q)
	}
	_ = conn.SetDeadline(time.Now().Add(60 * time.Second))
	if err := conn.WriteMsg(q); err != nil {
		return nil, err
	}
	m, err := conn.ReadMsg()
	if err == nil && m.Id != q.Id {
		err = errors.New("the answer has another id")
	}
	return m, err
}

func records(m *mdns.Msg) string {
	var out []string
	for _, rr := range m.Answer {
		f := strings.Fields(rr.String())
		out = append(out, strings.Join(f[3:], " "))
	}
	slices.Sort(out)
	s := mdns.RcodeToString[m.Rcode]
	if m.Truncated {
		s += " TC"
	}
	return strings.TrimSpace(s + " " + strings.Join(out, ", "))
}

func TestCapturedQueries(t *testing.T) { redirectors(t, testCapturedQueries) }

func testCapturedQueries(t *testing.T, l *lab) {
	servers := map[string]string{"10.9.0.1": "10.8.0.2", "10.9.0.2": "10.8.0.2"}
	if netlab.IPv6() {
		servers["fd00:9::1"] = "fd00:8::2"
	}
	for s := range servers {
		serve(t, l.servers.NS, netip.AddrPortFrom(ip(s), 53).String(), named(s))
	}
	serve(t, l.pod.NS, "127.0.0.53:53", named("resolver"))
	serve(t, l.pod.NS, "10.8.0.2:53", named("own"))
	l.proxy(shop())
	for _, network := range []string{"udp", "tcp"} {
		for s, from := range servers {
			for _, tc := range []struct {
				name  string
				qtype uint16
				want  string
			}{
				{"who.test.", mdns.TypeTXT, fmt.Sprintf("NOERROR TXT %q %q %q", s, network, from)},
				{"refused.test.", mdns.TypeA, "REFUSED"},
				{"nowhere.test.", mdns.TypeA, "NXDOMAIN"},
				{"web.shop.svc.cluster.local.", mdns.TypeA, "NOERROR A 10.96.0.1"},
				{"Web.Shop.svc.cluster.LOCAL.", mdns.TypeAAAA, "NOERROR AAAA fd00:96::1"},
				{"db.shop.svc.cluster.local.", mdns.TypeA, "NOERROR A 10.1.0.1, A 10.1.0.2"},
				{"db-0.db.shop.svc.cluster.local.", mdns.TypeA, "NOERROR A 10.1.0.1"},
				{"_http._tcp.web.shop.svc.cluster.local.", mdns.TypeSRV, "NOERROR SRV 0 100 80 web.shop.svc.cluster.local."},
				{"api.example.com.shop.svc.cluster.local.", mdns.TypeA, "NOERROR A 240.240.0.1, CNAME api.example.com."},
				{"v4.shop.svc.cluster.local.", mdns.TypeAAAA, "NOERROR"},
				{"api.example.com.", mdns.TypeMX, "NOERROR"}, // NXDOMAIN upstream, but the mesh knows the name
			} {
				m, err := l.ask(network, s, tc.name, tc.qtype)
				if err != nil {
					t.Errorf("%s to %s over %s: %v", tc.name, s, network, err)
				} else if got := records(m); got != tc.want {
					t.Errorf("%s to %s over %s: %s, want %s", tc.name, s, network, got, tc.want)
				}
			}
		}
		for addr, name := range map[string]string{"127.0.0.53": "resolver", "10.8.0.2": "own"} { // servers inside the pod
			m, err := l.ask(network, addr, "who.test.", mdns.TypeTXT)
			if err != nil || !strings.Contains(records(m), name) {
				t.Errorf("%s over %s: %v, %v", addr, network, m, err)
			}
		}
	}
	// Truncation and EDNS are the server's.
	m, err := l.ask("udp", "10.9.0.1", "big.test.", mdns.TypeTXT)
	if err != nil || !m.Truncated {
		t.Errorf("a large answer to an old client: %v, %v", m, err)
	}
	m, err = l.ask("udp", "10.9.0.1", "big.test.", mdns.TypeTXT, func(q *mdns.Msg) { q.SetEdns0(4096, true) })
	if err != nil || m.Truncated || len(m.Answer) != 60 || !m.IsEdns0().Do() {
		t.Errorf("a large answer to a client that takes 4096 bytes: %v, %v", m, err)
	}
	m, err = l.ask("tcp", "10.9.0.1", "big.test.", mdns.TypeTXT)
	if err != nil || m.Truncated || len(m.Answer) != 60 {
		t.Errorf("a large answer over TCP: %v, %v", m, err)
	}
	cookie := &mdns.EDNS0_COOKIE{Code: mdns.EDNS0COOKIE, Cookie: "24a5ac1122334455"}
	m, err = l.ask("udp", "10.9.0.1", "who.test.", mdns.TypeTXT, func(q *mdns.Msg) {
		q.SetEdns0(1232, false)
		q.IsEdns0().Option = append(q.IsEdns0().Option, cookie)
	})
	if err != nil || len(m.IsEdns0().Option) != 1 || m.IsEdns0().Option[0].String() != cookie.String() {
		t.Errorf("an EDNS cookie: %v, %v", m, err)
	}
}

// TestAskedDirectly: a query to the listener itself was meant for no server, so
// only the mesh's names are known; it must not go round in circles.
func TestAskedDirectly(t *testing.T) { redirectors(t, testAskedDirectly) }

func testAskedDirectly(t *testing.T, l *lab) {
	l.proxy(shop())
	addrs := []string{"127.0.0.1:15053"}
	if netlab.IPv6() {
		addrs = append(addrs, "[::1]:15053")
	}
	for _, addr := range addrs {
		for _, network := range []string{"udp", "tcp"} {
			for name, want := range map[string]string{"web.shop.svc.cluster.local.": "NOERROR A 10.96.0.1", "who.test.": "SERVFAIL"} {
				c, err := l.dial(net.Dialer{}, network, addr)
				must(t, err)
				conn := &mdns.Conn{Conn: c}
				q := new(mdns.Msg)
				q.SetQuestion(name, mdns.TypeA)
				must(t, conn.SetDeadline(time.Now().Add(60*time.Second)), conn.WriteMsg(q))
				m, err := conn.ReadMsg()
				if err != nil || records(m) != want {
					t.Errorf("%s over %s to %s: %v, %v, want %s", name, network, addr, m, err, want)
				}
				_ = conn.Close()
			}
		}
	}
}

// TestServersThatRefuse: nobody listens there, which the pod learns at once.
func TestServersThatRefuse(t *testing.T) { redirectors(t, testServersThatRefuse) }

func testServersThatRefuse(t *testing.T, l *lab) {
	l.proxy(shop())
	for _, network := range []string{"udp", "tcp"} {
		start := time.Now()
		m, err := l.ask(network, "10.9.0.1", "who.test.", mdns.TypeA)
		if err != nil || m.Rcode != mdns.RcodeServerFailure {
			t.Errorf("over %s after %v: %v, %v", network, time.Since(start), m, err)
		}
	}
}

// TestThreeServersFromOneSocket: each answer comes from the server that was
// asked, although all were led to the same port of the same socket.
func TestThreeServersFromOneSocket(t *testing.T) { redirectors(t, testThreeServersFromOneSocket) }

func testThreeServersFromOneSocket(t *testing.T, l *lab) {
	v4, v6 := []string{"10.9.0.1", "10.9.0.2", "10.8.0.1"}, []string{"fd00:9::1", "fd00:9::2", "fd00:8::1"}
	if !netlab.IPv6() {
		v6 = nil
	}
	for _, a := range slices.Concat(v4, v6) {
		serve(t, l.servers.NS, netip.AddrPortFrom(ip(a), 53).String(), named(a))
	}
	l.proxy(shop())
	for _, tc := range []struct {
		name    string
		local   string
		servers []string
	}{
		{"own address", "10.8.0.2:0", v4},
		{"no address", "0.0.0.0:0", v4},
		{"IPv6 own address", "[fd00:8::2]:0", v6},
		{"IPv6 no address", "[::]:0", v6},
		{"both families", "[::]:0", append(slices.Clone(v6), v4...)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if len(v6) == 0 && tc.local[0] == '[' {
				t.Skip("needs IPv6")
			}
			var pc net.PacketConn
			must(t, l.app(func() (err error) {
				pc, err = net.ListenPacket("udp", tc.local)
				return err
			}))
			defer pc.Close()
			must(t, pc.SetDeadline(time.Now().Add(60*time.Second)))
			for round := range 3 {
				want := map[string]string{}
				for i, server := range tc.servers {
					q := question("who.test.", mdns.TypeTXT, uint16(len(tc.servers)*round+i))
					to := netip.AddrPortFrom(ip(server), 53)
					_, err := pc.WriteTo(packed(t, q), net.UDPAddrFromAddrPort(to))
					must(t, err)
					want[to.String()] = fmt.Sprint(q.Id, server)
				}
				got := map[string]string{}
				for range want {
					b := make([]byte, 1500)
					n, from, err := pc.ReadFrom(b)
					must(t, err)
					m := unpacked(t, b[:n])
					got[from.String()] = fmt.Sprint(m.Id, records(m))
					if len(m.Answer) > 0 {
						got[from.String()] = fmt.Sprint(m.Id, m.Answer[0].(*mdns.TXT).Txt[0])
					}
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("answers %v, want %v", got, want)
				}
			}
		})
	}
	// A connected socket is told its server's address, whoever answered.
	for _, server := range slices.Concat(v4, v6) {
		c, err := l.dial(net.Dialer{}, "udp", netip.AddrPortFrom(ip(server), 53).String())
		must(t, err)
		if got := addrPort(c.RemoteAddr()); got.Addr() != ip(server) || got.Port() != 53 {
			t.Errorf("getpeername of a socket connected to %s: %s", server, got)
		}
		_ = c.Close()
	}
}

// TestNeighboursAreAskedDirectly: a link-local server is known by its interface
// too, which a redirected datagram does not tell.
func TestNeighboursAreAskedDirectly(t *testing.T) { redirectors(t, testNeighboursAreAskedDirectly) }

func testNeighboursAreAskedDirectly(t *testing.T, l *lab) {
	if !netlab.IPv6() {
		t.Skip("needs IPv6")
	}
	p := netip.MustParsePrefix
	must(t, l.pod.Addr("eth0", p("fe80::a:2/64")), l.servers.Addr("pod", p("fe80::a:1/64")))
	serve(t, l.servers.NS, "[::]:53", named("neighbour"))
	l.proxy(shop())
	raw := packed(t, question("who.test.", mdns.TypeTXT, 7))
	for _, connected := range []bool{false, true} {
		var fd int
		must(t, l.app(func() (err error) {
			eth0, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			if fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			to := &unix.SockaddrInet6{Port: 53, ZoneId: uint32(eth0.Index), Addr: ip("fe80::a:1").As16()}
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30}); err != nil {
				return err
			}
			if !connected {
				return unix.Sendto(fd, raw, 0, to)
			}
			if err := unix.Connect(fd, to); err != nil {
				return err
			}
			_, err = unix.Write(fd, raw)
			return err
		}))
		defer unix.Close(fd)
		b := make([]byte, 1500)
		n, from, err := unix.Recvfrom(fd, b, 0)
		for errors.Is(err, unix.EINTR) { // a socket with a time-out does not go on by itself
			n, from, err = unix.Recvfrom(fd, b, 0)
		}
		must(t, err)
		if got := records(unpacked(t, b[:n])); !strings.HasPrefix(got, `NOERROR TXT "neighbour"`) {
			t.Errorf("connected %v: %s from %v", connected, got, from)
		}
	}
}

// TestNobodyElseIsAnswered: the socket is bound to no address, and yet the pod's
// own processes alone are heard.
func TestNobodyElseIsAnswered(t *testing.T) { redirectors(t, testNobodyElseIsAnswered) }

func testNobodyElseIsAnswered(t *testing.T, l *lab) {
	l.proxy(shop())
	to := []string{"10.8.0.2", "127.0.0.1", "127.64.1.1"}
	if netlab.IPv6() {
		to = append(to, "fd00:8::2", "fd16:9254:7127:a15a::1")
		must(t, l.servers.Route(netlab.Route{Dst: netip.MustParsePrefix("fd16:9254:7127:a15a::/96"), Via: ip("fd00:8::2")}))
	}
	// Were the network's 127.0.0.0/8 let in, it were still not to be heard.
	must(t, l.pod.Sysctl("net/ipv4/conf/all/route_localnet", "1"), l.pod.Sysctl("net/ipv4/conf/eth0/route_localnet", "1"),
		l.servers.Sysctl("net/ipv4/conf/all/route_localnet", "1"), l.servers.Sysctl("net/ipv4/conf/pod/route_localnet", "1"),
		l.servers.Route(netlab.Route{Dst: netip.MustParsePrefix("127.64.0.0/10"), Via: ip("10.8.0.2")}))
	raw := packed(t, question("web.shop.svc.cluster.local.", mdns.TypeA, 7))
	asked := func(ns *netns.NS, to string) net.Conn {
		c, err := ns.Dial(t.Context(), &net.Dialer{}, "udp", netip.AddrPortFrom(ip(to), 15053).String())
		must(t, err)
		t.Cleanup(func() { c.Close() })
		_, err = c.Write(raw)
		must(t, err)
		return c
	}
	var outside []net.Conn
	for _, a := range to {
		outside = append(outside, asked(l.servers.NS, a))
	}
	// The proxy reads what has come to a socket in its order: with an answer to
	// the last, those to the others would be here.
	for _, a := range to {
		if own := ip(a); own == ip("10.8.0.2") || own == ip("fd00:8::2") || own.Is6() && l.apps == nil {
			continue // an address of the pod's: see below; and rules need no aliases
		}
		c, err := l.dial(net.Dialer{}, "udp", netip.AddrPortFrom(ip(a), 15053).String())
		must(t, err)
		defer c.Close()
		_, err = c.Write(raw)
		must(t, err, c.SetDeadline(time.Now().Add(60*time.Second)))
		b := make([]byte, 1500)
		if n, err := c.Read(b); err != nil || records(unpacked(t, b[:n])) != "NOERROR A 10.96.0.1" {
			t.Errorf("the pod's own query to %s: %v", a, err)
		}
	}
	for i, c := range outside {
		must(t, c.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
		b := make([]byte, 1500)
		if n, err := c.Read(b); err == nil {
			t.Errorf("a query from the network to %s was answered: %s", to[i], records(unpacked(t, b[:n])))
		}
	}
}

// TestSourcePortOfAnEarlierSocket: the kernel may give the proxy the port of a
// socket that an app has closed, whose connection tracking entry lives on and
// would redirect the proxy's query to the proxy.
func TestSourcePortOfAnEarlierSocket(t *testing.T) {
	l := newLab(t)
	serve(t, l.servers.NS, "10.9.0.1:53", func(w mdns.ResponseWriter, q *mdns.Msg) {
		m := new(mdns.Msg)
		m.SetReply(q)
		m.Answer = append(m.Answer, &mdns.TXT{Hdr: mdns.RR_Header{Name: q.Question[0].Name, Rrtype: mdns.TypeTXT, Class: 1},
			Txt: []string{w.RemoteAddr().String()}})
		_ = w.WriteMsg(m)
	})
	l.proxy(shop())
	exchange := func(d *net.Dialer, name string, qtype uint16) (string, net.Addr) {
		t.Helper()
		c, err := l.pod.NS.Dial(t.Context(), d, "udp", "10.9.0.1:53")
		must(t, err)
		conn := &mdns.Conn{Conn: c}
		defer conn.Close()
		q := new(mdns.Msg)
		q.SetQuestion(name, qtype)
		must(t, conn.SetDeadline(time.Now().Add(60*time.Second)), conn.WriteMsg(q))
		m, err := conn.ReadMsg()
		must(t, err)
		return records(m), c.LocalAddr()
	}
	_, local := exchange(&net.Dialer{}, "seen-from.test.", mdns.TypeTXT)
	proxy := &net.Dialer{LocalAddr: local, Control: sockopt.ControlFor(sockopt.Options{Mark: redirect.MarkProxy})}
	if got, _ := exchange(proxy, "seen-from.test.", mdns.TypeTXT); got != fmt.Sprintf("NOERROR TXT %q", local) {
		t.Errorf("the proxy's query from %s was seen as %s", local, got)
	}
	// And the next app with that port is captured again.
	if got, _ := exchange(&net.Dialer{LocalAddr: local}, "web.shop.svc.cluster.local.", mdns.TypeA); got != "NOERROR A 10.96.0.1" {
		t.Errorf("the next app's query: %s", got)
	}
}

// TestDig asks with the tool that operators use.
func TestDig(t *testing.T) { redirectors(t, testDig) }

func testDig(t *testing.T, l *lab) {
	dig, err := exec.LookPath("dig")
	if err != nil {
		t.Skip("needs dig (bind9-dnsutils)")
	}
	serve(t, l.servers.NS, "10.9.0.1:53", named("first"))
	l.proxy(shop())
	for _, tc := range []struct {
		args string
		want string
	}{
		{"web.shop.svc.cluster.local A", "10.96.0.1"},
		{"web.shop.svc.cluster.local AAAA", "fd00:96::1"},
		{"+tcp web.shop.svc.cluster.local A", "10.96.0.1"},
		{"+search +domain=shop.svc.cluster.local +ndots=5 web A", "10.96.0.1"},
		{"_pg._tcp.db.shop.svc.cluster.local SRV", "0 100 13432 10-1-0-2.db.shop.svc.cluster.local.\n0 100 13432 db-0.db.shop.svc.cluster.local."},
		{"api.example.com.shop.svc.cluster.local A", "240.240.0.1\napi.example.com."},
		{"who.test TXT", `"first" "udp" "10.8.0.2"`},
		{"+tcp who.test TXT", `"first" "tcp" "10.8.0.2"`},
		{"+nocookie +bufsize=4096 +dnssec who.test TXT", `"first" "udp" "10.8.0.2"`},
		{"+nocookie +noedns big.test TXT", bigAnswer}, // truncated, and asked again over TCP
		{"+keepopen +tcp who.test TXT web.shop.svc.cluster.local A who.test TXT", "\"first\" \"tcp\" \"10.8.0.2\"\n\"first\" \"tcp\" \"10.8.0.2\"\n10.96.0.1"},
	} {
		args := append([]string{"@10.9.0.1", "+short", "+tries=1", "+time=30"}, strings.Fields(tc.args)...)
		cmd := exec.CommandContext(t.Context(), dig, args...)
		if l.apps != nil {
			join := `echo $$ > "$0" && exec "$@"`
			cmd = exec.CommandContext(t.Context(), "sh", append([]string{"-c", join, filepath.Join(l.apps.Path, "cgroup.procs"), dig}, args...)...)
		}
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		must(t, l.pod.NS.Do(cmd.Start))
		err := cmd.Wait()
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		slices.Sort(lines)
		if got := strings.Join(lines, "\n"); got != tc.want || err != nil {
			t.Errorf("dig %s: %q, %v, want %q", tc.args, got, err, tc.want)
		}
	}
}
