package redirect_test

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// hold opens a connection that lasts as long as the test.
func hold(t *testing.T, s *stage, cg *netlab.Cgroup, from *netlab.Host, to netip.AddrPort) (local netip.AddrPort) {
	t.Helper()
	check(t, in(cg, from.NS, func() error {
		family := unix.AF_INET
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 20}), dial(fd, to)); err != nil {
			return err
		}
		sa, err := unix.Getsockname(fd)
		local = addrPort(sa)
		return err
	}))
	return local
}

func TestHooksFlows(t *testing.T) {
	s := newStage(t)
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "plain")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	older := hold(t, s, s.app, s.pod, netip.AddrPortFrom(clientV4, 8080))
	s.listenProxy(t)
	rules := everything
	ports, err := redirect.ParsePorts("9000-9100")
	check(t, err)
	rules.ExcludeOutbound = ports
	answer(t, listen(t, s.app, s.client.NS, "[::]:9050", nil), "plain")
	check(t, s.hooks.Apply(s.pod.NS, rules))
	begun := time.Now().Add(-time.Second)
	type want struct {
		inbound  bool
		decision redirect.Decision
		via      string
	}
	wants := map[[2]netip.AddrPort]want{}
	expect := func(from, to netip.AddrPort, w want) { wants[[2]netip.AddrPort{from, to}] = w }
	expect(older, netip.AddrPortFrom(clientV4, 8080), want{decision: redirect.Outside})
	for _, to := range []string{"10.9.0.2:8080", "10.96.7.7:80", "[fd00:96::7]:80"} {
		to := netip.MustParseAddrPort(to)
		expect(hold(t, s, s.app, s.pod, to), to, want{decision: redirect.Captured, via: "alias"})
	}
	excluded := netip.AddrPortFrom(clientV4, 9050)
	expect(hold(t, s, s.app, s.pod, excluded), excluded, want{decision: redirect.Excluded})
	in := netip.AddrPortFrom(podV4, 8080)
	expect(hold(t, s, s.app, s.client, in), in, want{inbound: true, decision: redirect.Captured, via: "10.8.0.2:15006"})
	tunnel := netip.AddrPortFrom(podV6, 15008)
	expect(hold(t, s, s.app, s.client, tunnel), tunnel, want{inbound: true, decision: redirect.Tunnel})
	// None of these leaves the pod or is an app's.
	hold(t, s, s.app, s.pod, netip.MustParseAddrPort("127.0.0.1:8080"))
	hold(t, s, s.app, s.pod, netip.AddrPortFrom(podV4, 8080))
	hold(t, s, s.proxy, s.pod, netip.AddrPortFrom(clientV4, 8080))
	hold(t, s, s.proxy, s.pod, netip.AddrPortFrom(podV4, 8080))

	r, err := redirect.OpenFlows(s.cfg.Dir)
	check(t, err)
	defer r.Close()
	flows, err := r.List(s.pod.NS)
	check(t, err)
	for _, f := range flows {
		w, ok := wants[[2]netip.AddrPort{f.Source, f.Destination}]
		if !ok {
			t.Errorf("%+v is listed", f)
			continue
		}
		delete(wants, [2]netip.AddrPort{f.Source, f.Destination})
		switch {
		case f.Decision != w.decision || f.Inbound != w.inbound:
			t.Errorf("%v to %v is %s, inbound %v; want %s, %v", f.Source, f.Destination, f.Decision, f.Inbound, w.decision, w.inbound)
		case w.via == "alias" && (!f.Via.Addr().IsLoopback() && !f.Via.Addr().IsPrivate() || f.Via.Port() != redirect.PortOutbound),
			w.via == "" && f.Via.IsValid(), w.via != "" && w.via != "alias" && f.Via.String() != w.via:
			t.Errorf("%v to %v goes via %v, want %s", f.Source, f.Destination, f.Via, w.via)
		case w.via == "alias" && (f.PID != uint32(os.Getpid()) || f.Process == "" || f.Cgroup == 0 || f.Since.Before(begun) || f.Since.After(time.Now())):
			t.Errorf("%v to %v is of process %q %d in cgroup %d since %v", f.Source, f.Destination, f.Process, f.PID, f.Cgroup, f.Since)
		case f.Decision == redirect.Captured && !f.Inbound && f.Received == 0:
			t.Errorf("%v to %v received nothing", f.Source, f.Destination)
		}
	}
	for ends := range wants {
		t.Errorf("%v to %v is missing", ends[0], ends[1])
	}
}

// TestFlowsWithoutPrograms has rules in the pod, or nothing.
func TestFlowsWithoutPrograms(t *testing.T) {
	netlab.Require(t)
	tp := newTopology(t)
	r, err := redirect.OpenFlows(t.TempDir())
	check(t, err)
	defer r.Close()
	flows, err := r.List(tp.pod.NS)
	check(t, err)
	if len(flows) != 0 {
		t.Errorf("%d flows of nothing", len(flows))
	}
}
