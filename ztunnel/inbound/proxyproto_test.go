package inbound

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/xds/identity"
)

func TestProxyHeader(t *testing.T) {
	peer := identity.MustParse("spiffe://td/ns/a/sa/b")
	const sig = "0d0a0d0a000d0a515549540a"
	for _, c := range []struct {
		name, src, dst string
		peer           identity.ID
		want           string
	}{
		{"IPv4", "10.0.0.1:4660", "10.0.0.2:80", identity.ID{}, sig + "2111000c" + "0a000001" + "0a000002" + "1234" + "0050"},
		{"IPv4 with peer", "10.0.0.1:4660", "10.0.0.2:80", peer, sig + "21110024" + "0a000001" + "0a000002" + "1234" + "0050" + "d00015" + hex.EncodeToString([]byte(peer.String()))},
		{"mapped IPv4", "[::ffff:10.0.0.1]:4660", "10.0.0.2:80", identity.ID{}, sig + "2111000c" + "0a000001" + "0a000002" + "1234" + "0050"},
		{"IPv6", "[fd00::1]:4660", "[fd00::2]:80", identity.ID{}, sig + "21210024" + "fd000000000000000000000000000001" + "fd000000000000000000000000000002" + "1234" + "0050"},
		{"both families", "10.0.0.1:4660", "[fd00::2]:80", identity.ID{}, sig + "21210024" + "00000000000000000000ffff0a000001" + "fd000000000000000000000000000002" + "1234" + "0050"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := appendProxyHeader(nil, netip.MustParseAddrPort(c.src), netip.MustParseAddrPort(c.dst), c.peer)
			if hex.EncodeToString(got) != c.want {
				t.Errorf("got  %x\nwant %s", got, c.want)
			}
		})
	}
	long := identity.MustParse("spiffe://td/ns/a/sa/" + strings.Repeat("b", 2020))
	src := netip.MustParseAddrPort("[fd00::1]:1")
	if got := appendProxyHeader(nil, src, src, long); len(got) > maxProxyHeader {
		t.Errorf("%d bytes, more than %d", len(got), maxProxyHeader)
	}
}

// FuzzProxyHeader: what a reader of the specification reads is what was meant,
// and nothing of it depends on the bytes before it.
func FuzzProxyHeader(f *testing.F) {
	f.Add([]byte{10, 0, 0, 1}, []byte{10, 0, 0, 2}, uint16(1), uint16(2), "a", "b")
	f.Add(make([]byte, 16), []byte{10, 0, 0, 2}, uint16(0), uint16(65535), "", "")
	f.Fuzz(func(t *testing.T, s, d []byte, sp, dp uint16, ns, sa string) {
		sAddr, ok1 := netip.AddrFromSlice(s)
		dAddr, ok2 := netip.AddrFromSlice(d)
		if !ok1 || !ok2 {
			return
		}
		peer, err := identity.Parse("spiffe://td/ns/" + ns + "/sa/" + sa)
		if err != nil {
			peer = identity.ID{}
		}
		b := appendProxyHeader([]byte("x"), netip.AddrPortFrom(sAddr, sp), netip.AddrPortFrom(dAddr, dp), peer)[1:]
		if string(b[:12]) != proxySignature || b[12] != 0x21 || int(binary.BigEndian.Uint16(b[14:])) != len(b)-16 {
			t.Fatalf("fixed part: %x", b)
		}
		size := 4
		if b[13] == 0x21 {
			size = 16
		} else if b[13] != 0x11 {
			t.Fatalf("family %x", b[13])
		}
		rest := b[16:]
		gotS, _ := netip.AddrFromSlice(rest[:size])
		gotD, _ := netip.AddrFromSlice(rest[size : 2*size])
		if gotS.Unmap() != sAddr.Unmap() || gotD.Unmap() != dAddr.Unmap() ||
			binary.BigEndian.Uint16(rest[2*size:]) != sp || binary.BigEndian.Uint16(rest[2*size+2:]) != dp {
			t.Fatalf("addresses: %x", b)
		}
		tlv := rest[2*size+4:]
		if peer.IsZero() != (len(tlv) == 0) {
			t.Fatalf("TLVs: %x", tlv)
		}
		if len(tlv) > 0 && (tlv[0] != tlvPeer || int(binary.BigEndian.Uint16(tlv[1:])) != len(tlv)-3 || string(tlv[3:]) != peer.String()) {
			t.Fatalf("TLVs: %x", tlv)
		}
	})
}

func TestApplicationTunnelIsOnLoopback(t *testing.T) {
	for _, c := range []struct {
		name          string
		local, header bool
		dst           string
		from, to      string
	}{
		{"header, IPv4", true, true, "10.0.0.2:15088", "127.0.0.1", "127.0.0.1:15088"},
		{"header, IPv6", true, true, "[fd00::2]:15088", "::1", "[::1]:15088"},
		{"header, to the pod's address", false, true, "10.0.0.2:15088", "10.0.0.1", "10.0.0.2:15088"},
		{"no header", true, false, "10.0.0.2:15088", "10.0.0.1", "10.0.0.2:15088"},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := memnet.Pipe()
			defer far.Close()
			var from netip.Addr
			var to netip.AddrPort
			p := New(Config{LocalTunnel: c.local, Dial: func(_ context.Context, src netip.Addr, dst netip.AddrPort) (net.Conn, error) {
				from, to = src, dst
				return near, nil
			}})
			d := Destination{Addr: netip.MustParseAddrPort(c.dst)}
			if c.header {
				d.Header = netip.MustParseAddrPort("10.96.0.1:80")
			}
			app, err := p.dialApp(t.Context(), netip.MustParseAddrPort("10.0.0.1:5"), identity.MustParse("spiffe://td/ns/a/sa/b"), d)
			if err != nil {
				t.Fatal(err)
			}
			if from.String() != c.from || to.String() != c.to {
				t.Errorf("dialled %s from %s, want %s from %s", to, from, c.to, c.from)
			}
			_ = app.CloseWrite()
			b, err := io.ReadAll(far)
			if err != nil || (len(b) > 0) != c.header {
				t.Errorf("application read %x, %v", b, err)
			}
			_ = app.Close()
		})
	}
}
