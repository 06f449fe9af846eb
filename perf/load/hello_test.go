package load

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// packet puts an IPv4 and a TCP header before a payload, with options in both.
func packet(payload []byte) []byte {
	p := make([]byte, 24+32)
	p[0], p[9] = 4<<4|6, unix.IPPROTO_TCP
	copy(p[12:], []byte{10, 0, 0, 9, 10, 0, 0, 8})
	binary.BigEndian.PutUint16(p[24:], 15008)
	p[24+12] = 8 << 4
	return append(p, payload...)
}

// packet6 is the same with IPv6.
func packet6(payload []byte) []byte {
	p := make([]byte, ipv6Header+32)
	p[0], p[6] = 6<<4, unix.IPPROTO_TCP
	copy(p[8:], netip.MustParseAddr("fd00::9").AsSlice())
	binary.BigEndian.PutUint16(p[ipv6Header:], 15008)
	p[ipv6Header+12] = 8 << 4
	return append(p, payload...)
}

// firstFlight is what a server of crypto/tls answers with.
func firstFlight(t testing.TB, group tls.CurveID) []byte {
	pair, err := NewPair()
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := pair.config()
	if err != nil {
		t.Fatal(err)
	}
	cfg.CurvePreferences = []tls.CurveID{group}
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	seen := make(chan []byte, 1)
	go func() { _ = tls.Server(server, cfg).Handshake() }() // ends when the pipe is closed
	go func() { _ = tls.Client(&tapped{Conn: client, seen: seen}, cfg).Handshake() }()
	return <-seen
}

// tapped hands out the first bytes read and then fails.
type tapped struct {
	net.Conn
	seen chan []byte
}

func (c *tapped) Read([]byte) (int, error) {
	b := make([]byte, 4096)
	n, err := io.ReadAtLeast(c.Conn, b, 5)
	if err == nil {
		c.seen <- b[:n]
	}
	return 0, errors.New("seen enough")
}

func TestServerHello(t *testing.T) {
	vm, err := bpf.NewVM(helloFilter)
	if err != nil {
		t.Fatal(err)
	}
	for _, group := range []tls.CurveID{tls.X25519, tls.CurveP256, tls.X25519MLKEM768} {
		flight := firstFlight(t, group)
		for from, p := range map[string][]byte{"10.0.0.9:15008": packet(flight), "[fd00::9]:15008": packet6(flight)} {
			a, ok := serverHello(p)
			if !ok || a.Group != group.String() || a.Server.String() != from {
				t.Errorf("%s of %s: got %v %v", group, from, a, ok)
			}
			if tls.CipherSuiteName(tls.TLS_AES_128_GCM_SHA256) != a.Suite && tls.CipherSuiteName(tls.TLS_CHACHA20_POLY1305_SHA256) != a.Suite {
				t.Errorf("%s of %s: suite %q", group, from, a.Suite)
			}
			if n, err := vm.Run(p); n == 0 || err != nil {
				t.Errorf("%s of %s: the filter drops it: %v", group, from, err)
			}
		}
	}
	for name, payload := range map[string][]byte{"nothing": nil, "data": {23, 3, 3, 0, 1, 2, 2}, "a client's": {22, 3, 1, 0, 9, 1, 0, 0, 5}} {
		for _, p := range [][]byte{packet(payload), packet6(payload)} {
			if n, _ := vm.Run(p); n != 0 { // out of bounds is 0 too
				t.Errorf("the filter lets %s pass", name)
			}
			if a, ok := serverHello(p); ok {
				t.Errorf("%s is read as %v", name, a)
			}
		}
	}
}

// A stream of 10 GB/s has segments that begin like a ServerHello by chance.
func TestServerHelloIsNoChance(t *testing.T) {
	flight := firstFlight(t, tls.X25519)
	for at, v := range map[int]byte{1: 0x17, 9: 0x94, 5 + 4 + 2 + 32 + 1 + 32: 0x94} { // versions of record and message, and the suite
		b := slices.Clone(flight)
		b[at] = v
		if a, ok := serverHello(packet(b)); ok {
			t.Errorf("byte %d: read as %v", at, a)
		}
	}
	if a, ok := serverHello(packet(flight)); !ok || a.Client != netip.AddrFrom4([4]byte{10, 0, 0, 8}) {
		t.Errorf("%v, %t", a, ok)
	}
}

func FuzzServerHello(f *testing.F) {
	flight := firstFlight(f, tls.X25519)
	p := packet(flight)
	f.Add(p)
	f.Add(packet6(flight))
	for _, n := range []int{0, 19, 40, 56, 61, 100, 140} {
		f.Add(p[:min(n, len(p))])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, ok := serverHello(b); ok && a.Suite == "" {
			t.Errorf("a suite without a name in %x", b)
		}
	})
}
