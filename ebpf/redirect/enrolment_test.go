package redirect_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// wantCaptured says that both directions are the proxy's, in both families.
func (s *stage) wantCaptured(t *testing.T, when string) {
	t.Helper()
	s.want(t, when, "15001", "15006")
}

// wantPlain says that neither is.
func (s *stage) wantPlain(t *testing.T, when string) {
	t.Helper()
	s.want(t, when, "client", "app")
}

func (s *stage) want(t *testing.T, when, outbound, inbound string) {
	t.Helper()
	for _, a := range families() {
		for _, f := range []flow{
			{to: at(a.client, 8080), line: fmt.Sprintf("%s %s %s", outbound, at(a.client, 8080), a.pod)},
			{ns: s.client.NS, to: at(a.pod, 8080), line: fmt.Sprintf("%s %s %s", inbound, at(a.pod, 8080), a.client)},
		} {
			if err := s.flow(f); err != nil {
				t.Errorf("%s: %v", when, err)
			}
		}
	}
}

// listenAll starts apps and the proxy.
func (s *stage) listenAll(t testing.TB) (stopProxy func()) {
	t.Helper()
	answer(t, listen(t, s.app, s.client.NS, "[::]:8080", nil), "client")
	answer(t, listen(t, s.app, s.pod.NS, "[::]:8080", nil), "app")
	return s.listenProxy(t)
}

func TestEnrolAndBack(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.listenAll(t)
		present := func(want bool) {
			t.Helper()
			if have, err := s.redirector.Present(s.pod.NS); err != nil || have != want {
				t.Errorf("present is %v, %v, want %v", have, err, want)
			}
		}
		drifted := func(when string, rules redirect.PodRules) {
			t.Helper()
			if err := s.redirector.Check(s.pod.NS, rules); !errors.Is(err, redirect.ErrDrift) {
				t.Errorf("%s Check says %v, want ErrDrift", when, err)
			}
		}
		present(false)
		drifted("before enrolment", everything)
		s.wantPlain(t, "before enrolment")
		for _, step := range []struct {
			name string
			end  func(*netns.NS) error
		}{{"release", s.redirector.Release}, {"remove", s.redirector.Remove}} {
			s.enrol(t)
			present(true)
			s.wantCaptured(t, "enrolled")
			s.enrol(t)
			drifted("with other rules", redirect.PodRules{BypassInbound: true})
			s.wantCaptured(t, "enrolled twice")
			for _, again := range []string{"", " again"} {
				check(t, step.end(s.pod.NS))
				s.wantPlain(t, "after "+step.name+again)
				drifted("after "+step.name+again, everything)
			}
		}
		present(false)
	})
}

func TestBypassInbound(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.listenAll(t)
		rules := redirect.PodRules{BypassInbound: true, IPv6: everything.IPv6}
		check(t, s.redirector.Apply(s.pod.NS, rules), s.redirector.Check(s.pod.NS, rules))
		s.want(t, "inbound left alone", "15001", "app")
	})
}

// TestFailsClosed has no proxy, then other listeners on its ports at addresses that
// the redirectors themselves do not use: nobody connects.
func TestFailsClosed(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		stop := s.listenAll(t)
		s.enrol(t)
		s.wantCaptured(t, "with the proxy")
		stop()
		for _, a := range families() {
			for _, tc := range []struct {
				name string
				f    flow
			}{
				{"outbound", flow{ns: s.pod.NS, to: at(a.client, 8080)}},
				{"names", flow{ns: s.pod.NS, to: at(a.client, 53)}},
				{"inbound", flow{ns: s.client.NS, to: at(a.pod, 8080)}},
				{"HBONE", flow{ns: s.client.NS, to: at(a.pod, redirect.PortHBONE)}},
			} {
				if c, err := connect(s.app, tc.f.ns, tc.f.to, nil); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%s to %v was answered %q, %v, want ECONNREFUSED", tc.name, tc.f.to, c.line, err)
				}
			}
		}
		s.listenProxy(t)
		s.wantCaptured(t, "with the proxy back")
	})
}

func goesOn(t *testing.T, what string, conns [2]net.Conn) {
	t.Helper()
	for i, from := range conns {
		to := conns[1-i]
		check(t, to.SetReadDeadline(deadline()))
		if err := says(from, to, "still there"); err != nil {
			t.Errorf("%s, %v to %v: %v", what, from.LocalAddr(), to.LocalAddr(), err)
		}
	}
}

// TestConnectionsOutliveChanges keeps connections from before an enrolment, and
// captured ones from before its end.
func TestConnectionsOutliveChanges(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		goOn := func(when string, conns map[string][2]net.Conn) {
			t.Helper()
			for what, c := range conns {
				goesOn(t, what+", "+when, c)
			}
		}
		older, captured := map[string][2]net.Conn{}, map[string][2]net.Conn{}
		for _, a := range families() {
			older["older outbound "+a.name] = s.couple(t, false, 8080, a.pod, a.client)
			older["older DNS "+a.name] = s.couple(t, false, 53, a.pod, a.client)
			older["older inbound "+a.name] = s.couple(t, true, 8080, a.pod, a.client)
		}
		s.enrol(t)
		goOn("enrolled", older)
		app := listen(t, s.app, s.pod.NS, "[::]:8080", nil)
		defer app.Close()
		for _, a := range families() {
			captured["outbound "+a.name] = s.captured(t, s.pod.NS, at(a.client, 8080), redirect.PortOutbound)
			captured["inbound "+a.name] = s.captured(t, s.client.NS, at(a.pod, 8080), redirect.PortInbound)
			captured["to the app in the client's name "+a.name] = s.spoofed(t, a, app)
		}
		goOn("enrolled", captured)
		check(t, s.redirector.Release(s.pod.NS))
		goOn("released", older)
		goOn("released", captured)
		s.enrol(t)
		goOn("enrolled again", older)
		goOn("enrolled again", captured)
	})
}

// captured is a connection of an app and what the proxy accepted.
func (s *stage) captured(t *testing.T, from *netns.NS, to netip.AddrPort, port uint16) [2]net.Conn {
	t.Helper()
	ln := listen(t, s.proxy, s.pod.NS, fmt.Sprintf("[::]:%d", port), proxyOptions)
	defer ln.Close()
	c := s.dial(t, from, to)
	accepted, err := acceptSoon(ln)
	check(t, err)
	t.Cleanup(func() { accepted.Close() })
	return [2]net.Conn{c, accepted}
}

// spoofed is a dial of the proxy to the app, in the client's name.
func (s *stage) spoofed(t *testing.T, a family, app net.Listener) [2]net.Conn {
	t.Helper()
	c, err := (&carrier{s: s, ns: s.pod.NS}).dial(at(a.client, 0), at(a.pod, 8080))
	check(t, err)
	accepted, err := acceptSoon(app)
	check(t, err)
	t.Cleanup(func() { c.Close(); accepted.Close() })
	return [2]net.Conn{c, accepted}
}

// TestQueueMovesToTheNextListener has a proxy that is replaced and closes its
// listener while connections wait in it: they are the next proxy's.
func TestQueueMovesToTheNextListener(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.enrol(t)
		old := listen(t, s.proxy, s.pod.NS, "10.8.0.2:15008", proxyOptions)
		const conns = 32
		var clients []net.Conn
		for range conns {
			c, err := dialAs(t.Context(), s.app, s.client.NS, at(podV4, redirect.PortHBONE))
			check(t, err)
			defer c.Close()
			clients = append(clients, c)
		}
		next := listen(t, s.proxy, s.pod.NS, "10.8.0.2:15008", proxyOptions)
		defer next.Close()
		check(t, old.Close())
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		stop := context.AfterFunc(ctx, func() { _ = next.Close() })
		defer stop()
		for range conns {
			c, err := next.Accept()
			if err != nil {
				t.Fatalf("accept: %v (connections were not handed over)", err)
			}
			_, err = io.WriteString(c, "hello")
			check(t, err, c.Close())
		}
		for i, c := range clients {
			if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
				t.Errorf("connection %d of the old queue: %q, %v", i, b, err)
			}
		}
	})
}

// TestDialsEndWithTheDial has the proxy dial the app in a client's name: what comes
// from that client's address and port afterwards is the client's own.
func TestDialsEndWithTheDial(t *testing.T) {
	forEach(t, func(t *testing.T, s *stage) {
		s.listenAll(t)
		s.enrol(t)
		for _, a := range families() {
			asClient := func(port uint16) func(int) error {
				return func(fd int) error {
					return errors.Join(asProxy(fd),
						unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), // no TIME_WAIT
						unix.Bind(fd, sockaddr(at(a.client, port))))
				}
			}
			c, err := connect(s.proxy, s.pod.NS, at(a.pod, 8080), asClient(20000))
			if want := fmt.Sprintf("app %s %s", at(a.pod, 8080), a.client); err != nil || c.line != want {
				t.Errorf("the proxy's dial as %v was answered %q, %v, want %q", a.client, c.line, err, want)
			}
			if _, err := connect(s.proxy, s.pod.NS, at(a.pod, 9999), asClient(20001)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("the proxy's dial to a port where nobody listens: %v, want ECONNREFUSED", err)
			}
			for port, to := range map[uint16]uint16{20000: 8080, 20001: 9999} {
				c, err := connect(s.app, s.client.NS, at(a.pod, to), bindTo(at(a.client, port)))
				if !strings.HasPrefix(c.line, "15006 ") {
					t.Errorf("the client's own connection from port %d was answered %q, %v", port, c.line, err)
				}
			}
		}
	})
}
