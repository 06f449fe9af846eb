package netns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen is lc.Listen with the socket in n. addr must be a literal address or
// empty before the port. Multipath TCP is off: such sockets cannot be handed
// connections by the kernel hooks that come later, and nothing here needs it.
func (n *NS) Listen(ctx context.Context, lc *net.ListenConfig, network, addr string) (net.Listener, error) {
	if err := literal(network, addr); err != nil {
		return nil, fmt.Errorf("listen %s %s: %w", network, addr, err)
	}
	c := *lc
	c.SetMultipathTCP(false)
	control := lc.Control
	c.Control = func(network, addr string, rc syscall.RawConn) error {
		// The net package has set SO_REUSEADDR on the socket that is replaced.
		if err := n.replace(rc, network, unix.SO_REUSEADDR); err != nil {
			return err
		}
		if control == nil {
			return nil
		}
		return control(network, addr, rc)
	}
	return c.Listen(ctx, network, addr)
}

// ListenPacket is lc.ListenPacket with the socket in n.
func (n *NS) ListenPacket(ctx context.Context, lc *net.ListenConfig, network, addr string) (net.PacketConn, error) {
	if err := literal(network, addr); err != nil {
		return nil, fmt.Errorf("listen %s %s: %w", network, addr, err)
	}
	c := *lc
	control := lc.Control
	c.Control = func(network, addr string, rc syscall.RawConn) error {
		if err := n.replace(rc, network, unix.SO_BROADCAST); err != nil {
			return err
		}
		if control == nil {
			return nil
		}
		return control(network, addr, rc)
	}
	return c.ListenPacket(ctx, network, addr)
}

// Dial is d.DialContext with the socket in n: d's LocalAddr, deadlines,
// keep-alive and control functions work as ever. addr must be a literal address,
// since a name would be looked up in the process's own namespace.
//
// Only socket(2) runs inside n; binding, connecting and waiting are the
// dialer's, outside, on the runtime's poller.
func (n *NS) Dial(ctx context.Context, d *net.Dialer, network, addr string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, fmt.Errorf("dial %s %s: %w", network, addr, err)
	}
	c := *d
	c.SetMultipathTCP(false)
	control, controlContext := d.Control, d.ControlContext
	c.Control = nil
	c.ControlContext = func(ctx context.Context, network, addr string, rc syscall.RawConn) error {
		if err := n.replace(rc, network, 0); err != nil {
			return err
		}
		if controlContext != nil {
			return controlContext(ctx, network, addr, rc)
		}
		if control != nil {
			return control(network, addr, rc)
		}
		return nil
	}
	return c.DialContext(ctx, network, addr)
}

func literal(network, addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil || host == "" {
		return err
	}
	_, err = netip.ParseAddr(host)
	return err
}

// replace puts a socket created in n in the place of the one behind rc, which the
// net package has created in the process's own namespace and neither bound nor
// registered with its poller yet. The descriptor's number stays, so the net
// package goes on with ours. option is one SOL_SOCKET switch to carry over.
func (n *NS) replace(rc syscall.RawConn, network string, option int) error {
	if n.own {
		return nil // it is where it belongs
	}
	var err error
	if cerr := rc.Control(func(fd uintptr) { err = n.replaceFD(int(fd), network, option) }); cerr != nil {
		return cerr
	}
	return err
}

func (n *NS) replaceFD(fd int, network string, option int) error {
	domain, kind := unix.AF_INET, unix.SOCK_STREAM
	if strings.HasSuffix(network, "6") {
		domain = unix.AF_INET6
	}
	if strings.HasPrefix(network, "udp") {
		kind = unix.SOCK_DGRAM
	}
	s := -1
	if err := n.Do(func() (err error) {
		// Non-blocking is a property of the open file and must be set here; the
		// poller of the net package relies on it.
		s, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return os.NewSyscallError("socket", err)
	}); err != nil {
		if s >= 0 {
			_ = unix.Close(s) // err says more
		}
		return err
	}
	defer unix.Close(s)
	if err := carry(fd, s, domain, option); err != nil {
		return err
	}
	return os.NewSyscallError("dup3", unix.Dup3(s, fd, unix.O_CLOEXEC))
}

// carry copies to s what the net package has set on fd before the control function.
func carry(fd, s, domain, option int) error {
	if option != 0 {
		v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
		if err == nil {
			err = unix.SetsockoptInt(s, unix.SOL_SOCKET, option, v)
		}
		if err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	if domain == unix.AF_INET6 {
		v, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err == nil {
			err = unix.SetsockoptInt(s, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, v)
		}
		if err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}
