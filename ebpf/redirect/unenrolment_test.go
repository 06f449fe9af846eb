package redirect_test

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// TestUnenrolment takes a pod out of the mesh while the proxy carries connections
// for it, over a change of agents: capture ends first, what is captured goes on as
// it was told, and in the end nothing is left.
func TestUnenrolment(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "server")
		s.enrol(t)
		type open struct {
			fd       int
			to       netip.AddrPort
			pod      netip.Addr
			app      net.Conn
			accepted net.Conn
		}
		var conns []open
		for _, a := range families() {
			o := open{to: at(a.client, 8080), pod: a.pod}
			ln := listen(t, s.proxy, s.pod.NS, "[::]:15001", proxyOptions)
			check(t, in(s.app, s.pod.NS, func() (err error) {
				o.fd, err = openTo(o.to, 0)
				if err != nil {
					return err
				}
				dup, err := unix.Dup(o.fd)
				if err != nil {
					return err
				}
				o.app, err = conn(dup)
				return err
			}))
			var err error
			o.accepted, err = acceptSoon(ln)
			check(t, err, ln.Close())
			defer unix.Close(o.fd)
			defer o.app.Close()
			defer o.accepted.Close()
			conns = append(conns, o)
		}
		goOn := func(when string) {
			t.Helper()
			for _, o := range conns {
				goesOn(t, when, [2]net.Conn{o.app, o.accepted})
				peer, err := unix.Getpeername(o.fd)
				check(t, err)
				local, err := unix.Getsockname(o.fd)
				check(t, err)
				if addrPort(peer) != o.to || addrPort(local).Addr() != o.pod {
					t.Errorf("%s: the app is told %v to %v, want %v to %v", when, addrPort(local), addrPort(peer), o.pod, o.to)
				}
			}
		}
		want := func(when, who string) {
			t.Helper()
			for _, o := range conns {
				c, err := connect(s.app, s.pod.NS, o.to, nil)
				if err != nil || len(c.line) < len(who) || c.line[:len(who)] != who || c.peer != o.to {
					t.Errorf("%s: answered %q, %v, want %s", when, c.line, err, who)
				}
			}
		}
		goOn("enrolled")
		check(t, s.redirector.Release(s.pod.NS))
		want("released", "server")
		goOn("released")
		// The agent is killed, and the next one begins where it can.
		s.reopen(t)
		if present, err := s.redirector.Present(s.pod.NS); err != nil || !present {
			t.Errorf("redirection of a pod that is leaving is present: %t, %v", present, err)
		}
		check(t, s.redirector.Release(s.pod.NS))
		want("with another agent", "server")
		goOn("with another agent")
		// The app has said all it had to say, and hears on.
		for _, o := range conns {
			check(t, unix.Shutdown(o.fd, unix.SHUT_WR), o.app.SetReadDeadline(deadline()), says(o.accepted, o.app, "after its end"))
			o.app.Close()
			o.accepted.Close()
		}
		for range 2 {
			check(t, s.redirector.Remove(s.pod.NS))
		}
		want("removed", "server")
		if present, err := s.redirector.Present(s.pod.NS); err != nil || present {
			t.Errorf("redirection is present: %t, %v", present, err)
		}
		check(t, s.pod.NS.Do(func() error { return leftOver(t) }))
	})
}

// reopen is the next agent's start.
func (s *stage) reopen(t *testing.T) {
	t.Helper()
	if s.kind == byHooks {
		check(t, s.hooks.Close())
		s.open(t)
		return
	}
	d, err := redirect.New(redirect.Config{})
	check(t, err)
	s.rules, s.redirector = d, d
}

// leftOver looks for routing of ours in the thread's namespace.
func leftOver(t *testing.T) error {
	t.Helper()
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, r := range rules {
		if r.Mark != 0 {
			t.Errorf("rule %v is left", r)
		}
	}
	for _, table := range []int{100, unix.RT_TABLE_LOCAL} {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if table == 100 || r.Dst != nil && r.Dst.String() == "fd16:9254:7127:a15a::/96" {
				t.Errorf("route %v is left", r)
			}
		}
	}
	return nil
}
