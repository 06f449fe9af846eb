package app

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// A connection that arrives with its own destination has no other; one that arrives
// at the proxy's port has what the kernel remembers, or none.
func TestInboundDestination(t *testing.T) {
	host := netlab.MustHost(t, "pod")
	errNone := errors.New("the kernel remembers nothing")
	for _, tt := range []struct {
		name, listen string
		remembered   netip.AddrPort
		want         string
	}{
		{"handed over as it is", "127.0.0.1:8080", netip.AddrPort{}, "127.0.0.1:8080"},
		{"IPv6, handed over as it is", "[::1]:8080", netip.AddrPort{}, "[::1]:8080"},
		{"translated", "127.0.0.1:15006", netip.MustParseAddrPort("10.0.0.1:80"), "10.0.0.1:80"},
		{"made to the proxy's port", "127.0.0.1:15006", netip.AddrPort{}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ln, err := host.NS.Listen(t.Context(), &net.ListenConfig{}, "tcp", tt.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			c, err := host.NS.Dial(t.Context(), &net.Dialer{}, "tcp", tt.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer got.Close()
			dst, err := inboundDst(func(net.Conn) (netip.AddrPort, error) {
				if !tt.remembered.IsValid() {
					return netip.AddrPort{}, errNone
				}
				return tt.remembered, nil
			})(got)
			if tt.want == "" && err != errNone || tt.want != "" && (err != nil || dst.String() != tt.want) {
				t.Errorf("%v, %v; want %q", dst, err, tt.want)
			}
		})
	}
}
