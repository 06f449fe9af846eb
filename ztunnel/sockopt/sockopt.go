// Package sockopt sets and reads the raw socket options that a transparent proxy needs.
//
// Every option names the man page or the kernel header it comes from. The functions act on sockets that the caller
// owns and may be used from any goroutine; nothing here decides whether an option is wanted.
package sockopt

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// soOriginalDst is SO_ORIGINAL_DST (linux/netfilter_ipv4.h).
	soOriginalDst = 80
	// ip6tSoOriginalDst is IP6T_SO_ORIGINAL_DST (linux/netfilter_ipv6/ip6_tables.h).
	ip6tSoOriginalDst = 80
)

// Keepalive of every socket that carries mesh traffic, the reference's values: first probe and interval after 180 s,
// nine probes.
const (
	KeepaliveIdle     = 180 * time.Second
	KeepaliveInterval = 180 * time.Second
	KeepaliveCount    = 9
)

// Options are set on a socket before it is bound or connected. The zero value sets nothing.
type Options struct {
	Mark        int  // SO_MARK, socket(7)
	Transparent bool // IP_TRANSPARENT or IPV6_TRANSPARENT, ip(7): failure is an error
	// TransparentBestEffort is Transparent whose failure is ignored: listeners work without it, without the source
	// address of plaintext peers.
	TransparentBestEffort bool
	Freebind              bool // IP_FREEBIND or IPV6_FREEBIND, ip(7)
	ReusePort             bool // SO_REUSEPORT, socket(7)
	ReuseAddr             bool // SO_REUSEADDR, socket(7)
	Buffers               int  // SO_RCVBUF and SO_SNDBUF, socket(7); what a listener accepts has them too
	PacketInfo            bool // IP_PKTINFO or IPV6_RECVPKTINFO, ip(7), ipv6(7)
	OwnPodOnly            bool // SO_ATTACH_FILTER, socket(7): see SetOwnPodOnly
	NoDelay               bool // TCP_NODELAY, tcp(7): the net package sets it on its own connections
	// What a listener accepts has its Liveness and ResetOnClose too (tcp(7), socket(7)), without a system call for each.
	Liveness *Liveness
	// ResetOnClose makes a close, also that of a dead process's sockets, a reset: SO_LINGER of no time, socket(7).
	ResetOnClose bool
}

// ControlFor returns a function for net.Dialer.Control or net.ListenConfig.Control that applies o.
func ControlFor(o Options) func(network, addr string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		v6 := len(network) > 0 && network[len(network)-1] == '6'
		return control(c, func(fd int) error { return o.apply(fd, v6) })
	}
}

// Apply sets o on an open socket.
func Apply(fd int, v6 bool, o Options) error { return o.apply(fd, v6) }

func (o Options) apply(fd int, v6 bool) error {
	if o.Mark != 0 {
		if err := SetMark(fd, o.Mark); err != nil {
			return err
		}
	}
	if o.Transparent {
		if err := SetTransparent(fd, v6); err != nil {
			return err
		}
	} else if o.TransparentBestEffort {
		_ = SetTransparent(fd, v6) // best effort by contract
	}
	if o.Freebind {
		if err := SetFreebind(fd, v6); err != nil {
			return err
		}
	}
	if o.ReusePort {
		if err := SetReusePort(fd); err != nil {
			return err
		}
	}
	if o.ReuseAddr {
		if err := os.NewSyscallError("setsockopt SO_REUSEADDR", setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)); err != nil {
			return err
		}
	}
	if o.PacketInfo {
		if err := SetPacketInfo(fd, v6); err != nil {
			return err
		}
	}
	if o.OwnPodOnly {
		if err := SetOwnPodOnly(fd, v6); err != nil {
			return err
		}
	}
	if o.NoDelay {
		if err := os.NewSyscallError("setsockopt TCP_NODELAY", setInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)); err != nil {
			return err
		}
	}
	if o.Liveness != nil {
		if err := o.Liveness.apply(fd); err != nil {
			return err
		}
	}
	if o.ResetOnClose {
		if err := set(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return os.NewSyscallError("setsockopt SO_LINGER", err)
		}
	}
	if o.Buffers != 0 {
		return SetBuffers(fd, o.Buffers)
	}
	return nil
}

// wholeSegment is no smaller than any segment, loopback's included.
const wholeSegment = 64 << 10

// SetBuffers bounds both buffers of a socket that is not connected yet, which ends their growth. The kernel doubles the
// value for its own needs. Segments become as small (TCP_MAXSEG, tcp(7)): with a buffer that holds less than one, each
// end waits for the other's timers, 40 ms for an acknowledgement and 200 ms for a window probe.
func SetBuffers(fd, size int) error {
	if size < wholeSegment {
		if err := setInt(fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG, min(size, math.MaxInt16)); err != nil {
			return os.NewSyscallError("setsockopt TCP_MAXSEG", err)
		}
	}
	return setBuffers(fd, size, size)
}

func setBuffers(fd, receive, send int) error {
	return errors.Join(
		os.NewSyscallError("setsockopt SO_RCVBUF", setInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receive)),
		os.NewSyscallError("setsockopt SO_SNDBUF", setInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, send)))
}

// BoundBuffers does so on a connection, whose segments are what they are: there is always room for one that is received,
// and for two that are sent.
func BoundBuffers(c Socket, size int) error {
	var err error
	if cerr := controlSocket(c, func(fd uintptr) {
		segment := 0
		if size < wholeSegment {
			if segment, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG); err != nil {
				err = os.NewSyscallError("getsockopt TCP_MAXSEG", err)
				return
			}
		}
		err = setBuffers(int(fd), max(size, segment), max(size, min(2*segment, wholeSegment)))
	}); cerr != nil {
		return cerr
	}
	return err
}

// SetMark sets SO_MARK (socket(7)); it needs CAP_NET_ADMIN or, since Linux 5.17, CAP_NET_RAW.
func SetMark(fd, mark int) error {
	return os.NewSyscallError("setsockopt SO_MARK", setInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark))
}

// SetTransparent allows binding to addresses that are not ours (ip(7)). A dual-stack socket gets both options.
func SetTransparent(fd int, v6 bool) error {
	err := setInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
	if v6 {
		err = setInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	return os.NewSyscallError("setsockopt IP_TRANSPARENT", err)
}

// SetFreebind allows binding to an address that no interface has (yet).
func SetFreebind(fd int, v6 bool) error {
	if v6 {
		return os.NewSyscallError("setsockopt IPV6_FREEBIND", setInt(fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1))
	}
	return os.NewSyscallError("setsockopt IP_FREEBIND", setInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1))
}

// SetReusePort lets the next generation of a listener bind while this one drains.
func SetReusePort(fd int) error {
	return os.NewSyscallError("setsockopt SO_REUSEPORT", setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
}

// Liveness is how a silent peer is told from a dead one. The zero value is the mesh's keepalive.
type Liveness struct {
	Off            bool
	Idle, Interval time.Duration
	Count          int
	// UserTimeout also ends connections whose data stays unacknowledged for as long as keepalive takes to give up
	// (TCP_USER_TIMEOUT, tcp(7)).
	UserTimeout bool
}

func (l Liveness) withDefaults() Liveness {
	if l.Idle == 0 {
		l.Idle = KeepaliveIdle
	}
	if l.Interval == 0 {
		l.Interval = KeepaliveInterval
	}
	if l.Count == 0 {
		l.Count = KeepaliveCount
	}
	return l
}

// Set applies l to a connection. TCP_NODELAY is set on all that the net package makes.
func (l Liveness) Set(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return control(raw, l.apply)
}

func (l Liveness) apply(fd int) error {
	l = l.withDefaults()
	set := func(name string, level, opt, v int) error {
		if err := setInt(fd, level, opt, v); err != nil {
			return os.NewSyscallError("setsockopt "+name, err)
		}
		return nil
	}
	if l.Off {
		if err := set("SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0); err != nil {
			return err
		}
	} else if err := errors.Join(
		set("TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds(l.Idle)),
		set("TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds(l.Interval)),
		set("TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, l.Count),
		set("SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)); err != nil {
		return err
	}
	if !l.UserTimeout {
		return nil
	}
	limit := l.Idle + time.Duration(l.Count)*l.Interval
	return set("TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(limit.Milliseconds()))
}

// seconds is what the kernel takes, rounded up.
func seconds(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }

// Keepalive sets the mesh's keepalive on a connection.
func Keepalive(c *net.TCPConn) error { return Liveness{}.Set(c) }

// CloseWrite ends what c sends, as c.CloseWrite does, without the Go scheduler's knowing: it is all that happens while
// an idle process has to do with a half-close.
func CloseWrite(c Socket) error {
	var err error
	if cerr := controlSocket(c, func(fd uintptr) { err = closeWrite(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// Reset closes c so that the peer sees RST instead of FIN: SO_LINGER with zero timeout, socket(7).
func Reset(c Socket) error {
	return errors.Join(c.SetLinger(0), c.Close())
}

// Unacked reports whether the other end has yet to acknowledge something, our end included (SIOCOUTQ, tcp(7)).
func Unacked(c Socket) bool {
	n := 0
	err := controlSocket(c, func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return err == nil && n > 0
}

// OriginalDst returns the destination that the client of a redirected connection asked for.
func OriginalDst(c Socket) (netip.AddrPort, error) {
	// A dual-stack socket reports an IPv4 peer as IPv4-mapped; netfilter then knows the IPv4 tuple only.
	v6 := RemoteAddrPort(c).Addr().Is6()
	var dst netip.AddrPort
	var err error
	if cerr := controlSocket(c, func(fd uintptr) { dst, err = originalDst(int(fd), v6) }); cerr != nil {
		err = cerr
	}
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	return dst, nil
}

func originalDst(fd int, v6 bool) (netip.AddrPort, error) {
	if v6 {
		var sa unix.RawSockaddrInet6
		if err := get(fd, unix.SOL_IPV6, ip6tSoOriginalDst, &sa); err != nil {
			return netip.AddrPort{}, os.NewSyscallError("getsockopt IP6T_SO_ORIGINAL_DST", err)
		}
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), hostOrder(sa.Port)), nil
	}
	var sa unix.RawSockaddrInet4
	if err := get(fd, unix.SOL_IP, soOriginalDst, &sa); err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockopt SO_ORIGINAL_DST", err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), hostOrder(sa.Port)), nil
}

// hostOrder reads a port that the kernel stores in network byte order.
func hostOrder(p uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&p))
	return uint16(b[0])<<8 | uint16(b[1])
}

func control(c syscall.RawConn, f func(fd int) error) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}
