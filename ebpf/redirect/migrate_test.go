package redirect_test

import (
	"context"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// A proxy that is replaced closes its listener while connections wait in it:
// they are the next proxy's.
func TestQueueMovesToTheNextListener(t *testing.T) {
	tp := newTopology(t)
	d, err := redirect.New(redirect.Config{})
	check(t, err, d.Apply(tp.pod.NS, redirect.PodRules{}))
	shared := &net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		if cerr != nil {
			return cerr
		}
		return err
	}}
	shared.SetMultipathTCP(false)
	old, err := tp.pod.NS.Listen(t.Context(), shared, "tcp", "10.8.0.2:15008")
	check(t, err)
	const conns = 32
	var clients []net.Conn
	for range conns {
		c, err := tp.client.NS.Dial(t.Context(), &net.Dialer{}, "tcp", "10.8.0.2:15008")
		check(t, err)
		defer c.Close()
		clients = append(clients, c)
	}
	next, err := tp.pod.NS.Listen(t.Context(), shared, "tcp", "10.8.0.2:15008")
	check(t, err)
	defer next.Close()
	check(t, old.Close())
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = next.Close() })
	defer stop()
	for range conns {
		c, err := next.Accept()
		if err != nil {
			t.Fatalf("accept: %v (connections were not handed over)", err)
		}
		_, err = io.WriteString(c, "hello")
		check(t, err, c.Close())
	}
	for i, c := range clients {
		if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
			t.Errorf("connection %d of the old queue: %q, %v", i, b, err)
		}
	}
}
