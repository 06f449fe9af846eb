package inpod

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/test/netlab"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// TestAcceptedSocketsAreSetUp: what a listener accepts has the mesh's keepalive, and
// a captured connection says RST when the kernel closes it for a dead proxy, from
// the first moment on and not only once it is joined. A tunnel ends as it likes.
func TestAcceptedSocketsAreSetUp(t *testing.T) {
	netlab.Require(t)
	type options struct{ keepalive, idle, interval, count, nodelay, lingers int }
	seen := make(chan options, 1)
	connected := make(chan struct{}) // one per connection: a RST before the client has looked fails its connect
	look := Blocking(func(_ context.Context, c sockopt.Socket) {
		raw, err := c.SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		var o options
		_ = raw.Control(func(fd uintptr) {
			get := func(level, opt int) int {
				v, err := unix.GetsockoptInt(int(fd), level, opt)
				if err != nil {
					t.Error(err)
				}
				return v
			}
			o = options{get(unix.SOL_SOCKET, unix.SO_KEEPALIVE), get(unix.SOL_TCP, unix.TCP_KEEPIDLE), get(unix.SOL_TCP, unix.TCP_KEEPINTVL),
				get(unix.SOL_TCP, unix.TCP_KEEPCNT), get(unix.SOL_TCP, unix.TCP_NODELAY), -1}
			if l, err := unix.GetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER); err == nil && l.Onoff == 1 {
				o.lingers = int(l.Linger)
			}
		})
		seen <- o
		<-connected
	})
	m := New(Config{DrainTimeout: time.Millisecond, Liveness: sockopt.Liveness{Idle: 70 * time.Second, Interval: 7 * time.Second, Count: 3},
		Serve: func(handoff.Pod) (Handlers, error) {
			return Handlers{Outbound: look, Plaintext: look, HBONE: look}, nil
		}})
	h := netlab.MustHost(t, "pod")
	ns, err := h.NS.Dup()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.AddPod(t.Context(), handoff.Pod{UID: "u", NS: ns}); err != nil {
		t.Fatal(err)
	}
	defer m.Shutdown(t.Context())
	for port, lingers := range map[string]int{"15001": 0, "15006": 0, "15008": -1} {
		c, err := dialIn(t, h.NS, port)
		if err != nil {
			close(connected)
			t.Fatal(err)
		}
		connected <- struct{}{}
		if got, want := <-seen, (options{1, 70, 7, 3, 1, lingers}); got != want {
			t.Errorf("port %s: %+v, want %+v", port, got, want)
		}
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, unix.ECONNRESET) != (lingers == 0) {
			t.Errorf("port %s: the client reads %v", port, err)
		}
		_ = c.Close()
	}
}
