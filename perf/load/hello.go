package load

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Agreed is what a server chose in a TLS handshake.
type Agreed struct {
	Server netip.AddrPort `json:"server"`
	Client netip.Addr     `json:"client"`
	Suite  string         `json:"suite"`
	Group  string         `json:"group"` // key exchange; "" when the message names none
}

func (a Agreed) String() string { return a.Suite + ", " + a.Group }

// Hellos watches all interfaces of the network namespace and writes what each
// server agrees to, one line of JSON per handshake, until ctx ends. ServerHello is
// the one message of TLS 1.3 that says it in clear text, whoever the peers are.
func Hellos(ctx context.Context, out io.Writer) error {
	prog, err := bpf.Assemble(helloFilter)
	if err != nil {
		return fmt.Errorf("assemble filter: %w", err)
	}
	var raw []unix.SockFilter
	for _, i := range prog {
		raw = append(raw, unix.SockFilter{Code: i.Op, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // receives nothing before it is bound
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(raw)), Filter: &raw[0]}); err != nil {
		return os.NewSyscallError("attach filter", err)
	}
	all := uint16(unix.ETH_P_ALL)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all<<8 | all>>8}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	enc := json.NewEncoder(out)
	if err := enc.Encode(Started{PID: os.Getpid()}); err != nil {
		return err
	}
	b := make([]byte, 64<<10)
	for ctx.Err() == nil {
		n, _, err := unix.Recvfrom(fd, b, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("recvfrom", err)
		}
		if a, ok := serverHello(b[:n]); ok {
			if err := enc.Encode(a); err != nil {
				return err
			}
		}
	}
	return nil
}

// helloFilter lets pass TCP segments whose payload starts with a handshake record
// that starts with a ServerHello. Of IPv6 it knows packets without extension
// headers: TCP between pods and nodes has none.
var helloFilter = []bpf.Instruction{
	0: bpf.LoadAbsolute{Off: 0, Size: 1},
	1: bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 4},
	2: bpf.JumpIf{Cond: bpf.JumpEqual, Val: 6, SkipTrue: 5},
	3: bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 4, SkipTrue: 17},
	4: bpf.LoadAbsolute{Off: 9, Size: 1},
	5: bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_TCP, SkipTrue: 15},
	6: bpf.LoadMemShift{Off: 0}, // length of the IPv4 header
	7: bpf.Jump{Skip: 3},

	8:  bpf.LoadAbsolute{Off: 6, Size: 1},
	9:  bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_TCP, SkipTrue: 11},
	10: bpf.LoadConstant{Dst: bpf.RegX, Val: ipv6Header},

	11: bpf.LoadIndirect{Off: 12, Size: 1}, // data offset in the upper half: words of 4 bytes
	12: bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0xf0},
	13: bpf.ALUOpConstant{Op: bpf.ALUOpShiftRight, Val: 2},
	14: bpf.ALUOpX{Op: bpf.ALUOpAdd},
	15: bpf.TAX{},
	16: bpf.LoadIndirect{Off: 0, Size: 1},
	17: bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: recordHandshake, SkipTrue: 3},
	18: bpf.LoadIndirect{Off: 5, Size: 1},
	19: bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: typeServerHello, SkipTrue: 1},
	20: bpf.RetConstant{Val: 4096},
	21: bpf.RetConstant{Val: 0},
}

const ipv6Header = 40 // RFC 8200 §3

const (
	recordHandshake = 22 // RFC 8446 §5.1
	legacyVersion   = 0x0303
	typeServerHello = 2  // RFC 8446 §4
	extKeyShare     = 51 // RFC 8446 §4.2
)

// segment is the TCP part of a packet, and the addresses of its sender and receiver.
func segment(p []byte) (from, to netip.Addr, tcp []byte, ok bool) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		header := int(p[0]&15) * 4
		if header < 20 || len(p) < header || p[9] != unix.IPPROTO_TCP {
			return from, to, nil, false
		}
		from, to, tcp = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[header:]
	case len(p) >= ipv6Header && p[0]>>4 == 6 && p[6] == unix.IPPROTO_TCP:
		from, to, tcp = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), p[ipv6Header:]
	}
	return from, to, tcp, len(tcp) >= 20
}

// serverHello reads a packet whose TCP payload starts with one. The packet comes
// from the network: nothing in it is believed about lengths.
func serverHello(p []byte) (a Agreed, ok bool) {
	from, to, tcp, ok := segment(p)
	if !ok {
		return a, false
	}
	a.Server, a.Client = netip.AddrPortFrom(from, binary.BigEndian.Uint16(tcp)), to
	offset := int(tcp[12]>>4) * 4
	if offset < 20 || len(tcp) < offset {
		return a, false
	}
	r := reader{tcp[offset:]}
	if r.byte() != recordHandshake {
		return a, false
	}
	version := r.short()
	r.skip(2) // length of the record
	if r.byte() != typeServerHello || version != legacyVersion {
		return a, false
	}
	r.skip(3) // length
	if r.short() != legacyVersion {
		return a, false
	}
	r.skip(32)            // random (RFC 8446 §4.1.3)
	r.skip(int(r.byte())) // session id
	suite := r.short()
	r.skip(1) // compression
	ext := r.take(int(r.short()))
	if r.b == nil || !known(suite) {
		return a, false
	}
	a.Suite = tls.CipherSuiteName(suite)
	for len(ext.b) > 0 {
		kind := ext.short()
		body := ext.take(int(ext.short()))
		if kind == extKeyShare && len(body.b) >= 2 {
			a.Group = tls.CurveID(body.short()).String()
		}
	}
	return a, true
}

// known suites are those that a server may choose. Some packet in a stream of
// encrypted bytes begins as a ServerHello does, too.
func known(suite uint16) bool {
	return slices.ContainsFunc(slices.Concat(tls.CipherSuites(), tls.InsecureCipherSuites()), func(s *tls.CipherSuite) bool { return s.ID == suite })
}

// reader takes bytes off the front; when there are too few, b becomes nil and
// everything read from then on is zero.
type reader struct{ b []byte }

func (r *reader) take(n int) reader {
	if n > len(r.b) || r.b == nil {
		r.b = nil
		return reader{}
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return reader{out}
}

func (r *reader) skip(n int) { r.take(n) }

func (r *reader) byte() byte {
	if t := r.take(1); len(t.b) == 1 {
		return t.b[0]
	}
	return 0
}

func (r *reader) short() uint16 {
	if t := r.take(2); len(t.b) == 2 {
		return binary.BigEndian.Uint16(t.b)
	}
	return 0
}
