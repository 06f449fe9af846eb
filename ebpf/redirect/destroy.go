package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// sockDestroy is SOCK_DESTROY of linux/sock_diag.h.
const sockDestroy = 21

// errNoSocket is a connection that is not there, or no more.
var errNoSocket = errors.New("no such connection")

// destroy ends a TCP connection of ns as if it had been reset: its application
// reads ECONNABORTED and its peer is sent a reset. See sock_diag(7).
func destroy(ns *netns.NS, local, remote netip.AddrPort) error {
	var fd int
	err := ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
		return err
	})
	if err != nil {
		return fmt.Errorf("open socket diagnosis: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, destroyRequest(local, remote), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask for the end of %v → %v: %w", local, remote, err)
	}
	buf := make([]byte, 512)
	n, _, err := unix.Recvfrom(fd, buf, 0) // the kernel answers before sendto returns
	if err != nil {
		return fmt.Errorf("end %v → %v: %w", local, remote, err)
	}
	if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(buf[4:]) != unix.NLMSG_ERROR {
		return fmt.Errorf("end %v → %v: the kernel's answer is of another kind", local, remote)
	}
	switch errno := unix.Errno(-int32(binary.NativeEndian.Uint32(buf[unix.NLMSG_HDRLEN:]))); errno {
	case 0:
		return nil
	case unix.ENOENT:
		return errNoSocket
	case unix.EOPNOTSUPP:
		return &UnsupportedError{Feature: "ending connections from outside (CONFIG_INET_DIAG_DESTROY)", Err: errno}
	default:
		return fmt.Errorf("end %v → %v: %w", local, remote, errno)
	}
}

// destroyRequest is a struct nlmsghdr and a struct inet_diag_req_v2.
func destroyRequest(local, remote netip.AddrPort) []byte {
	const length = unix.NLMSG_HDRLEN + 56
	b := make([]byte, length)
	binary.NativeEndian.PutUint32(b[0:], length)
	binary.NativeEndian.PutUint16(b[4:], sockDestroy)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	r := b[unix.NLMSG_HDRLEN:]
	r[0], r[1] = unix.AF_INET6, unix.IPPROTO_TCP
	if local.Addr().Is4() {
		r[0] = unix.AF_INET
	}
	binary.NativeEndian.PutUint32(r[4:], ^uint32(0)) // in any state
	binary.BigEndian.PutUint16(r[8:], local.Port())
	binary.BigEndian.PutUint16(r[10:], remote.Port())
	copy(r[12:28], local.Addr().AsSlice())
	copy(r[28:44], remote.Addr().AsSlice())
	for i := 48; i < 56; i++ {
		r[i] = 0xff // INET_DIAG_NOCOOKIE
	}
	return b
}

// canDestroy asks for the end of a connection that cannot be.
func canDestroy() error {
	ns, err := netns.Current()
	if err != nil {
		return err
	}
	defer ns.Close()
	none := netip.MustParseAddrPort("127.0.0.1:1")
	if err := destroy(ns, none, none); !errors.Is(err, errNoSocket) {
		return err
	}
	return nil
}
