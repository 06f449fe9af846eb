package sockopt

import (
	"net"
	"net/netip"
	"syscall"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Socket is a TCP connection of the kernel's, used as such: *net.TCPConn and *netns.Conn are, and nothing around one,
// whose Read and Write would be gone around.
type Socket interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
	SetLinger(sec int) error
}

var _, _ Socket = (*net.TCPConn)(nil), (*netns.Conn)(nil)

// SocketOf returns c if it is a Socket.
func SocketOf(c net.Conn) (Socket, bool) {
	switch c := c.(type) {
	case *net.TCPConn:
		return c, true
	case *netns.Conn:
		return c, true
	}
	return nil, false
}

// RemoteAddrPort is c's peer, an IPv4 one as such.
func RemoteAddrPort(c Socket) netip.AddrPort {
	if c, ok := c.(*netns.Conn); ok {
		return c.RemoteAddrPort()
	}
	a, _ := c.RemoteAddr().(*net.TCPAddr)
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// controlSocket calls f with c's descriptor. Of each kind by itself, since then what SyscallConn returns is not allocated.
func controlSocket(c Socket, f func(fd uintptr)) error {
	switch c := c.(type) {
	case *net.TCPConn:
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		return raw.Control(f)
	case *netns.Conn:
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		return raw.Control(f)
	}
	panic("BUG: sockopt: a socket of another kind")
}
