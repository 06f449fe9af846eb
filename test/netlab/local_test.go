package netlab_test

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// TestAddressIsTheHostsOwnAtOnce asks for the route of a packet to an address that a
// host was just given: until there is a local one, it leaves on the wire.
func TestAddressIsTheHostsOwnAtOnce(t *testing.T) {
	netlab.Require(t)
	if !netlab.IPv6() {
		t.Skip("kernel without IPv6")
	}
	own := netip.MustParsePrefix("fd00:1::2/64")
	for range 40 {
		a, b := netlab.MustHost(t, "a"), netlab.MustHost(t, "b")
		must(t, netlab.Cable(a, "eth0", b, "eth0"), b.Up("eth0"), a.Up("eth0"), a.Addr("eth0", own))
		must(t, a.NS.Do(func() error {
			routes, err := netlink.RouteGet(own.Addr().AsSlice())
			if err == nil && (len(routes) != 1 || routes[0].Type != unix.RTN_LOCAL) {
				t.Fatalf("the route to the host's own address is %v", routes)
			}
			return err
		}))
	}
}
