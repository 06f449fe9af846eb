package redirect_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// client 10.9.0.2 ── node (router) ── 10.8.0.2 pod
// fd00:9::2                           fd00:8::2
type topology struct {
	client, node, pod *netlab.Host
}

var (
	clientV4, clientV6 = netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd00:9::2")
	podV4, podV6       = netip.MustParseAddr("10.8.0.2"), netip.MustParseAddr("fd00:8::2")
	nodeV4, nodeV6     = netip.MustParseAddr("10.8.0.1"), netip.MustParseAddr("fd00:8::1")
)

func newTopology(t testing.TB) *topology {
	t.Helper()
	netlab.Require(t)
	tp := &topology{netlab.MustHost(t, "client"), netlab.MustHost(t, "node"), netlab.MustHost(t, "pod")}
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	check(t,
		netlab.Cable(tp.client, "eth0", tp.node, "client"), netlab.Cable(tp.pod, "eth0", tp.node, "pod"),
		tp.client.Up("eth0"), tp.node.Up("client"), tp.pod.Up("eth0"), tp.node.Up("pod"), tp.node.Forward(),
		tp.client.Addr("eth0", p("10.9.0.2/24")), tp.node.Addr("client", p("10.9.0.1/24")),
		tp.pod.Addr("eth0", p("10.8.0.2/24")), tp.node.Addr("pod", p("10.8.0.1/24")),
		tp.client.Route(netlab.Route{Dst: p("0.0.0.0/0"), Via: a("10.9.0.1")}),
		tp.pod.Route(netlab.Route{Dst: p("0.0.0.0/0"), Via: a("10.8.0.1")}),
		// Distributions' default: a strict source check in the pod must not matter.
		tp.pod.Sysctl("net/ipv4/conf/all/rp_filter", "1"),
	)
	if netlab.IPv6() {
		check(t,
			tp.client.Addr("eth0", p("fd00:9::2/64")), tp.node.Addr("client", p("fd00:9::1/64")),
			tp.pod.Addr("eth0", p("fd00:8::2/64")), tp.node.Addr("pod", p("fd00:8::1/64")),
			tp.client.Route(netlab.Route{Dst: p("::/0"), Via: a("fd00:9::1")}),
			tp.pod.Route(netlab.Route{Dst: p("::/0"), Via: a("fd00:8::1")}),
		)
	}
	return tp
}

func check(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// proxyOptions are what the node proxy sets on its sockets in a pod.
func proxyOptions(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) {
		err = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, redirect.MarkProxy),
			ignoreFamily(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)),
			ignoreFamily(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)),
			ignoreFamily(unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)),
			ignoreFamily(unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)),
		)
	})
	return errors.Join(cerr, err)
}

func ignoreFamily(err error) error {
	if errors.Is(err, unix.ENOPROTOOPT) {
		return nil
	}
	return err
}

// serve answers each connection with one line that says who accepted it, for
// whom, and from where.
func serve(t *testing.T, ns *netns.NS, name, addr string, control func(string, string, syscall.RawConn) error) {
	t.Helper()
	ln, err := ns.Listen(t.Context(), &net.ListenConfig{Control: control}, "tcp", addr)
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
			fmt.Fprintf(c, "%s %s %s", name, originalDst(c.(*net.TCPConn)), c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
			c.Close()
		}
	}()
}

func originalDst(c *net.TCPConn) netip.AddrPort {
	local := c.LocalAddr().(*net.TCPAddr).AddrPort()
	local = netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	raw, err := c.SyscallConn()
	if err != nil {
		return local
	}
	orig := local
	_ = raw.Control(func(fd uintptr) {
		if local.Addr().Is4() {
			// struct sockaddr_in fits the type the kernel writes it into.
			if m, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST); err == nil {
				b := m.Multiaddr
				orig = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			}
			return
		}
		if m, err := unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, 80 /* IP6T_SO_ORIGINAL_DST */); err == nil {
			port := m.Addr.Port<<8 | m.Addr.Port>>8
			orig = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), port)
		}
	})
	return orig
}

// ask connects from ns and returns the line, or the error as text.
func ask(t *testing.T, ns *netns.NS, d *net.Dialer, addr string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	c, err := ns.Dial(ctx, d, "tcp", addr)
	if err != nil {
		if errors.Is(err, syscall.ECONNREFUSED) {
			return "refused"
		}
		return err.Error()
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
	b, err := io.ReadAll(c)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func families(f func(pod, client, node netip.Addr)) {
	f(podV4, clientV4, nodeV4)
	if netlab.IPv6() {
		f(podV6, clientV6, nodeV6)
	}
}

func at(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }

func TestRedirection(t *testing.T) {
	tp := newTopology(t)
	d, err := redirect.New(redirect.Config{})
	check(t, err)
	rules := redirect.PodRules{IPv6: netlab.IPv6()}
	check(t, d.Apply(tp.pod.NS, rules), d.Check(tp.pod.NS, rules))
	host, err := redirect.NewHost(redirect.Config{}, tp.node.NS)
	check(t, err, host.Set([]netip.Addr{podV4, podV6}))

	serve(t, tp.pod.NS, "outbound", ":15001", proxyOptions)
	serve(t, tp.pod.NS, "inbound", ":15006", proxyOptions)
	serve(t, tp.pod.NS, "hbone", ":15008", proxyOptions)
	serve(t, tp.pod.NS, "app", ":8080", nil)
	serve(t, tp.client.NS, "client", ":8080", nil)
	plain := &net.Dialer{}
	marked := &net.Dialer{Control: proxyOptions}

	families(func(pod, client, node netip.Addr) {
		loopback := netip.MustParseAddr("127.0.0.1")
		if pod.Is6() {
			loopback = netip.IPv6Loopback()
		}
		spoof := &net.Dialer{Control: proxyOptions, LocalAddr: &net.TCPAddr{IP: client.AsSlice()}}
		for _, tc := range []struct {
			name string
			ns   *netns.NS
			d    *net.Dialer
			addr string
			want string
		}{
			{"outbound TCP is the proxy's", tp.pod.NS, plain, at(client, 8080), fmt.Sprintf("outbound %s %s", at(client, 8080), pod)},
			{"outbound to nobody too", tp.pod.NS, plain, at(client, 9999), fmt.Sprintf("outbound %s %s", at(client, 9999), pod)},
			{"the proxy's own connections leave", tp.pod.NS, marked, at(client, 8080), fmt.Sprintf("client %s %s", at(client, 8080), pod)},
			{"inbound TCP is the proxy's", tp.client.NS, plain, at(pod, 8080), fmt.Sprintf("inbound %s %s", at(pod, 8080), client)},
			{"inbound to a port without listener too", tp.client.NS, plain, at(pod, 9999), fmt.Sprintf("inbound %s %s", at(pod, 9999), client)},
			{"inbound HBONE goes straight", tp.client.NS, plain, at(pod, 15008), fmt.Sprintf("hbone %s %s", at(pod, 15008), client)},
			{"loopback is the app's", tp.pod.NS, plain, at(loopback, 8080), fmt.Sprintf("app %s %s", at(loopback, 8080), loopback)},
			{"the app reaches itself", tp.pod.NS, plain, at(pod, 8080), fmt.Sprintf("app %s %s", at(pod, 8080), pod)},
			{"the proxy reaches the app as the client", tp.pod.NS, spoof, at(pod, 8080), fmt.Sprintf("app %s %s", at(pod, 8080), client)},
			{"the node's probes reach the app", tp.node.NS, plain, at(pod, 8080), fmt.Sprintf("app %s %s", at(pod, 8080), probe(pod))},
		} {
			if got := ask(t, tc.ns, tc.d, tc.addr); got != tc.want {
				t.Errorf("%s (%s): %q, want %q", tc.name, tc.addr, got, tc.want)
			}
		}
		udp(t, tp, pod, client)
	})

	check(t, host.Remove(), host.Remove(), d.Remove(tp.pod.NS), d.Remove(tp.pod.NS))
	families(func(pod, client, _ netip.Addr) {
		if got, want := ask(t, tp.client.NS, plain, at(pod, 8080)), fmt.Sprintf("app %s %s", at(pod, 8080), client); got != want {
			t.Errorf("after Remove, inbound: %q, want %q", got, want)
		}
		if got, want := ask(t, tp.pod.NS, plain, at(client, 8080)), fmt.Sprintf("client %s %s", at(client, 8080), pod); got != want {
			t.Errorf("after Remove, outbound: %q, want %q", got, want)
		}
	})
}

func probe(pod netip.Addr) string {
	if pod.Is6() {
		return "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"
	}
	return "169.254.7.127"
}

// udp sends a datagram both ways between pod and client.
func udp(t *testing.T, tp *topology, pod, client netip.Addr) {
	t.Helper()
	a, err := tp.pod.NS.ListenPacket(t.Context(), &net.ListenConfig{}, "udp", at(pod, 7000))
	check(t, err)
	defer a.Close()
	b, err := tp.client.NS.ListenPacket(t.Context(), &net.ListenConfig{}, "udp", at(client, 7000))
	check(t, err)
	defer b.Close()
	for _, dir := range []struct{ from, to net.PacketConn }{{a, b}, {b, a}} {
		_, err := dir.from.WriteTo([]byte("x"), dir.to.LocalAddr())
		check(t, err, dir.to.SetReadDeadline(time.Now().Add(3*time.Second)))
		_, from, err := dir.to.ReadFrom(make([]byte, 8))
		if err != nil || from.String() != dir.from.LocalAddr().String() {
			t.Errorf("UDP from %v arrived from %v: %v", dir.from.LocalAddr(), from, err)
		}
	}
}

func TestBypassInbound(t *testing.T) {
	tp := newTopology(t)
	d, err := redirect.New(redirect.Config{})
	check(t, err)
	rules := redirect.PodRules{BypassInbound: true}
	check(t, d.Apply(tp.pod.NS, rules), d.Check(tp.pod.NS, rules))
	serve(t, tp.pod.NS, "outbound", ":15001", proxyOptions)
	serve(t, tp.pod.NS, "app", ":8080", nil)
	if got, want := ask(t, tp.client.NS, &net.Dialer{}, at(podV4, 8080)), fmt.Sprintf("app %s %s", at(podV4, 8080), clientV4); got != want {
		t.Errorf("inbound: %q, want %q", got, want)
	}
	if got, want := ask(t, tp.pod.NS, &net.Dialer{}, at(clientV4, 8080)), fmt.Sprintf("outbound %s %s", at(clientV4, 8080), podV4); got != want {
		t.Errorf("outbound: %q, want %q", got, want)
	}
}

// TestReleaseKeepsWhatIsEstablished lets a proxied connection go on after capture
// has ended, while the client's address is routed elsewhere.
func TestReleaseKeepsWhatIsEstablished(t *testing.T) {
	tp := newTopology(t)
	d, err := redirect.New(redirect.Config{})
	check(t, err, d.Apply(tp.pod.NS, redirect.PodRules{}))
	families(func(pod, client, _ netip.Addr) {
		ln, err := tp.pod.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp", at(pod, 8080))
		check(t, err)
		defer ln.Close()
		c, err := tp.pod.NS.Dial(t.Context(), &net.Dialer{
			Control: proxyOptions, LocalAddr: &net.TCPAddr{IP: client.AsSlice()}, Timeout: 3 * time.Second,
		}, "tcp", at(pod, 8080))
		check(t, err)
		defer c.Close()
		app, err := ln.Accept()
		check(t, err)
		defer app.Close()
		check(t, d.Release(tp.pod.NS))
		for _, dir := range []struct{ from, to net.Conn }{{c, app}, {app, c}} {
			_, err := dir.from.Write([]byte("still there"))
			check(t, err, dir.to.SetReadDeadline(time.Now().Add(3*time.Second)))
			if _, err := io.ReadFull(dir.to, make([]byte, 11)); err != nil {
				t.Errorf("%v to %v after Release: %v", dir.from.LocalAddr(), dir.to.LocalAddr(), err)
			}
		}
		check(t, d.Apply(tp.pod.NS, redirect.PodRules{}))
	})
}

func TestFailsClosedWithoutProxy(t *testing.T) {
	tp := newTopology(t)
	d, err := redirect.New(redirect.Config{})
	check(t, err, d.Apply(tp.pod.NS, redirect.PodRules{}))
	serve(t, tp.pod.NS, "app", ":8080", nil)
	serve(t, tp.client.NS, "client", ":8080", nil)
	if got := ask(t, tp.client.NS, &net.Dialer{}, at(podV4, 8080)); got != "refused" {
		t.Errorf("inbound: %q, want a refusal", got)
	}
	if got := ask(t, tp.pod.NS, &net.Dialer{}, at(clientV4, 8080)); got != "refused" {
		t.Errorf("outbound: %q, want a refusal", got)
	}
}

func TestDriftIsFoundAndRepaired(t *testing.T) {
	tp := newTopology(t)
	d, err := redirect.New(redirect.Config{})
	check(t, err)
	ns, rules := tp.pod.NS, redirect.PodRules{}
	if err := d.Check(ns, rules); !errors.Is(err, redirect.ErrDrift) {
		t.Errorf("nothing there: %v, want drift", err)
	}
	check(t, d.Apply(ns, rules), d.Check(ns, rules), d.Apply(ns, rules), d.Check(ns, rules))
	if err := d.Check(ns, redirect.PodRules{DNS: true}); !errors.Is(err, redirect.ErrDrift) {
		t.Errorf("other rules wanted: %v, want drift", err)
	}
	check(t, d.Apply(ns, redirect.PodRules{DNS: true}), d.Check(ns, redirect.PodRules{DNS: true}))
	check(t, d.Release(ns))
	if err := d.Check(ns, rules); !errors.Is(err, redirect.ErrDrift) {
		t.Errorf("released: %v, want drift", err)
	}
	check(t, d.Apply(ns, rules), d.Check(ns, rules), d.Remove(ns))
	present, err := d.Present(ns)
	check(t, err)
	if present {
		t.Error("present after Remove")
	}
}

func TestIPv6MissingIsNamed(t *testing.T) {
	netlab.Require(t)
	if !netlab.IPv6() {
		t.Skip("kernel without IPv6")
	}
	pod := netlab.MustHost(t, "pod")
	check(t, pod.Sysctl("net/ipv6/conf/lo/disable_ipv6", "1"))
	d, err := redirect.New(redirect.Config{})
	check(t, err)
	err = d.Apply(pod.NS, redirect.PodRules{IPv6: true})
	if uerr, ok := errors.AsType[*redirect.UnsupportedError](err); !ok {
		t.Errorf("Apply with IPv6 off: %v, want an UnsupportedError", err)
	} else if uerr.Feature == "" {
		t.Error("the error names no feature")
	}
	check(t, d.Apply(pod.NS, redirect.PodRules{}), d.Check(pod.NS, redirect.PodRules{}))
}

func TestConfigIsChecked(t *testing.T) {
	_, err := redirect.New(redirect.Config{ProbeV4: podV6})
	if err == nil {
		t.Error("an IPv6 address was taken for IPv4")
	}
}

func BenchmarkApplyUnchanged(b *testing.B) {
	pod := netlab.MustHost(b, "pod")
	d, err := redirect.New(redirect.Config{})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := d.Apply(pod.NS, redirect.PodRules{}); err != nil {
			b.Fatal(err)
		}
	}
}
