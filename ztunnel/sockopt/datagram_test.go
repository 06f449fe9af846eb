package sockopt

import (
	"context"
	"net"
	"net/netip"
	"testing"
)

func TestAddressesForOwnPod(t *testing.T) {
	for addr, want := range map[string]struct{ own, other bool }{
		"127.0.0.1":               {true, false},
		"127.64.0.0":              {true, true},
		"127.127.255.255":         {true, true},
		"127.128.0.0":             {true, false},
		"::1":                     {true, false},
		"fd16:9254:7127:a15a::1":  {true, true},
		"fd16:9254:7127:a15b::1":  {false, false},
		"fd16:9254:7127:a15a:1::": {false, false},
		"10.8.0.2":                {false, false},
		"fd00:8::2":               {false, false},
		"0.0.0.0":                 {false, false},
		"::":                      {false, false},
	} {
		a := netip.MustParseAddr(addr)
		if own, other := ForOwnPod(a), StandsForAnother(a); own != want.own || other != want.other {
			t.Errorf("%s: for the own pod %v, stands for another %v, want %v", addr, own, other, want)
		}
	}
	if a := (netip.Addr{}); ForOwnPod(a) || StandsForAnother(a) {
		t.Error("no address is for the own pod")
	}
}

// TestDatagramsAreAnsweredFromWhereTheyWereSent by a socket bound to no address.
func TestDatagramsAreAnsweredFromWhereTheyWereSent(t *testing.T) {
	for _, tc := range []struct{ network, local, to string }{
		{"udp4", "0.0.0.0:0", "127.0.0.1"}, {"udp4", "0.0.0.0:0", "127.64.3.4"}, {"udp6", "[::]:0", "::1"},
	} {
		lc := &net.ListenConfig{Control: ControlFor(Options{PacketInfo: true, OwnPodOnly: true, Freebind: true})}
		ln, err := lc.ListenPacket(context.Background(), tc.network, tc.local)
		if err != nil {
			if tc.network == "udp6" {
				t.Log("no IPv6: ", err)
				continue
			}
			t.Fatal(err)
		}
		pc := ln.(*net.UDPConn)
		to := netip.AddrPortFrom(netip.MustParseAddr(tc.to), pc.LocalAddr().(*net.UDPAddr).AddrPort().Port())
		c, err := net.Dial("udp", to.String())
		if err == nil {
			_, err = c.Write([]byte("question"))
		}
		if err != nil {
			t.Fatal(err)
		}
		b, oob := make([]byte, 64), make([]byte, PacketInfoLen)
		n, oobn, _, from, err := pc.ReadMsgUDPAddrPort(b, oob)
		if err != nil {
			t.Fatal(err)
		}
		dst := PacketDestination(oob[:oobn])
		if dst != to.Addr() {
			t.Errorf("a datagram to %s was sent to %s", to.Addr(), dst)
		}
		if _, _, err := pc.WriteMsgUDPAddrPort(b[:n], AppendPacketSource(nil, dst), from); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(b); err != nil || string(b[:n]) != "question" {
			t.Errorf("the answer from %s: %q, %v", dst, b[:n], err) // a connected socket hears its peer only
		}
		_, _ = c.Close(), pc.Close()
	}
}

func FuzzPacketDestination(f *testing.F) {
	for _, a := range []string{"127.0.0.1", "::1"} {
		f.Add(AppendPacketSource(nil, netip.MustParseAddr(a)))
		f.Add(AppendPacketSource(AppendPacketSource(nil, netip.MustParseAddr("::2")), netip.MustParseAddr(a)))
	}
	f.Add([]byte{255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 8, 0, 0, 0})
	f.Fuzz(func(t *testing.T, oob []byte) {
		if a := PacketDestination(oob); a.Is4In6() {
			t.Errorf("%v is an IPv4 address", a)
		}
	})
}
