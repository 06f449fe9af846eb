// Package sockdiag lists the TCP sockets of a network namespace and resets them, by
// the kernel's socket monitoring (sock_diag(7)).
//
// Listing names every socket once, with the number that the kernel knows it by
// (Cookie: never used twice while the node runs) and the cgroup it was made in.
// Destroy ends a socket as its peer's reset would: the app is told ECONNABORTED,
// the peer gets a RST. It takes CAP_NET_ADMIN over the namespace and
// CONFIG_INET_DIAG_DESTROY.
//
// Functions may be called from any goroutine. The package does not know what a
// connection is to the mesh.
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// State is a TCP state, numbered as the kernel does (include/net/tcp_states.h).
type State uint8

const (
	Established State = 1 + iota
	SynSent
	SynRecv
	FinWait1
	FinWait2
	TimeWait
	Close
	CloseWait
	LastAck
	Listen
	Closing
	NewSynRecv // a connection request that has no socket yet; listed as SynRecv
)

var stateNames = [...]string{
	Established: "established", SynSent: "syn-sent", SynRecv: "syn-recv", FinWait1: "fin-wait-1", FinWait2: "fin-wait-2",
	TimeWait: "time-wait", Close: "close", CloseWait: "close-wait", LastAck: "last-ack", Listen: "listen", Closing: "closing",
	NewSynRecv: "syn-recv",
}

func (s State) String() string {
	if s == 0 || int(s) >= len(stateNames) {
		return fmt.Sprintf("state(%d)", uint8(s))
	}
	return stateNames[s]
}

// States is a set of them.
type States uint32

// Of returns the set of some states.
func Of(states ...State) (set States) {
	for _, s := range states {
		set |= 1 << s
	}
	return set
}

// Has reports whether s is in the set.
func (set States) Has(s State) bool { return s < 32 && set&(1<<s) != 0 }

// Connections are the states of what two ends know of.
var Connections = Of(Established, FinWait1, FinWait2, CloseWait, LastAck, Closing)

// HalfOpen are the states of what has not been answered yet.
var HalfOpen = Of(SynSent, SynRecv, NewSynRecv)

// Socket is one of them.
type Socket struct {
	Local, Remote netip.AddrPort // IPv4 as such, also in an IPv6 socket
	State         State
	Cookie        uint64
	Inode         uint32 // 0: no process has it open
	UID           uint32
	Mark          uint32
	Cgroup        uint64 // the number of its cgroup2 directory; 0 if the kernel does not tell

	family uint8
	id     [idLen]byte // as listed, which is what the kernel wants to hear again
}

// Sizes of include/uapi/linux/inet_diag.h and netlink(7).
const (
	idLen     = 48
	msgLen    = 72
	reqLen    = 56
	headerLen = 16

	attrMark   = 15 // INET_DIAG_MARK
	attrCgroup = 21 // INET_DIAG_CGROUP_ID, Linux 5.9

	sockDiagByFamily = 20
	sockDestroy      = 21
)

const (
	// maxReply holds what the kernel puts into one datagram of a dump.
	maxReply = 64 << 10
	// maxAnswer holds an acknowledgement, which repeats what was asked, or a socket.
	maxAnswer = 4 << 10
)

// patience bounds each wait for the kernel, which answers while it is asked.
var patience = unix.Timeval{Sec: 10}

// ErrNoDestroy reports a kernel without CONFIG_INET_DIAG_DESTROY.
var ErrNoDestroy = errors.New("the kernel cannot reset connections (CONFIG_INET_DIAG_DESTROY)")

// ErrNoSocket reports a connection that is not there, or no more.
var ErrNoSocket = errors.New("no such connection")

// List returns ns's TCP sockets in one of the states.
func List(ns *netns.NS, states States) ([]Socket, error) {
	c, err := dial(ns, maxReply)
	if err != nil {
		return nil, err
	}
	defer c.close()
	var all []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err = c.list(all, family, states)
		if family == unix.AF_INET6 && errors.Is(err, unix.ENOENT) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("list TCP sockets: %w", err)
		}
	}
	return all, nil
}

// Destroy resets sockets that List returned and reports how many were still there.
func Destroy(ns *netns.NS, sockets []Socket) (int, error) {
	if len(sockets) == 0 {
		return 0, nil
	}
	c, err := dial(ns, maxAnswer)
	if err != nil {
		return 0, err
	}
	defer c.close()
	n := 0
	for _, s := range sockets {
		switch err := c.destroy(s); {
		case err == nil:
			n++
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
			// Gone, or its addresses are another's by now.
		case errors.Is(err, unix.EOPNOTSUPP):
			if s.State == TimeWait || s.State == FinWait2 {
				continue // a remainder without socket, which some kernels do not end
			}
			return n, ErrNoDestroy
		default:
			return n, fmt.Errorf("reset %v to %v: %w", s.Local, s.Remote, err)
		}
	}
	return n, nil
}

// DestroyConnection resets the socket of ns with these addresses, if its number is
// cookie; with a cookie of 0 whichever has them.
func DestroyConnection(ns *netns.NS, local, remote netip.AddrPort, cookie uint64) error {
	c, err := dial(ns, maxAnswer)
	if err != nil {
		return err
	}
	defer c.close()
	s := exactly(local, remote, cookie)
	if cookie == 0 {
		// The kernel finds a listener where the connection is gone, and would end it.
		s, err = find(ns, s)
	}
	if err == nil {
		err = c.destroy(s)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrNoSocket), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		return ErrNoSocket
	case errors.Is(err, unix.EOPNOTSUPP):
		return ErrNoDestroy
	default:
		return fmt.Errorf("reset %v to %v: %w", local, remote, err)
	}
}

// exactly is a socket to ask for; the kernel finds IPv4 in IPv6 sockets too.
func exactly(local, remote netip.AddrPort, cookie uint64) Socket {
	local = netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	remote = netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
	s := Socket{Local: local, Remote: remote, Cookie: cookie, family: unix.AF_INET6}
	if local.Addr().Is4() {
		s.family = unix.AF_INET
	}
	if cookie == 0 {
		cookie = ^uint64(0) // INET_DIAG_NOCOOKIE, twice
	}
	binary.BigEndian.PutUint16(s.id[0:], local.Port())
	binary.BigEndian.PutUint16(s.id[2:], remote.Port())
	copy(s.id[4:20], local.Addr().AsSlice())
	copy(s.id[20:36], remote.Addr().AsSlice())
	binary.NativeEndian.PutUint32(s.id[40:], uint32(cookie))
	binary.NativeEndian.PutUint32(s.id[44:], uint32(cookie>>32))
	return s
}

// CanDestroy returns ErrNoDestroy if the kernel resets no connections. It asks for
// one that cannot be.
func CanDestroy() error {
	ns, err := netns.Current()
	if err != nil {
		return err
	}
	defer ns.Close()
	none := netip.MustParseAddrPort("127.0.0.1:1")
	if err := DestroyConnection(ns, none, none, 1); !errors.Is(err, ErrNoSocket) {
		return err
	}
	return nil
}

type conn struct {
	fd  int
	buf []byte
}

// dial opens a socket that hears replies of up to reply bytes.
func dial(ns *netns.NS, reply int) (*conn, error) {
	fd := -1
	err := ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		return os.NewSyscallError("socket", err)
	})
	if err == nil {
		err = os.NewSyscallError("setsockopt", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience))
	}
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd) // err says more
		}
		return nil, fmt.Errorf("open socket monitoring: %w", err)
	}
	return &conn{fd: fd, buf: make([]byte, reply)}, nil
}

func (c *conn) close() { _ = unix.Close(c.fd) } // only asked

func (c *conn) list(all []Socket, family uint8, states States) ([]Socket, error) {
	var id [idLen]byte
	if err := c.send(sockDiagByFamily, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, family, states, id); err != nil {
		return nil, err
	}
	for {
		n, err := c.receive()
		if err != nil {
			return nil, err
		}
		var done bool
		if all, done, err = parse(all, c.buf[:n]); done || err != nil {
			return all, err
		}
	}
}

// find looks for the connection that has want's addresses.
func find(ns *netns.NS, want Socket) (Socket, error) {
	all, err := List(ns, Connections|HalfOpen)
	if err != nil {
		return Socket{}, err
	}
	for _, s := range all {
		if s.Local == want.Local && s.Remote == want.Remote {
			return s, nil
		}
	}
	return Socket{}, ErrNoSocket
}

func (c *conn) destroy(s Socket) error {
	if err := c.send(sockDestroy, unix.NLM_F_REQUEST|unix.NLM_F_ACK, s.family, 0, s.id); err != nil {
		return err
	}
	n, err := c.receive()
	if err != nil {
		return err
	}
	_, _, err = parse(nil, c.buf[:n])
	return err
}

func (c *conn) send(kind, flags uint16, family uint8, states States, id [idLen]byte) error {
	b := make([]byte, headerLen+reqLen)
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint16(b[6:], flags)
	b[16], b[17] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[20:], uint32(states))
	copy(b[24:], id[:])
	return os.NewSyscallError("sendto", unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
}

func (c *conn) receive() (int, error) {
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n, os.NewSyscallError("recvfrom", err)
	}
}

var errMalformed = errors.New("malformed answer from the kernel")

// parse appends the sockets of one datagram. done says that it was the last one.
func parse(all []Socket, b []byte) (_ []Socket, done bool, err error) {
	done, err = parseMessages(b, func(body []byte) error {
		s, err := parseSocket(body)
		if err == nil {
			all = append(all, s)
		}
		return err
	})
	return all, done, err
}

// parseMessages calls f with the body of each socket's message.
func parseMessages(b []byte, f func(body []byte) error) (done bool, err error) {
	for len(b) >= headerLen {
		n := int(binary.NativeEndian.Uint32(b))
		if n < headerLen || n > len(b) {
			return true, errMalformed
		}
		body := b[headerLen:n]
		switch binary.NativeEndian.Uint16(b[4:]) {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			// Both begin with an error number; a kernel that has nothing to say
			// leaves it out of DONE.
			if len(body) >= 4 {
				if e := int32(binary.NativeEndian.Uint32(body)); e < 0 {
					return true, unix.Errno(-e)
				}
			}
			return true, nil
		case sockDiagByFamily:
			if err := f(body); err != nil {
				return true, err
			}
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	if len(b) > 0 {
		return true, errMalformed
	}
	return false, nil
}

func parseSocket(b []byte) (Socket, error) {
	if len(b) < msgLen {
		return Socket{}, errMalformed
	}
	s := Socket{
		family: b[0], State: State(b[1]),
		Cookie: uint64(binary.NativeEndian.Uint32(b[44:])) | uint64(binary.NativeEndian.Uint32(b[48:]))<<32,
		UID:    binary.NativeEndian.Uint32(b[64:]), Inode: binary.NativeEndian.Uint32(b[68:]),
	}
	copy(s.id[:], b[4:])
	s.Local = endpoint(s.family, b[8:24], b[4:6])
	s.Remote = endpoint(s.family, b[24:40], b[6:8])
	for b = b[msgLen:]; len(b) >= 4; {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return Socket{}, errMalformed
		}
		switch v := b[4:n]; binary.NativeEndian.Uint16(b[2:]) {
		case attrMark:
			if len(v) >= 4 {
				s.Mark = binary.NativeEndian.Uint32(v)
			}
		case attrCgroup:
			if len(v) >= 8 {
				s.Cgroup = binary.NativeEndian.Uint64(v)
			}
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return s, nil
}

func endpoint(family uint8, addr, port []byte) netip.AddrPort {
	var a netip.Addr
	if family == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(addr[:4]))
	} else {
		a = netip.AddrFrom16([16]byte(addr)).Unmap()
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
}
