// Package sockets connects real TCP sockets over loopback, for tests of what only the kernel's do: splice, epoll, options,
// resets. What needs none of that takes memnet, which also works inside testing/synctest bubbles.
//
// Its functions may be called from any goroutine.
package sockets

import (
	"context"
	"net"
	"testing"
)

// Pair returns both ends of a connection, closed when the test ends if they are not before.
func Pair(tb testing.TB) (client, server *net.TCPConn) {
	tb.Helper()
	c, s, err := Open(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	client, server = c.(*net.TCPConn), s.(*net.TCPConn)
	tb.Cleanup(func() { _, _ = client.Close(), server.Close() })
	return client, server
}

// Open returns both ends of a connection, which are the caller's: *net.TCPConn.
func Open(ctx context.Context) (client, server net.Conn, err error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	client, err = (&net.Dialer{}).DialContext(ctx, "tcp4", ln.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	server, err = ln.Accept()
	if err != nil {
		_ = client.Close()
		return nil, nil, err
	}
	return client, server, nil
}
