package redirect_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

func marking(mark int) func(int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark) }
}

// TestMarksProveNothing: rules that know the proxy's cgroup capture whoever only
// looks like it.
func TestMarksProveNothing(t *testing.T) {
	s := newRulesStage(t)
	s.enrol(t)
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "server")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	pods, clients := addresses()
	for i, client := range clients {
		to, pod := netip.AddrPortFrom(client, 8080), pods[i]
		for _, mark := range []int{0, redirect.MarkProxy, redirect.MarkProxy | 0x1000} {
			c, err := connect(s.app, s.pod.NS, to, marking(mark))
			if err != nil || !strings.HasPrefix(c.line, "15001 "+to.String()) {
				t.Errorf("mark %#x, to %v: answered %q, %v, want the proxy", mark, to, c.line, err)
			}
		}
		// That mark leads nowhere but into the pod: its connection fails.
		if c, err := connect(s.app, s.pod.NS, to, func(fd int) error {
			tv := unix.Timeval{Usec: 300_000}
			_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
			return marking(redirect.MarkReturn)(fd)
		}); err == nil && strings.HasPrefix(c.line, "server ") {
			t.Errorf("mark %#x, to %v: answered in clear text: %q", redirect.MarkReturn, to, c.line)
		}
		// The proxy needs no mark to get out.
		if c, err := connect(s.proxy, s.pod.NS, to, nil); err != nil || !strings.HasPrefix(c.line, "server ") {
			t.Errorf("the proxy's dial to %v was answered %q, %v", to, c.line, err)
		}
		// It speaks to the app in the client's name.
		own := netip.AddrPortFrom(pod, 8080)
		c, err := connect(s.proxy, s.pod.NS, own, func(fd int) error {
			level, option := unix.SOL_IP, unix.IP_TRANSPARENT
			if client.Is6() {
				level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
			}
			if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
				return err
			}
			return unix.Bind(fd, sockaddr(netip.AddrPortFrom(client, 0)))
		})
		if err != nil || !strings.HasPrefix(c.line, "app ") || !strings.HasSuffix(c.line, " "+client.String()) {
			t.Errorf("the proxy's dial to the app as %v was answered %q, %v", client, c.line, err)
		}
		if c, err := connect(s.app, s.client.NS, own, marking(redirect.MarkProxy)); err != nil || !strings.HasPrefix(c.line, "15006 "+own.String()) {
			t.Errorf("from outside to %v: answered %q, %v, want the proxy", own, c.line, err)
		}
		if c, err := connect(s.app, s.pod.NS, own, marking(redirect.MarkProxy)); err != nil || !strings.HasPrefix(c.line, "app ") {
			t.Errorf("the app to itself: answered %q, %v", c.line, err)
		}
	}
	if limits := s.rules.Limits(); slices.Contains(limits, redirect.LimitMark) {
		t.Errorf("limits are %q", limits)
	}
}

// TestMarksWhereNothingElseIsKnown: without a cgroup a mark is all there is.
func TestMarksWhereNothingElseIsKnown(t *testing.T) {
	s := newMarkStage(t)
	s.enrol(t)
	answer(t, listen(t, nil, s.client.NS, "[::]:8080", nil), "server")
	_, clients := addresses()
	for _, client := range clients {
		c, err := connect(nil, s.pod.NS, netip.AddrPortFrom(client, 8080), marking(redirect.MarkProxy))
		if err != nil || !strings.HasPrefix(c.line, "server ") {
			t.Errorf("to %v: answered %q, %v, want the server", client, c.line, err)
		}
	}
	if !slices.Contains(s.rules.Limits(), redirect.LimitMark) {
		t.Errorf("limits are %q", s.rules.Limits())
	}
}

// An agent that starts anew has met no proxy, and an upgrade has two.
func TestRulesKeepTheProxiesTheyKnow(t *testing.T) {
	s := newRulesStage(t)
	s.enrol(t)
	s.listenProxy(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "server")
	to := netip.AddrPortFrom(clientV4, 8080)
	want := func(when, who string, from func() (call, error)) {
		t.Helper()
		if c, err := from(); err != nil || !strings.HasPrefix(c.line, who+" ") {
			t.Errorf("%s: answered %q, %v, want %s", when, c.line, err, who)
		}
	}
	app := func() (call, error) { return connect(s.app, s.pod.NS, to, marking(redirect.MarkProxy)) }
	proxy := func() (call, error) { return connect(s.proxy, s.pod.NS, to, nil) }

	again, err := redirect.New(redirect.Config{})
	check(t, err, again.Check(s.pod.NS, everything), again.Apply(s.pod.NS, everything))
	want("a new agent", "15001", app)
	want("a new agent", "server", proxy)

	second := filepath.Join(filepath.Dir(s.proxy.Path), "second")
	check(t, os.Mkdir(second, 0o755))
	t.Cleanup(func() { _ = os.Remove(second) })
	for range 2 {
		changed, err := again.Proxy(second)
		check(t, err)
		if changed {
			check(t, again.Apply(s.pod.NS, everything))
		}
	}
	want("with a second proxy", "15001", app)
	want("with a second proxy", "server", proxy)
	check(t, again.Release(s.pod.NS))
	want("released", "server", app)
	check(t, again.Apply(s.pod.NS, everything))
	want("captured again", "15001", app)
	want("captured again", "server", proxy)
}

// Queries are the proxy's by cgroup too.
func TestMarksProveNothingToDNS(t *testing.T) {
	s := newRulesStage(t)
	s.enrol(t)
	for _, to := range []struct {
		name string
		from func(f func() error) error
		want netip.AddrPort
	}{
		{"app", func(f func() error) error { return in(s.app, s.pod.NS, f) }, netip.MustParseAddrPort("127.0.0.1:15053")},
		{"proxy", func(f func() error) error { return in(s.proxy, s.pod.NS, f) }, netip.AddrPortFrom(clientV4, 53)},
	} {
		t.Run(to.name, func(t *testing.T) {
			ns := s.client.NS
			if to.want.Addr().IsLoopback() {
				ns = s.pod.NS
			}
			pc := packetConn(t, s.proxy, ns, to.want)
			check(t, to.from(func() error {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if err := marking(redirect.MarkProxy)(fd); err != nil {
					return err
				}
				return unix.Sendto(fd, []byte("query"), 0, sockaddr(netip.AddrPortFrom(clientV4, 53)))
			}))
			b := make([]byte, 8)
			if n, _, err := pc.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != "query" {
				t.Errorf("at %v: %q, %v", to.want, b[:n], err)
			}
		})
	}
}
