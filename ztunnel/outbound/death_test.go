package outbound

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// TestAcceptedSocketsResetOnDeath: from the first moment on, and not only once
// it is joined, a socket that the kernel closes for a dead proxy says RST.
func TestAcceptedSocketsResetOnDeath(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	down, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	view := func() *store.View { return &store.View{Mesh: mesh.Empty()} }
	lingers := false
	p := New(Config{View: view, Flow: flow.New(flow.Config{View: view}), OriginalDst: func(c net.Conn) (netip.AddrPort, error) {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			return netip.AddrPort{}, err
		}
		_ = raw.Control(func(fd uintptr) {
			l, err := unix.GetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER)
			lingers = err == nil && l.Onoff == 1 && l.Linger == 0
		})
		return netip.AddrPort{}, errors.New("enough seen")
	}})
	p.Serve(context.Background(), down.(*net.TCPConn), func() {})
	if !lingers {
		t.Error("a proxy that dies here ends its client's connection with FIN")
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client reads %v, want a reset", err)
	}
}
