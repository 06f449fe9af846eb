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
)

// dialFunc is told how long a dial may take.
type dialFunc func(limit time.Duration) (*net.TCPConn, error)

func (f dialFunc) Dial(_ context.Context, _, _ netip.AddrPort, limit time.Duration, _ func(int) error) (*net.TCPConn, error) {
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
			a := &AppDialer{KeepSource: true, Sockets: dialFunc(func(limit time.Duration) (*net.TCPConn, error) {
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
				return c.(*net.TCPConn), nil
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
