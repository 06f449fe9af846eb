package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Conntrack asks a pod's connection tracking where redirected datagrams were
// meant to go: they arrive without a trace of it. A question costs two system
// calls; the kernel answers within the first. Any goroutine may ask.
type Conntrack struct {
	ns *netns.NS

	mu  sync.Mutex
	fd  int // -1: not open
	seq uint32
	buf [4096]byte // an entry is a few hundred bytes
}

// NewConntrack opens nothing before the first question.
func NewConntrack(ns *netns.NS) *Conntrack { return &Conntrack{ns: ns, fd: -1} }

// Close may be called more than once; questions after it open it anew.
func (c *Conntrack) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd >= 0 {
		_ = unix.Close(c.fd) // nothing is buffered
		c.fd = -1
	}
}

// ErrNotTracked: nobody redirected the datagram.
var ErrNotTracked = errors.New("the connection is not tracked")

// UDP returns what the sender of a datagram from client to local had addressed.
// The entry's reply direction is from local to client.
func (c *Conntrack) UDP(client, local netip.AddrPort) (netip.AddrPort, error) {
	if client.Addr().Is4() != local.Addr().Is4() {
		return netip.AddrPort{}, fmt.Errorf("BUG: conntrack: %v and %v are of two families", client, local)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	dst, err := c.askLocked(client, local)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination of %s to %s: %w", client, local, err)
	}
	return dst, nil
}

func (c *Conntrack) askLocked(client, local netip.AddrPort) (netip.AddrPort, error) {
	if c.fd < 0 {
		if err := c.openLocked(); err != nil {
			return netip.AddrPort{}, err
		}
	}
	c.seq++
	if err := unix.Sendto(c.fd, appendGet(c.buf[:0], c.seq, client, local), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return netip.AddrPort{}, os.NewSyscallError("sendto", err)
	}
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf[:], 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return netip.AddrPort{}, os.NewSyscallError("recvfrom", err)
		}
		dst, seq, err := parseEntry(c.buf[:n])
		if seq == c.seq {
			return dst, err
		}
	}
}

func (c *Conntrack) openLocked() error {
	err := c.ns.Do(func() (err error) {
		c.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		c.fd = -1
		return err
	}
	// The kernel answers at once; should it ever not, nobody must wait for ever.
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		_ = unix.Close(c.fd)
		c.fd = -1
		return os.NewSyscallError("setsockopt SO_RCVTIMEO", err)
	}
	return nil
}

// The message below is that of linux/netfilter/nfnetlink_conntrack.h: a header, a
// family, and nested attributes. Lengths and types are in host order, the rest in
// network order.
const (
	ctMsgGet       = 1<<8 | 1 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
	ctMsgNew       = 1 << 8
	ctaTupleOrig   = 1
	ctaTupleReply  = 2
	ctaTupleIP     = 1
	ctaTupleProto  = 2
	ctaProtoNum    = 1
	ctaProtoSrc    = 2
	ctaProtoDst    = 3
	attrMask       = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
	nfgenLen       = 4
	ipSrc4, ipDst4 = 1, 2
	ipSrc6, ipDst6 = 3, 4
)

var errEntry = errors.New("connection tracking sent something else than an entry")

func appendGet(b []byte, seq uint32, client, local netip.AddrPort) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0) // length, at the end
	b = binary.NativeEndian.AppendUint16(b, ctMsgGet)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(b, 0, 0, 0, 0) // port: the kernel knows who we are
	family, src, dst := byte(unix.AF_INET), uint16(ipSrc4), uint16(ipDst4)
	if client.Addr().Is6() {
		family, src, dst = unix.AF_INET6, ipSrc6, ipDst6
	}
	b = append(b, family, 0, 0, 0) // version NFNETLINK_V0, resource 0
	b, tuple := openAttr(b, ctaTupleReply)
	b, ip := openAttr(b, ctaTupleIP)
	b = appendAttr(b, src, local.Addr().AsSlice())
	b = appendAttr(b, dst, client.Addr().AsSlice())
	closeAttr(b, ip)
	b, proto := openAttr(b, ctaTupleProto)
	b = appendAttr(b, ctaProtoNum, []byte{unix.IPPROTO_UDP})
	b = appendAttr(b, ctaProtoSrc, binary.BigEndian.AppendUint16(nil, local.Port()))
	b = appendAttr(b, ctaProtoDst, binary.BigEndian.AppendUint16(nil, client.Port()))
	closeAttr(b, proto)
	closeAttr(b, tuple)
	binary.NativeEndian.PutUint32(b[start:], uint32(len(b)-start))
	return b
}

func openAttr(b []byte, kind uint16) ([]byte, int) {
	at := len(b)
	b = append(b, 0, 0)
	return binary.NativeEndian.AppendUint16(b, kind|unix.NLA_F_NESTED), at
}

func closeAttr(b []byte, at int) { binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at)) }

func appendAttr(b []byte, kind uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// parseEntry reads the destination of the original direction out of an answer.
func parseEntry(b []byte) (dst netip.AddrPort, seq uint32, err error) {
	if len(b) < unix.NLMSG_HDRLEN {
		return dst, 0, errEntry
	}
	kind := binary.NativeEndian.Uint16(b[4:])
	seq = binary.NativeEndian.Uint32(b[8:])
	if n := binary.NativeEndian.Uint32(b); n < unix.NLMSG_HDRLEN || uint64(n) > uint64(len(b)) {
		return dst, seq, errEntry
	}
	body := b[unix.NLMSG_HDRLEN:binary.NativeEndian.Uint32(b)]
	switch {
	case kind == unix.NLMSG_ERROR && len(body) >= 4:
		if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(body))); errno != unix.ENOENT {
			return dst, seq, os.NewSyscallError("ctnetlink", errno)
		}
		return dst, seq, ErrNotTracked
	case kind != ctMsgNew || len(body) < nfgenLen:
		return dst, seq, errEntry
	}
	tuple := attr(body[nfgenLen:], ctaTupleOrig)
	ip, proto := attr(tuple, ctaTupleIP), attr(tuple, ctaTupleProto)
	to := attr(ip, ipDst4)
	if len(to) == 0 {
		to = attr(ip, ipDst6)
	}
	addr, ok := netip.AddrFromSlice(to)
	port := attr(proto, ctaProtoDst)
	if !ok || len(port) != 2 {
		return dst, seq, errEntry
	}
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(port)), seq, nil
}

// attr finds an attribute, nil if there is none.
func attr(b []byte, kind uint16) []byte {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return nil
		}
		if binary.NativeEndian.Uint16(b[2:])&attrMask == kind {
			return b[4:n]
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}
