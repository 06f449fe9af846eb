package redirect_test

import (
	"context"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// TestHooksTellDrops has a pod leak 50 SYNs at once: one event names it, and the
// next has the sum of what came between.
func TestHooksTellDrops(t *testing.T) {
	s := newStage(t)
	s.enrol(t)
	ctx, cancel := context.WithCancel(t.Context())
	told, donec := make(chan redirect.Drop, 100), make(chan error, 1)
	go func() { donec <- s.hooks.WatchDrops(ctx, func(d redirect.Drop) { told <- d }) }()
	defer func() { cancel(); check(t, <-donec) }()
	cookie, err := s.pod.NS.Cookie()
	check(t, err)
	syn := []byte{0x80, 0x01, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0}
	leak := func() {
		check(t, in(s.app, s.pod.NS, func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return ignoreDrop(unix.Sendto(fd, syn, 0, &unix.SockaddrInet4{Addr: clientV4.As4()}))
		}))
	}
	sent, got, events := 0, uint64(0), 0
	for range 50 {
		leak()
		sent++
	}
	for got < uint64(sent) {
		select {
		case d := <-told:
			if d.Cookie != cookie || d.Reason != "leak" || d.Meaning == "" ||
				d.Local != netip.AddrPortFrom(podV4, 0x8001) || d.Remote != netip.AddrPortFrom(clientV4, 8080) {
				t.Fatalf("told %+v of the pod's leak", d)
			}
			got += d.Count
			events++
		default:
			leak() // until a second has passed
			sent++
		}
	}
	if got != uint64(sent) || events > sent/10 {
		t.Errorf("%d drops were told as %d in %d events", sent, got, events)
	}
	// What is refused before it has an address tells where it wanted to go.
	check(t, in(s.app, s.pod.NS, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_ = unix.Bind(fd, &unix.SockaddrInet4{Port: redirect.PortDNS})
		return nil
	}))
	if d := <-told; d.Reason != "proxy-port" || d.Local.Port() != redirect.PortDNS || d.Count != 1 {
		t.Errorf("told %+v of a bind to the proxy's port", d)
	}
	// A connection without a proxy is told with all of its ends.
	_, _ = connect(s.app, s.pod.NS, netip.AddrPortFrom(clientV4, 8080), nil)
	if d := <-told; d.Reason != "no-listener" || d.Local.Addr() != podV4 || d.Remote.Port() != redirect.PortOutbound {
		t.Errorf("told %+v of a connection without a proxy", d)
	}
}
