package wire

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/bpf"

	"github.com/ambit-mesh/ambit/test/netlab"
)

var (
	syn4 = []byte{
		0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
		0x9c, 0x40, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0, 0, 0, 0, 0, 0,
	}
	tcp6 = syn4[20:]
)

func ip6(next byte, payload ...byte) []byte {
	p := append([]byte{0x60, 0, 0, 0, 0, 40, next, 64}, netip.MustParseAddr("fd00::1").AsSlice()...)
	return append(append(p, netip.MustParseAddr("fd00::2").AsSlice()...), payload...)
}

func with(p []byte, at int, value byte) []byte {
	p = append([]byte(nil), p...)
	p[at] = value
	return p
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name   string
		packet []byte
		want   string
	}{
		{"IPv4", syn4, "10.0.0.2:8080"},
		{"SYN with ECN", with(syn4, 33, 0xc2), "10.0.0.2:8080"},
		{"SYN and ACK", with(syn4, 33, 0x12), ""},
		{"ACK", with(syn4, 33, 0x10), ""},
		{"UDP", with(syn4, 9, 17), ""},
		{"later fragment", with(syn4, 7, 1), ""},
		{"IPv6", ip6(6, tcp6...), "[fd00::2]:8080"},
		{"IPv6 with options", ip6(60, append([]byte{6, 0, 1, 4, 0, 0, 0, 0}, tcp6...)...), "[fd00::2]:8080"},
		{"IPv6 first fragment", ip6(44, append([]byte{6, 0, 0, 1, 0, 0, 0, 0}, tcp6...)...), "[fd00::2]:8080"},
		{"IPv6 UDP", ip6(17, tcp6...), ""},
		{"ARP", append([]byte{0, 1, 8, 0}, syn4[4:]...), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, dst, ok := parse(tt.packet)
			if ok != (tt.want != "") || ok && dst.String() != tt.want {
				t.Errorf("%v, %t; want %q", dst, ok, tt.want)
			}
			// The kernel's filter must not hide what parse would see.
			vm, err := bpf.NewVM(filter[2:])
			if err != nil {
				t.Fatal(err)
			}
			if n, err := vm.Run(tt.packet); ok && n == 0 || err != nil {
				t.Errorf("the filter keeps %d bytes, %v", n, err)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add(syn4)
	f.Add(ip6(60, append([]byte{6, 0, 1, 4, 0, 0, 0, 0}, tcp6...)...))
	f.Add(ip6(44, append([]byte{6, 0, 0, 1, 0, 0, 0, 0}, tcp6...)...))
	vm, err := bpf.NewVM(filter[2:])
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		src, dst, ok := parse(p)
		if ok && (!src.IsValid() || !dst.IsValid()) {
			t.Errorf("addresses %v, %v", src, dst)
		}
		if n, err := vm.Run(p); ok && (n == 0 || err != nil) {
			t.Errorf("the filter hides %x: %d, %v", p, n, err)
		}
	})
}

func TestWatchSeesBothEndsAndNoLoopback(t *testing.T) {
	a, b := netlab.MustHost(t, "a"), netlab.MustHost(t, "b")
	for _, err := range []error{
		netlab.Cable(a, "eth0", b, "eth1"), a.Up("eth0"), b.Up("eth1"),
		a.Addr("eth0", netip.MustParsePrefix("10.0.0.1/24")), b.Addr("eth1", netip.MustParsePrefix("10.0.0.2/24")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	first := make(chan Start, 10)
	log := NewLog(func(s Start) { first <- s })
	var watchers []*Watcher
	for _, h := range []*netlab.Host{a, b} {
		w, err := log.Watch(h)
		if err != nil {
			t.Fatal(err)
		}
		watchers = append(watchers, w)
	}
	ln, err := b.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp", "10.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, from := range []*netlab.Host{b, a, a} { // b's own goes over loopback
		c, err := from.NS.Dial(context.Background(), &net.Dialer{Timeout: 10 * time.Second}, "tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close() // the handshake is the test
	}
	<-first
	<-first
	for _, w := range watchers {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	got, dropped := log.Counts()
	port := uint16(ln.Addr().(*net.TCPAddr).Port)
	src, dst := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	want := []Start{{"a", "eth0", src, dst, port}, {"b", "eth1", src, dst, port}}
	if dropped != 0 || len(got) != 2 || got[0].Start != want[0] || got[1].Start != want[1] || got[0].Count != 2 || got[1].Count != 2 {
		t.Errorf("seen %v, %d dropped; want %v, twice each", got, dropped, want)
	}
}
