package sockopt

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/sockets"
)

// Every option that was asked for is what the kernel says afterwards, and no other.
func TestOptionsReadBack(t *testing.T) {
	type opt struct{ level, name, want int }
	for _, tt := range []struct {
		name string
		v6   bool
		o    Options
		want []opt
	}{
		{"none", false, Options{}, []opt{{unix.SOL_SOCKET, unix.SO_REUSEPORT, 0}, {unix.SOL_IP, unix.IP_FREEBIND, 0}}},
		{"reuse", false, Options{ReusePort: true, ReuseAddr: true}, []opt{{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1}, {unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}}},
		{"freebind", false, Options{Freebind: true}, []opt{{unix.SOL_IP, unix.IP_FREEBIND, 1}}},
		{"freebind v6", true, Options{Freebind: true}, []opt{{unix.SOL_IPV6, unix.IPV6_FREEBIND, 1}}},
		{"mark", false, Options{Mark: 0x539}, []opt{{unix.SOL_SOCKET, unix.SO_MARK, 0x539}}},
		{"transparent", false, Options{Transparent: true}, []opt{{unix.SOL_IP, unix.IP_TRANSPARENT, 1}}},
		{"transparent v6", true, Options{Transparent: true}, []opt{{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1}, {unix.SOL_IP, unix.IP_TRANSPARENT, 1}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			family := unix.AF_INET
			if tt.v6 {
				family = unix.AF_INET6
			}
			fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Skip("no socket of this family: ", err)
			}
			defer unix.Close(fd)
			if err := Apply(fd, tt.v6, tt.o); errors.Is(err, unix.EPERM) {
				t.Skip("needs CAP_NET_ADMIN: ", err)
			} else if err != nil {
				t.Fatal(err)
			}
			for _, o := range tt.want {
				if got, err := unix.GetsockoptInt(fd, o.level, o.name); err != nil || got != o.want {
					t.Errorf("option %d/%d = %d, %v: want %d", o.level, o.name, got, err, o.want)
				}
			}
		})
	}
}

func TestConnectionOptions(t *testing.T) {
	lc := net.ListenConfig{Control: ControlFor(Options{ReusePort: true})}
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	again, err := lc.Listen(t.Context(), "tcp4", ln.Addr().String())
	if err != nil {
		t.Fatalf("second listener on one port: %v", err)
	}
	_ = again.Close()
	dialled, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	c := accepted.(*net.TCPConn)
	for _, tt := range []struct {
		l                                Liveness
		on, idle, interval, count, limit int
	}{
		{Liveness{}, 1, 180, 180, 9, 0},
		{Liveness{Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3, UserTimeout: true}, 1, 10, 5, 3, 25_000},
		{Liveness{Off: true}, 0, 10, 5, 3, 25_000},
	} {
		if err := tt.l.Set(c); err != nil {
			t.Fatal(err)
		}
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := control(raw, func(fd int) error {
			for _, o := range []struct{ level, name, want int }{
				{unix.SOL_SOCKET, unix.SO_KEEPALIVE, tt.on}, {unix.SOL_TCP, unix.TCP_KEEPIDLE, tt.idle},
				{unix.SOL_TCP, unix.TCP_KEEPINTVL, tt.interval}, {unix.SOL_TCP, unix.TCP_KEEPCNT, tt.count},
				{unix.SOL_TCP, unix.TCP_NODELAY, 1}, {unix.SOL_TCP, unix.TCP_USER_TIMEOUT, tt.limit},
			} {
				if got, err := unix.GetsockoptInt(fd, o.level, o.name); err != nil || got != o.want {
					t.Errorf("%+v: option %d/%d = %d, %v: want %d", tt.l, o.level, o.name, got, err, o.want)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := OriginalDst(c); err == nil {
		t.Log("this connection passed netfilter's redirect") // otherwise ENOENT or ENOPROTOOPT
	}
	if err := Reset(c); err != nil {
		t.Fatal(err)
	}
	if _, err := dialled.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) && err != io.EOF {
		t.Errorf("read after reset: %v", err)
	} else if err == io.EOF {
		t.Error("the peer sees an orderly end, want a reset")
	}
}

// TestBuffersAreBoundedAndInherited: what a pod leaves unread must not grow in the kernel, whose memory all pods share.
func TestBuffersAreBoundedAndInherited(t *testing.T) {
	const appBuffer = 64 << 10
	lc := net.ListenConfig{Control: ControlFor(Options{Buffers: appBuffer})}
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialled, err := (&net.Dialer{Control: ControlFor(Options{Buffers: appBuffer})}).Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	for _, c := range []net.Conn{dialled, accepted} {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := control(raw, func(fd int) error {
			for _, o := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
				// rmem_max and wmem_max may allow less.
				if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, o); err != nil || got > 2*appBuffer || got < 64<<10 {
					t.Errorf("option %d = %d, %v: want at most %d", o, got, err, 2*appBuffer)
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSmallBuffersHoldSegments: with less than a segment each end waits for the other's timers. On loopback, where most
// applications are, 4 MiB took 1.4 s to one with buffers of 8 KiB, and 50 s from one.
func TestSmallBuffersHoldSegments(t *testing.T) {
	const small = 8 << 10
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialled, err := (&net.Dialer{Control: ControlFor(Options{Buffers: small})}).Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	_, accepted := sockets.Pair(t)
	if err := BoundBuffers(accepted, small); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]Socket{"dialled": dialled.(*net.TCPConn), "accepted": accepted} {
		if err := controlSocket(c, func(fd uintptr) {
			get := func(level, opt int) int {
				n, err := unix.GetsockoptInt(int(fd), level, opt)
				if err != nil {
					t.Error(err)
				}
				return n
			}
			segment := get(unix.IPPROTO_TCP, unix.TCP_MAXSEG)
			for o, most := range map[int]int{unix.SO_RCVBUF: 65536, unix.SO_SNDBUF: 131072} {
				if name == "dialled" {
					most = 2 * small
				}
				if got := get(unix.SOL_SOCKET, o); got < 2*segment || got > most { // the kernel doubles them
					t.Errorf("%s: option %d = %d, want at least 2 segments of %d, and at most %d", name, o, got, segment, most)
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCloseWriteIsAHalfClose: the peer reads the end, and what it says then still arrives.
func TestCloseWriteIsAHalfClose(t *testing.T) {
	peer, c := sockets.Pair(t)
	if err := CloseWrite(c); err != nil {
		t.Fatal(err)
	}
	if n, err := peer.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("the peer reads %d, %v: want the end", n, err)
	}
	if _, err := peer.Write([]byte("last")); err != nil {
		t.Fatal(err)
	}
	if err := peer.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "last" {
		t.Errorf("read %q, %v", b, err)
	}
	if err := CloseWrite(c); !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("half-close after both ends: %v, want ENOTCONN, as CloseWrite of net says", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := CloseWrite(c); !errors.Is(err, net.ErrClosed) {
		t.Errorf("half-close of a closed connection: %v", err)
	}
}
