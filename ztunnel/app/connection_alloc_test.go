//go:build !race

package app

import (
	"io"
	"net"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
)

// TestConnectionAlloc is the budget of a connection from its accept to its end, through both proxies and a tunnel that is
// there, the allocations of the client and of the application among it: about twenty. Times a few thousand connections per
// second, they are most of what the garbage collector is for.
func TestConnectionAlloc(t *testing.T) {
	addr := benchSameNode(t, ambit.WorkloadExtension_SAME_NODE_HBONE, func(c net.Conn) { _, _ = io.Copy(c, c) })
	buf := make([]byte, 1)
	connection := func() {
		c := dialFrom(t, addr)
		defer c.Close()
		if _, err := c.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			t.Fatal(err)
		}
		_ = c.CloseWrite()
		if _, err := c.Read(buf); err != io.EOF {
			t.Fatalf("read behind the answer: %v", err)
		}
	}
	for range 50 { // the tunnel, pools and tables
		connection()
	}
	const budget = 160 // 150 measured
	if n := testing.AllocsPerRun(300, connection); n > budget {
		t.Errorf("%v allocations, at most %d", n, budget)
	} else {
		t.Logf("%v allocations", n)
	}
}
