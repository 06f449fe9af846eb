package dns

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/net/dns/dnsmessage"
)

// Limits of RFC 1035 §2.3.4 and §4.2.1.
const (
	headerLen   = 12
	maxName     = 255 // on the wire
	maxLabel    = 63
	minUDP      = 512
	maxMessage  = 65535
	noName      = 0xc0 // the two top bits of a compression pointer, §4.1.4
	questionPtr = 0xc00c
)

// ednsSize is what we say we take over UDP: a datagram of the flag-day size
// (https://www.dnsflagday.net/2020/) is never fragmented. What arrives may be
// larger.
const ednsSize = 1232

// Header bits, RFC 1035 §4.1.1, RFC 4035 §3.1.6.
const (
	bitQR     = 1 << 15
	bitAA     = 1 << 10
	bitTC     = 1 << 9
	bitRD     = 1 << 8
	bitRA     = 1 << 7
	bitCD     = 1 << 4
	opcodes   = 0xf << 11
	rcodes    = 0xf
	typeOPT   = 41
	typeSVCB  = 64
	typeHTTPS = 65
	classIN   = 1
)

var (
	errShort     = errors.New("message is shorter than a header")
	errResponse  = errors.New("message is a response")
	errMalformed = errors.New("malformed message")
)

// message is a parsed query. It points into the datagram it was read from.
type message struct {
	raw      []byte
	id       uint16
	flags    uint16
	question []byte // name, type and class on the wire
	name     []byte // lower case, dots between labels, none at the end; in buf
	plain    bool   // every label is made of letters, digits, '-', '_' or '*'
	labels   int
	qtype    dnsmessage.Type
	class    uint16

	edns    bool
	version byte   // EDNS version
	udpSize uint16 // that the client takes
	do      bool

	buf [maxName]byte
}

// parse reads a query. On errMalformed the header is valid, so that the client
// can be told; other errors deserve no answer.
func (m *message) parse(b []byte) error {
	if len(b) < headerLen {
		return errShort
	}
	m.raw = b
	m.id = binary.BigEndian.Uint16(b)
	m.flags = binary.BigEndian.Uint16(b[2:])
	m.question, m.name, m.edns, m.do, m.udpSize, m.version = nil, nil, false, false, minUDP, 0
	if m.flags&bitQR != 0 {
		return errResponse // answering it could make two servers talk for ever
	}
	if m.flags&opcodes != 0 {
		return nil // NOTIMP, whatever the rest is
	}
	// Exactly one question: RFC 9619. Answers and authorities have no place in a
	// query; a transfer's (IXFR, RFC 1995 §3) authority section is skipped.
	if binary.BigEndian.Uint16(b[4:]) != 1 {
		return errMalformed
	}
	end, ok := m.parseName(b, headerLen)
	if !ok || len(b) < end+4 {
		return errMalformed
	}
	m.question = b[headerLen : end+4]
	m.qtype = dnsmessage.Type(binary.BigEndian.Uint16(b[end:]))
	m.class = binary.BigEndian.Uint16(b[end+2:])
	records := int(binary.BigEndian.Uint16(b[6:])) + int(binary.BigEndian.Uint16(b[8:])) + int(binary.BigEndian.Uint16(b[10:]))
	return m.parseRecords(b, end+4, records)
}

// parseName reads the question's name; a compression pointer has nothing to
// point to there.
func (m *message) parseName(b []byte, at int) (end int, ok bool) {
	start := at
	out := m.buf[:0]
	m.plain, m.labels = true, 0
	for {
		if at >= len(b) {
			return 0, false
		}
		n := int(b[at])
		at++
		if n == 0 {
			break
		}
		if n > maxLabel || at+n > len(b) || at+n-start >= maxName {
			return 0, false
		}
		if m.labels > 0 {
			out = append(out, '.')
		}
		for _, c := range b[at : at+n] {
			switch {
			case 'A' <= c && c <= 'Z':
				c += 'a' - 'A'
			case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_', c == '*':
			default:
				m.plain = false // "a\.b" must not be taken for "a.b"
			}
			out = append(out, c)
		}
		at += n
		m.labels++
	}
	m.name = out
	return at, true
}

// parseRecords looks for the OPT record and walks over the others. Each costs at
// least eleven bytes, so the datagram bounds the loop.
func (m *message) parseRecords(b []byte, at, records int) error {
	for range records {
		next, ok := skipName(b, at)
		if !ok || len(b) < next+10 {
			return errMalformed
		}
		kind, class := binary.BigEndian.Uint16(b[next:]), binary.BigEndian.Uint16(b[next+2:])
		n := int(binary.BigEndian.Uint16(b[next+8:]))
		if len(b) < next+10+n {
			return errMalformed
		}
		if kind == typeOPT {
			if m.edns || b[at] != 0 { // RFC 6891 §6.1.1: one, of the root
				return errMalformed
			}
			m.edns = true
			m.udpSize = max(class, minUDP)
			m.version = b[next+5]
			m.do = b[next+6]&0x80 != 0
		}
		at = next + 10 + n
	}
	return nil
}

// skipName returns where a name ends that may be compressed.
func skipName(b []byte, at int) (int, bool) {
	for at < len(b) {
		switch n := int(b[at]); {
		case n == 0:
			return at + 1, true
		case n >= noName:
			return at + 2, at+2 <= len(b)
		case n > maxLabel:
			return 0, false
		default:
			at += 1 + n
		}
	}
	return 0, false
}

// limit is how long an answer over UDP may be.
func (m *message) limit() int { return int(m.udpSize) }

// writer appends an answer to out. A record that does not fit sets TC and ends
// the message (RFC 2181 §9: nothing but whole record sets is promised, and who
// sees TC asks again over TCP).
type writer struct {
	out   []byte
	base  int // where the message begins in out
	limit int
	ttl   uint32
	full  bool
}

// start writes header and question.
func (w *writer) start(m *message, rcode dnsmessage.RCode, authoritative bool) {
	flags := uint16(bitQR|bitRA) | m.flags&(opcodes|bitRD|bitCD) | uint16(rcode)&rcodes
	if authoritative {
		flags |= bitAA
	}
	w.base = len(w.out)
	w.out = binary.BigEndian.AppendUint16(w.out, m.id)
	w.out = binary.BigEndian.AppendUint16(w.out, flags)
	questions := uint16(0)
	if m.question != nil {
		questions = 1
	}
	w.out = binary.BigEndian.AppendUint16(w.out, questions)
	w.out = append(w.out, 0, 0, 0, 0, 0, 0)
	w.out = append(w.out, m.question...)
	if m.edns {
		w.limit -= optLen
	}
}

const optLen = 11

// finish appends the OPT record: RFC 6891 §6.1.1 wants one back.
func (w *writer) finish(m *message) {
	if !m.edns {
		return
	}
	w.limit += optLen
	var flags uint16
	if m.do {
		flags = 1 << 15
	}
	w.out = append(w.out, 0, 0, typeOPT)
	w.out = binary.BigEndian.AppendUint16(w.out, ednsSize)
	w.out = append(w.out, 0, 0)
	w.out = binary.BigEndian.AppendUint16(w.out, flags)
	w.out = append(w.out, 0, 0)
	w.count(10)
}

// count adds one record to the section whose counter is at off.
func (w *writer) count(off int) {
	p := w.out[w.base+off:]
	binary.BigEndian.PutUint16(p, binary.BigEndian.Uint16(p)+1)
}

// record appends a record whose data add writes, in the section counted at off.
func (w *writer) record(off int, owner []byte, kind dnsmessage.Type, ttl uint32, add func([]byte) []byte) {
	if w.full {
		return
	}
	mark := len(w.out)
	w.out = append(w.out, owner...)
	w.out = binary.BigEndian.AppendUint16(w.out, uint16(kind))
	w.out = binary.BigEndian.AppendUint16(w.out, classIN)
	w.out = binary.BigEndian.AppendUint32(w.out, ttl)
	size := len(w.out)
	w.out = append(w.out, 0, 0)
	w.out = add(w.out)
	binary.BigEndian.PutUint16(w.out[size:], uint16(len(w.out)-size-2))
	if len(w.out)-w.base > w.limit {
		w.out = w.out[:mark]
		w.full = true
		if off == sectionAnswer {
			w.truncated()
		}
		return
	}
	w.count(off)
}

func (w *writer) truncated() {
	w.out[w.base+2] |= bitTC >> 8
}

// Offsets of the sections' counters in the header.
const (
	sectionAnswer     = 6
	sectionAuthority  = 8
	sectionAdditional = 10
)

var theQuestion = []byte{questionPtr >> 8, questionPtr & 0xff}

func (w *writer) address(section int, owner []byte, a netip.Addr) {
	if a.Is4() {
		b := a.As4()
		w.record(section, owner, dnsmessage.TypeA, w.ttl, func(out []byte) []byte { return append(out, b[:]...) })
		return
	}
	b := a.As16()
	w.record(section, owner, dnsmessage.TypeAAAA, w.ttl, func(out []byte) []byte { return append(out, b[:]...) })
}

// appendName appends a name of dot-separated labels, uncompressed. The caller
// knows that it is a valid one.
func appendName(out, name []byte) []byte {
	for len(name) > 0 {
		label := name
		for i, c := range name {
			if c == '.' {
				label = name[:i]
				break
			}
		}
		out = append(append(out, byte(len(label))), label...)
		name = name[min(len(label)+1, len(name)):]
	}
	return append(out, 0)
}

// validName reports whether a name from the control plane fits the wire.
func validName(name string) bool {
	if len(name) == 0 || len(name)+2 > maxName {
		return false
	}
	label := 0
	for i := range len(name) {
		if name[i] != '.' {
			if label++; label > maxLabel {
				return false
			}
			continue
		}
		if label == 0 {
			return false
		}
		label = 0
	}
	return label > 0
}
