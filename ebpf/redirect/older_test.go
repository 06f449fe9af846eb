package redirect_test

import (
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// pair connects from one namespace to an address of another; the connection is
// accepted at at, which is elsewhere if it is redirected.
func pair(t *testing.T, from *netns.NS, to string, in *netns.NS, at string, control func(string, string, syscall.RawConn) error) [2]net.Conn {
	t.Helper()
	ln, err := in.Listen(t.Context(), &net.ListenConfig{Control: control}, "tcp", at)
	check(t, err)
	defer ln.Close()
	c, err := from.Dial(t.Context(), &net.Dialer{Timeout: 3 * time.Second}, "tcp", to)
	check(t, err)
	s, err := ln.Accept()
	check(t, err)
	t.Cleanup(func() { c.Close(); s.Close() })
	return [2]net.Conn{c, s}
}

func goesOn(t *testing.T, what string, conns [2]net.Conn) {
	t.Helper()
	for i, from := range conns {
		to := conns[1-i]
		_, err := from.Write([]byte("still there"))
		if err == nil {
			_ = to.SetReadDeadline(time.Now().Add(3 * time.Second))
			_, err = io.ReadFull(to, make([]byte, 11))
		}
		if err != nil {
			t.Errorf("%s, %v to %v: %v", what, from.LocalAddr(), to.LocalAddr(), err)
		}
	}
}

// Conntrack has never seen a connection that is older than the first rules of a
// namespace: it takes up whatever packet comes first as the beginning of one.
func TestOlderConnectionsGoOn(t *testing.T) {
	for _, dns := range []bool{false, true} {
		tp := newTopology(t)
		d, err := redirect.New(redirect.Config{})
		check(t, err)
		older := map[string][2]net.Conn{}
		families(func(pod, client, _ netip.Addr) {
			older["inbound "+pod.String()] = pair(t, tp.client.NS, at(pod, 8080), tp.pod.NS, at(pod, 8080), nil)
			older["outbound "+client.String()] = pair(t, tp.pod.NS, at(client, 8080), tp.client.NS, at(client, 8080), nil)
			older["DNS "+client.String()] = pair(t, tp.pod.NS, at(client, 53), tp.client.NS, at(client, 53), nil)
			s := pair(t, tp.client.NS, at(pod, 8081), tp.pod.NS, at(pod, 8081), nil)
			older["server first "+pod.String()] = [2]net.Conn{s[1], s[0]}
		})
		check(t, d.Apply(tp.pod.NS, redirect.PodRules{DNS: dns}))
		for what, conns := range older {
			goesOn(t, what, conns)
		}
	}
}

// TestReleaseKeepsWhatIsCaptured is TestReleaseKeepsWhatIsEstablished for
// connections whose addresses are translated.
func TestReleaseKeepsWhatIsCaptured(t *testing.T) {
	tp := newTopology(t)
	d, err := redirect.New(redirect.Config{})
	check(t, err, d.Apply(tp.pod.NS, redirect.PodRules{}))
	captured := map[string][2]net.Conn{}
	families(func(pod, client, _ netip.Addr) {
		captured["inbound "+pod.String()] = pair(t, tp.client.NS, at(pod, 8080), tp.pod.NS, ":15006", proxyOptions)
		captured["outbound "+client.String()] = pair(t, tp.pod.NS, at(client, 8080), tp.pod.NS, ":15001", proxyOptions)
	})
	check(t, d.Release(tp.pod.NS))
	for what, conns := range captured {
		goesOn(t, what, conns)
	}
}

func TestHalfClosedAreRemembered(t *testing.T) {
	tp := newTopology(t)
	d, err := redirect.New(redirect.Config{})
	check(t, err, d.Apply(tp.pod.NS, redirect.PodRules{}))
	for _, state := range []string{"close_wait", "fin_wait"} {
		var seconds []byte
		check(t, tp.pod.NS.Do(func() (err error) {
			seconds, err = os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_" + state)
			return err
		}))
		if got := strings.TrimSpace(string(seconds)); got != "3600" {
			t.Errorf("%s: %s seconds, want an hour", state, got)
		}
	}
}
