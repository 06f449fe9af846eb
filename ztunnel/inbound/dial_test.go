package inbound

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// dialFunc is told how long a dial may take.
type dialFunc func(limit time.Duration) (net.Conn, error)

func (f dialFunc) Dial(_ context.Context, _, _ netip.AddrPort, limit time.Duration, _ func(int) error) (net.Conn, error) {
	return f(limit)
}

// A port that is taken is no reason to fail while there are others, and does not
// count as one that was met by silence.
func TestAppDialerGoesOnWhilePortsAreTaken(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, tc := range []struct {
		name          string
		taken, silent int // how many dials end so, in this order
		dials         int
		limits        int // how many of them wait for a short time only
	}{
		{name: "free", dials: 1, limits: 1},
		{name: "most ports are taken", taken: 100, dials: 101, limits: 101},
		{name: "all ports are taken", taken: 1000, dials: bindTries, limits: bindTries},
		{name: "silence after taken ports", taken: 10, silent: 3, dials: 14, limits: 13},
		{name: "nothing but silence", silent: 1000, dials: silentTries + 1, limits: silentTries},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dials, limits, taken, silent := 0, 0, tc.taken, tc.silent
			a := &AppDialer{KeepSource: true, Sockets: dialFunc(func(limit time.Duration) (net.Conn, error) {
				dials++
				if limit <= silence {
					limits++
				}
				switch {
				case taken > 0:
					taken--
					return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("bind", syscall.EADDRINUSE)}
				case silent > 0 && limit <= silence:
					silent--
					return nil, os.ErrDeadlineExceeded
				case silent > 0:
					return nil, errors.New("the app is slow")
				}
				c, err := net.Dial("tcp4", ln.Addr().String())
				if err != nil {
					return nil, err
				}
				return c, nil
			})}
			c, err := a.Dial(t.Context(), netip.MustParseAddr("10.0.0.9"), netip.MustParseAddrPort("10.0.0.1:80"))
			if c != nil {
				c.Close()
			}
			if ok := tc.taken < bindTries && tc.silent <= silentTries; (err == nil) != ok || dials != tc.dials || limits != tc.limits {
				t.Errorf("%v after %d dials, %d of them short; want %d and %d", err, dials, limits, tc.dials, tc.limits)
			}
		})
	}
}

// What a connection to an application is set to is set once, on its socket before it connects.
func TestAppOptions(t *testing.T) {
	ns, err := netns.Own()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	stock := ns.NewStock(AppOptions(0, false, sockopt.Liveness{Idle: 70 * time.Second, Interval: 7 * time.Second, Count: 3, UserTimeout: true}))
	defer stock.Close()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := (&AppDialer{Sockets: stock}).Dial(t.Context(), netip.Addr{}, ln.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, ok := sockopt.SocketOf(c)
	if !ok {
		t.Fatalf("%T is no socket to relays", c)
	}
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		for _, o := range []struct {
			name              string
			level, opt, value int
		}{
			{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
			{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 70},
			{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 7},
			{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3},
			{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 91000},
		} {
			if v, err := unix.GetsockoptInt(int(fd), o.level, o.opt); err != nil || v != o.value {
				t.Errorf("%s: %d, %v, want %d", o.name, v, err, o.value)
			}
		}
	})
}
