package netlab_test

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// must keeps a topology readable: every step that fails ends the test.
func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestHostsTalkThroughARouter(t *testing.T) {
	a, r, b := netlab.MustHost(t, "a"), netlab.MustHost(t, "router"), netlab.MustHost(t, "b")
	p := netip.MustParsePrefix
	must(t,
		netlab.Cable(a, "eth0", r, "left"), netlab.Cable(b, "eth0", r, "right"),
		a.Up("eth0"), b.Up("eth0"), r.Up("left"), r.Up("right"), r.Forward(),
		a.Addr("eth0", p("10.1.0.2/24")), r.Addr("left", p("10.1.0.1/24")),
		b.Addr("eth0", p("10.2.0.2/24")), r.Addr("right", p("10.2.0.1/24")),
		a.Route(netlab.Route{Dst: p("0.0.0.0/0"), Via: netip.MustParseAddr("10.1.0.1")}),
		b.Route(netlab.Route{Dst: p("0.0.0.0/0"), Via: netip.MustParseAddr("10.2.0.1")}),
	)
	if netlab.IPv6() {
		must(t,
			a.Addr("eth0", p("fd00:1::2/64")), r.Addr("left", p("fd00:1::1/64")),
			b.Addr("eth0", p("fd00:2::2/64")), r.Addr("right", p("fd00:2::1/64")),
			a.Route(netlab.Route{Dst: p("::/0"), Via: netip.MustParseAddr("fd00:1::1")}),
			b.Route(netlab.Route{Dst: p("::/0"), Via: netip.MustParseAddr("fd00:2::1")}),
		)
	}
	for _, addr := range []string{"10.2.0.2:80", "[fd00:2::2]:80"} {
		if addr[0] == '[' && !netlab.IPv6() {
			t.Logf("no IPv6 in this kernel: %s left out", addr)
			continue
		}
		t.Run(addr, func(t *testing.T) {
			ln, err := b.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp", addr)
			must(t, err)
			defer ln.Close()
			go answer(ln, "hello")
			c, err := a.NS.Dial(context.Background(), &net.Dialer{}, "tcp", addr)
			must(t, err)
			defer c.Close()
			got, err := io.ReadAll(c)
			must(t, err)
			if string(got) != "hello" {
				t.Errorf("read %q, want hello", got)
			}
		})
	}
}

// answer writes one greeting to each connection until the listener closes.
func answer(ln net.Listener, greeting string) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, greeting) // the reader compares what arrived
		_ = c.Close()
	}
}

func TestUnplugRemovesBothEnds(t *testing.T) {
	a, b := netlab.MustHost(t, "a"), netlab.MustHost(t, "b")
	must(t, netlab.Cable(a, "eth0", b, "eth0"), a.Unplug("eth0"), a.Unplug("eth0"))
	links, err := b.Links()
	must(t, err)
	if want := []string{"lo"}; !slices.Equal(links, want) {
		t.Errorf("links of b are %v, want %v", links, want)
	}
}

func TestBridgeJoinsHosts(t *testing.T) {
	sw, a, b := netlab.MustHost(t, "switch"), netlab.MustHost(t, "a"), netlab.MustHost(t, "b")
	p := netip.MustParsePrefix
	must(t,
		sw.Bridge("br0"),
		netlab.Cable(a, "eth0", sw, "a"), netlab.Cable(b, "eth0", sw, "b"),
		sw.Attach("a", "br0"), sw.Attach("b", "br0"), sw.Up("a"), sw.Up("b"),
		a.Addr("eth0", p("10.0.0.1/24")), b.Addr("eth0", p("10.0.0.2/24")), a.Up("eth0"), b.Up("eth0"),
	)
	ln, err := b.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp", "10.0.0.2:0")
	must(t, err)
	defer ln.Close()
	go answer(ln, "hi")
	c, err := a.NS.Dial(context.Background(), &net.Dialer{}, "tcp", ln.Addr().String())
	must(t, err)
	_ = c.Close() // the handshake is the test
}
