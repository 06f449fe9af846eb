package mesh

import (
	"net/netip"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// The fields of an address that are read without decoding it, and of the workload in it those that replicas differ in.
const (
	fieldWorkload = 1

	fieldName, fieldAddresses, fieldNode, fieldWorkloadName, fieldUID = 1, 3, 9, 13, 20
)

// replicas remembers which bytes became which traits: what a workload says besides its names, addresses and node is
// what the one before said, and need not be decoded to be known.
//
// The bytes themselves are the key, not a sum of them: traits are an identity, and two workloads that share one by chance
// or by somebody's design would be a hole in every policy.
type replicas struct {
	known map[string]*Traits
	held  int               // bytes of known's keys
	names map[string]string // of nodes, and of what made workloads
	rest  []byte            // for one at a time
}

// rememberedBytes bounds what is kept of them: a workload says some 200 bytes besides its own.
const rememberedBytes = 2 << 20

// own is what a workload says for itself alone, in its encoding.
type own struct{ uid, name, node, workload []byte }

// split reads an encoded address that is a workload: what it says for itself, and whether it was understood. Its
// addresses go to w, and what is left to n.rest.
func (n *replicas) split(b []byte, w *withAddr) (o own, ok bool) {
	num, typ, k := protowire.ConsumeTag(b)
	if k < 0 || num != fieldWorkload || typ != protowire.BytesType {
		return o, false
	}
	in, l := protowire.ConsumeBytes(b[k:])
	if l < 0 || k+l != len(b) { // one more could be another workload, or a service, that counts instead
		return o, false
	}
	n.rest = n.rest[:0]
	for len(in) > 0 {
		num, typ, k := protowire.ConsumeTag(in)
		if k < 0 {
			return o, false
		}
		l := protowire.ConsumeFieldValue(num, typ, in[k:])
		if l < 0 {
			return o, false
		}
		field := in[:k+l]
		in = in[k+l:]
		switch num {
		case fieldName, fieldAddresses, fieldNode, fieldWorkloadName, fieldUID:
		default:
			n.rest = append(n.rest, field...)
			continue
		}
		if typ != protowire.BytesType {
			return o, false
		}
		v, _ := protowire.ConsumeBytes(field[k:])
		switch num {
		case fieldName:
			o.name, ok = v, utf8.Valid(v)
		case fieldNode:
			o.node, ok = v, utf8.Valid(v)
		case fieldWorkloadName:
			o.workload, ok = v, utf8.Valid(v)
		case fieldUID:
			o.uid, ok = v, utf8.Valid(v) && len(v) > 0
		case fieldAddresses:
			var a netip.Addr
			a, ok = netip.AddrFromSlice(v)
			w.add(a.Unmap())
		}
		if !ok {
			return o, false
		}
	}
	return o, len(o.uid) > 0
}

// Replica is the workload that b is, an encoded address, if a replica of it is remembered; else nil, and b is to be
// decoded. The workload's uid is name itself where they are equal.
func (n *Interner) Replica(b []byte, name string) *Workload {
	if len(n.of.known) == 0 {
		return nil
	}
	of := &withAddr{}
	o, ok := n.of.split(b, of)
	if !ok {
		return nil
	}
	t := n.of.known[string(n.of.rest)]
	if t == nil {
		return nil
	}
	w := &of.Workload
	if w.UID = name; string(o.uid) != name {
		w.UID = string(o.uid)
	}
	if w.Name = end(w.UID, o.name); w.Name == "" {
		w.Name = string(o.name)
	}
	if w.WorkloadName = end(w.UID, o.workload); w.WorkloadName == "" {
		w.WorkloadName = n.of.name(o.workload)
	}
	w.Node, w.Traits = n.of.name(o.node), t
	return w
}

// end is b as the end of s, "" where it is not.
func end(s string, b []byte) string {
	if at := len(s) - len(b); at >= 0 && s[at:] == string(b) {
		return s[at:]
	}
	return ""
}

// name is b, which many say.
func (n *replicas) name(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	s, have := n.names[string(b)]
	if !have {
		s = intern(string(b))
		if n.names == nil || len(n.names) >= remembered {
			n.names = map[string]string{}
		}
		n.names[s] = s
	}
	return s
}

// Remember has Replica know w's traits by what they were decoded from.
func (n *Interner) Remember(b []byte, w *Workload) {
	if _, ok := n.of.split(b, &withAddr{}); !ok || len(w.DNSNames) > 0 { // no replica has the same names
		return
	}
	n.of.remember(w.Traits)
}

func (n *replicas) remember(t *Traits) {
	if n.known == nil || len(n.known) >= remembered || n.held+len(n.rest) > rememberedBytes {
		n.known, n.held = map[string]*Traits{}, 0
	}
	if len(n.rest) > rememberedBytes {
		return
	}
	if _, have := n.known[string(n.rest)]; !have {
		n.held += len(n.rest)
	}
	n.known[string(n.rest)] = t
}

// withAddr is a workload with room for its address: one is the rule.
type withAddr struct {
	Workload
	addr [1]netip.Addr
}

func (w *withAddr) add(a netip.Addr) {
	if w.Addrs == nil {
		w.Addrs = w.addr[:0]
	}
	w.Addrs = append(w.Addrs, a)
}
