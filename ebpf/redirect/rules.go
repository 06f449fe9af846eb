package redirect

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// chain is a base chain and its rules as data, in the order packets meet them.
type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	rules    []rule
}

// rule is one rule with the comment `nft list` prints beside it.
type rule struct {
	comment string
	exprs   []expr.Any
}

// chains returns a pod's rules. Without capture those remain that established
// connections need: their marks, and chains without rules, since the kernel
// translates addresses only while there is a chain of that type.
func (d *Dataplane) chains(r PodRules, proxies []cgroupMatch, capture bool) []chain {
	const remember = "proxy to app over lo: remember the connection"
	prerouting := []rule{{remember, join(mark(expr.CmpOpEq, MarkProxy), setCtMark(MarkReturn))}}
	output := []rule{{"app's replies to the proxy stay on lo", join(ctMark(MarkReturn), restoreMark())}}
	if len(proxies) > 0 {
		// A packet over lo arrives without its socket: it is asked where it leaves.
		prerouting = nil
		output = append(output, byProxy(proxies, remember, join(oif(expr.CmpOpEq, "lo"), original()), setCtMark(MarkReturn))...)
	}
	chains := []chain{
		{
			name: "mangle_prerouting", kind: nftables.ChainTypeFilter,
			hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityMangle,
			rules: prerouting,
		},
		{
			// A route chain looks the route up again when the mark has changed.
			name: chainMangleOutput, kind: nftables.ChainTypeRoute,
			hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityMangle,
			rules: output,
		},
	}
	if !capture {
		return append(chains, natPrerouting(nil), natOutput(nil))
	}
	if r.DNS {
		chains = append(chains, dnsZone(proxies)...)
	}
	if !r.BypassInbound {
		chains = append(chains, natPrerouting(d.inbound(r, proxies)))
	}
	return append(chains, natOutput(d.outbound(r, proxies)))
}

const chainMangleOutput = "mangle_output"

func natPrerouting(rules []rule) chain {
	return chain{
		name: "nat_prerouting", kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityNATDest,
		rules: rules,
	}
}

func natOutput(rules []rule) chain {
	return chain{
		name: "nat_output", kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityNATDest,
		rules: rules,
	}
}

func (d *Dataplane) inbound(r PodRules, proxies []cgroupMatch) []rule {
	proxy := rule{"proxy", join(mark(expr.CmpOpEq, MarkProxy), accept())}
	if len(proxies) > 0 {
		proxy.exprs = join(ctMark(MarkReturn), accept())
	}
	rules := []rule{
		{"only TCP", join(l4proto(expr.CmpOpNeq, unix.IPPROTO_TCP), accept())},
		older(),
		{"node's probes (IPv4)", join(source(d.cfg.ProbeV4), accept())},
		{"node's probes (IPv6)", join(source(d.cfg.ProbeV6), accept())},
		proxy,
		{"loopback (IPv4)", join(destination(loopbackV4), accept())},
		{"loopback (IPv6)", join(destination(loopbackV6), accept())},
		{"HBONE has its own listener", join(destPort(PortHBONE), accept())},
	}
	return append(append(rules, excluded(r.ExcludeInbound)...), rule{"plaintext", redirectTo(PortInbound)})
}

// excluded lets connections to ports pass as if there was no mesh.
func excluded(ports Ports) (rules []rule) {
	for _, r := range ports.Ranges() {
		rules = append(rules, rule{"excluded: " + r.String(), join(destPorts(r), accept())})
	}
	return rules
}

// older lets connections go on that are older than the rules. Before the first
// rules of a namespace conntrack is off there; then whatever packet comes first
// is to it the beginning of a connection, which these chains see and would
// redirect. Only a SYN begins one. It needs a rule before it that lets only TCP
// through.
func older() rule {
	return rule{"older connections", join([]expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1}, // RFC 9293 §3.1
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{tcpFIN | tcpSYN | tcpRST | tcpACK}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{tcpSYN}},
	}, accept())}
}

const (
	tcpFIN = 1 << iota
	tcpSYN
	tcpRST
	_
	tcpACK
)

var (
	loopbackV4 = netip.MustParsePrefix("127.0.0.0/8")
	loopbackV6 = netip.MustParsePrefix("::1/128")
)

// The expressions below are nftables' register programs: load into register 1,
// mask, compare; a comparison that fails ends the rule.

func join(parts ...[]expr.Any) []expr.Any {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func mark(op expr.CmpOp, value uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		masked(binaryutil.NativeEndian.PutUint32(MarkMask)),
		&expr.Cmp{Op: op, Register: 1, Data: binaryutil.NativeEndian.PutUint32(value)},
	}
}

func ctMark(value uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		masked(binaryutil.NativeEndian.PutUint32(MarkMask)),
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(value)},
	}
}

func setCtMark(value uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(^uint32(MarkMask)),
			Xor:  binaryutil.NativeEndian.PutUint32(value),
		},
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true},
	}
}

func restoreMark() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
	}
}

func masked(mask []byte) expr.Any {
	return &expr.Bitwise{
		SourceRegister: 1, DestRegister: 1, Len: uint32(len(mask)),
		Mask: mask, Xor: make([]byte, len(mask)),
	}
}

func l4proto(op expr.CmpOp, proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: []byte{proto}},
	}
}

func oif(op expr.CmpOp, name string) []expr.Any {
	return device(expr.MetaKeyOIFNAME, op, name)
}

func iif(op expr.CmpOp, name string) []expr.Any {
	return device(expr.MetaKeyIIFNAME, op, name)
}

func device(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: data},
	}
}

// destPort needs a rule before it that lets only protocols with ports through.
func destPort(port uint16) []expr.Any { return portAt(2, port) }

// destPorts is destPort for a range of them.
func destPorts(r PortRange) []expr.Any {
	if r.First == r.Last {
		return destPort(r.First)
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: binaryutil.BigEndian.PutUint16(r.First), ToData: binaryutil.BigEndian.PutUint16(r.Last)},
	}
}

func sourcePort(port uint16) []expr.Any { return portAt(0, port) }

func portAt(offset uint32, port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	}
}

func source(a netip.Addr) []expr.Any {
	if a.Is4() {
		return address(netip.PrefixFrom(a, 32), 12) // RFC 791 §3.1
	}
	return address(netip.PrefixFrom(a, 128), 8) // RFC 8200 §3
}

func destination(p netip.Prefix) []expr.Any {
	if p.Addr().Is4() {
		return address(p, 16)
	}
	return address(p, 24)
}

func address(p netip.Prefix, offset uint32) []expr.Any {
	data := p.Addr().AsSlice()
	family := byte(unix.NFPROTO_IPV4)
	if p.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	exprs := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(data))},
	}
	if p.Bits() < p.Addr().BitLen() {
		mask := make([]byte, len(data))
		for i := range p.Bits() {
			mask[i/8] |= 0x80 >> (i % 8)
		}
		exprs = append(exprs, masked(mask))
	}
	return append(exprs, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data})
}

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }

func redirectTo(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		// The kernel fills in the maximum and the flag; given here they read back equal.
		&expr.Redir{RegisterProtoMin: 1, RegisterProtoMax: 1, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED},
	}
}
