package sockopt

import (
	"encoding/binary"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A socket for datagrams that is bound to no address tells where each of them was sent to, and sends each answer from
// there: IP_PKTINFO in ip(7), IPV6_PKTINFO in ipv6(7) and RFC 3542 §6.

// SetPacketInfo makes a socket tell the destinations of datagrams.
func SetPacketInfo(fd int, v6 bool) error {
	if v6 {
		return os.NewSyscallError("setsockopt IPV6_RECVPKTINFO", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1))
	}
	return os.NewSyscallError("setsockopt IP_PKTINFO", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_PKTINFO, 1))
}

// PacketInfoLen has room for one such message of either family.
const PacketInfoLen = 40 // header of 16, IPv6's 20, padded to 8

// PacketDestination is what a datagram that came with oob was sent to, invalid if oob does not tell.
func PacketDestination(oob []byte) netip.Addr {
	for len(oob) > 0 {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		switch {
		case err != nil:
			return netip.Addr{}
		case h.Level == unix.SOL_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			return netip.AddrFrom4([4]byte(data[8:])) // ipi_addr, of the header
		case h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			return netip.AddrFrom16([16]byte(data)).Unmap()
		}
		oob = rest
	}
	return netip.Addr{}
}

// AppendPacketSource appends the message that sends a datagram from an address.
func AppendPacketSource(b []byte, from netip.Addr) []byte {
	level, kind, size := int32(unix.SOL_IP), int32(unix.IP_PKTINFO), unix.SizeofInet4Pktinfo
	if from.Is6() {
		level, kind, size = unix.SOL_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo
	}
	start := len(b)
	b = append(b, packetInfoRoom[:unix.CmsgSpace(size)]...) // interface 0: the kernel routes
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[start]))
	h.Level, h.Type = level, kind
	h.SetLen(unix.CmsgLen(size))
	data := b[start+unix.CmsgLen(0):]
	if from.Is6() {
		a := from.As16()
		copy(data, a[:])
	} else {
		a := from.As4()
		copy(data[4:], a[:]) // ipi_spec_dst
	}
	return b
}

var packetInfoRoom [PacketInfoLen]byte

// Addresses that stand for captured destinations inside a pod, ALIAS4 and ALIAS6 in ebpf/bpf/maps.h: there is but one
// IPv6 loopback address.
var (
	aliases4 = netip.MustParsePrefix("127.64.0.0/10")
	aliases6 = netip.MustParsePrefix("fd16:9254:7127:a15a::/96")
)

// StandsForAnother reports whether dst is such an address. A socket of the proxy that is connected to it reaches whom
// it stands for.
func StandsForAnother(dst netip.Addr) bool { return aliases4.Contains(dst) || aliases6.Contains(dst) }

// ForOwnPod reports whether a datagram to dst can have come from the pod itself alone, provided that it came over lo.
func ForOwnPod(dst netip.Addr) bool { return dst.IsLoopback() || aliases6.Contains(dst) }

// SetOwnPodOnly has the kernel drop what did not come over lo to a loopback address or one that stands for a captured
// destination. A socket that is bound to no address must not hear the network, whose queries would be answered and
// whose flood would push out the pod's. The program is one of linux/filter.h, which needs no privilege.
func SetOwnPodOnly(fd int, v6 bool) error {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
		all   = 0xffffffff

		network = 0xfff00000           // SKF_NET_OFF, from the network header
		ifindex = 0xfffff000 + 8       // SKF_AD_OFF + SKF_AD_IFINDEX
		lo      = 1                    // in every namespace
		dst4    = network + 16         // RFC 791 §3.1
		dst6    = network + uint32(24) // RFC 8200 §3
	)
	program := []unix.SockFilter{
		{Code: load, K: ifindex},
		{Code: equal, K: lo, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: dst4},
		{Code: equal, K: 127, Jf: 1},
		{Code: ret, K: all},
		{Code: ret, K: 0},
	}
	if v6 {
		a := aliases6.Addr().As16()
		word := func(i int) uint32 { return binary.BigEndian.Uint32(a[4*i:]) }
		program = []unix.SockFilter{
			{Code: load, K: ifindex},
			{Code: equal, K: lo, Jf: 14},
			{Code: load, K: dst6},
			{Code: equal, K: word(0), Jf: 4},
			{Code: load, K: dst6 + 4},
			{Code: equal, K: word(1), Jf: 10},
			{Code: load, K: dst6 + 8},
			{Code: equal, K: word(2), Jt: 7, Jf: 8},
			{Code: equal, K: 0, Jf: 7}, // ::1
			{Code: load, K: dst6 + 4},
			{Code: equal, K: 0, Jf: 5},
			{Code: load, K: dst6 + 8},
			{Code: equal, K: 0, Jf: 3},
			{Code: load, K: dst6 + 12},
			{Code: equal, K: 1, Jf: 1},
			{Code: ret, K: all},
			{Code: ret, K: 0},
		}
	}
	f := unix.SockFprog{Len: uint16(len(program)), Filter: unsafe.SliceData(program)}
	return os.NewSyscallError("setsockopt SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &f))
}
