package wire

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// snap is how much of a packet is looked at: headers with many extensions.
const snap = 256

const (
	loopback = 1 // the index of lo in every namespace
	syn, ack = 0x02, 0x10
)

// filter lets pass what may be a SYN: IPv4 and IPv6 packets, not on loopback. Those
// with IPv6 extension headers are left to parse.
var filter = []bpf.Instruction{
	0:  bpf.LoadExtension{Num: bpf.ExtInterfaceIndex},
	1:  bpf.JumpIf{Cond: bpf.JumpEqual, Val: loopback, SkipTrue: 18},
	2:  bpf.LoadAbsolute{Off: 0, Size: 1},
	3:  bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 4},
	4:  bpf.JumpIf{Cond: bpf.JumpEqual, Val: 6, SkipTrue: 8},
	5:  bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 4, SkipTrue: 14},
	6:  bpf.LoadAbsolute{Off: 9, Size: 1},
	7:  bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_TCP, SkipTrue: 12},
	8:  bpf.LoadMemShift{Off: 0},
	9:  bpf.LoadIndirect{Off: 13, Size: 1},
	10: bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: syn | ack},
	11: bpf.JumpIf{Cond: bpf.JumpEqual, Val: syn, SkipTrue: 7},
	12: bpf.RetConstant{Val: 0},
	13: bpf.LoadAbsolute{Off: 6, Size: 1},
	14: bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipTrue: 1},
	15: bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 3, SkipFalse: 4},
	16: bpf.LoadAbsolute{Off: 40 + 13, Size: 1},
	17: bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: syn | ack},
	18: bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: syn, SkipTrue: 1},
	19: bpf.RetConstant{Val: snap},
	20: bpf.RetConstant{Val: 0},
}

// parse reads the addresses of a SYN; ok is false for every other packet.
func parse(p []byte) (src netip.Addr, dst netip.AddrPort, ok bool) {
	if len(p) < 20 {
		return src, dst, false
	}
	var to netip.Addr
	var tcp []byte
	switch p[0] >> 4 {
	case 4: // RFC 791 §3.1
		header := int(p[0]&15) * 4
		if p[9] != unix.IPPROTO_TCP || header < 20 || len(p) < header || binary.BigEndian.Uint16(p[6:])&0x1fff != 0 {
			return src, dst, false
		}
		src, to, tcp = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[header:]
	case 6: // RFC 8200 §3
		if len(p) < 40 {
			return src, dst, false
		}
		src, to, tcp = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), afterExtensions(p[6], p[40:])
	default:
		return src, dst, false
	}
	if len(tcp) < 14 || tcp[13]&(syn|ack) != syn {
		return src, dst, false
	}
	return src, netip.AddrPortFrom(to, binary.BigEndian.Uint16(tcp[2:])), true
}

// afterExtensions skips IPv6 extension headers (RFC 8200 §4) and returns the TCP
// header, or nil.
func afterExtensions(next byte, p []byte) []byte {
	for {
		size := 0
		switch next {
		case unix.IPPROTO_TCP:
			return p
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(p) < 2 {
				return nil
			}
			size = int(p[1])*8 + 8
		case unix.IPPROTO_FRAGMENT:
			if len(p) < 4 || binary.BigEndian.Uint16(p[2:])&0xfff8 != 0 {
				return nil
			}
			size = 8
		default:
			return nil
		}
		if len(p) < size {
			return nil
		}
		next, p = p[0], p[size:]
	}
}
