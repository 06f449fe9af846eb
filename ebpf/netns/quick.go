package netns

import (
	"net/netip"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls here never wait, for the sockets that they are made on do not block, and are made without the Go scheduler's
// knowing: one that it knows of wakes its monitor thread, which sleeps whenever all processors are idle, and one that
// takes some time, as connecting within a host does, may lose its processor to another thread. Errors are bare errnos.

func errorOf(errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}

// address is struct sockaddr_in or sockaddr_in6; the family says which.
type address struct {
	in6 unix.RawSockaddrInet6
	len uint32
}

func (a *address) in4() *unix.RawSockaddrInet4 {
	return (*unix.RawSockaddrInet4)(unsafe.Pointer(&a.in6)) // the smaller one
}

// set is the zero value's.
func (a *address) set(ap netip.AddrPort) {
	if ap.Addr().Is4() {
		in4 := a.in4()
		in4.Family, in4.Port, in4.Addr = unix.AF_INET, bigEndian(ap.Port()), ap.Addr().As4()
		a.len = unix.SizeofSockaddrInet4
		return
	}
	a.in6.Family, a.in6.Port, a.in6.Addr = unix.AF_INET6, bigEndian(ap.Port()), ap.Addr().As16()
	if zone, err := strconv.ParseUint(ap.Addr().Zone(), 10, 32); err == nil {
		a.in6.Scope_id = uint32(zone)
	}
	a.len = unix.SizeofSockaddrInet6
}

// addrPort is not valid for another family. An IPv4 peer of an IPv6 socket is one of IPv4; an interface has its number,
// since names are each namespace's own.
func (a *address) addrPort() netip.AddrPort {
	switch a.in6.Family {
	case unix.AF_INET:
		in4 := a.in4()
		return netip.AddrPortFrom(netip.AddrFrom4(in4.Addr), bigEndian(in4.Port))
	case unix.AF_INET6:
		ip := netip.AddrFrom16(a.in6.Addr).Unmap()
		if a.in6.Scope_id != 0 {
			ip = ip.WithZone(strconv.FormatUint(uint64(a.in6.Scope_id), 10))
		}
		return netip.AddrPortFrom(ip, bigEndian(a.in6.Port))
	}
	return netip.AddrPort{}
}

// bigEndian turns a port as it lies in memory into one of the network's order, and back.
func bigEndian(p uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&p))
	return uint16(b[0])<<8 | uint16(b[1])
}

// accept takes a connection, whose socket does not block.
func accept(fd int) (s int, remote netip.AddrPort, err error) {
	var a address
	a.len = unix.SizeofSockaddrInet6
	r, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&a.in6)), uintptr(unsafe.Pointer(&a.len)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, netip.AddrPort{}, errno
	}
	return int(r), a.addrPort(), nil
}

// getsockname is not valid if the kernel does not say it.
func getsockname(fd int) netip.AddrPort {
	var a address
	a.len = unix.SizeofSockaddrInet6
	if _, _, errno := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&a.in6)), uintptr(unsafe.Pointer(&a.len))); errno != 0 {
		return netip.AddrPort{}
	}
	return a.addrPort()
}

func bind(fd int, a *address) error {
	_, _, errno := unix.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&a.in6)), uintptr(a.len))
	return errorOf(errno)
}

func connect(fd int, a *address) error {
	_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&a.in6)), uintptr(a.len))
	return errorOf(errno)
}
