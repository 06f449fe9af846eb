package dns

import (
	"encoding/binary"
	"net/netip"
	"testing"

	mdns "github.com/miekg/dns"
	"golang.org/x/net/dns/dnsmessage"
)

// FuzzQuery: no query makes the server panic, allocate without bound, or send
// what a client cannot read.
func FuzzQuery(f *testing.F) {
	for _, name := range []string{"web.shop.svc.cluster.local.", "_pg._tcp.db.shop.svc.cluster.local.", "api.example.com.shop.svc.cluster.local.", "db-0.db.", "."} {
		for _, t := range []uint16{mdns.TypeA, mdns.TypeAAAA, mdns.TypeSRV, mdns.TypeANY, mdns.TypeHTTPS} {
			q := new(mdns.Msg)
			q.SetQuestion(name, t)
			if t != mdns.TypeA {
				q.SetEdns0(1232, true)
			}
			b, err := q.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	f.Add([]byte{0, 7, 0x20, 0, 0, 1, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 0x0c, 0, 1, 0, 1})
	srv := fixedServer()
	f.Fuzz(func(t *testing.T, b []byte) {
		var m message
		var a answer
		v, out := srv.datagram(b, &m, &a, nil)
		if out == nil {
			if v == refuse || v == ours {
				t.Fatalf("verdict %d without an answer", v)
			}
			return
		}
		if len(out) > max(int(m.udpSize), minUDP) {
			t.Fatalf("%d bytes to a client that takes %d", len(out), m.udpSize)
		}
		r := new(mdns.Msg)
		if err := r.Unpack(out); err != nil {
			t.Fatalf("the answer %x to %x is broken: %v", out, b, err)
		}
		if !r.Response || r.Id != binary.BigEndian.Uint16(b) {
			t.Fatalf("the answer %v is to nobody", r)
		}
		// The parser agrees with another one about what was asked.
		var p dnsmessage.Parser
		if _, err := p.Start(b); err == nil && v == ours {
			q, err := p.Question()
			if err != nil || q.Type != m.qtype {
				t.Fatalf("asked for %v, %v, answered %v", q, err, m.qtype)
			}
		}
	})
}

// FuzzAnswers: what an upstream sends is judged without a panic, and never
// accepted for another question.
func FuzzAnswers(f *testing.F) {
	q := []byte("\x03www\x04test\x00\x00\x01\x00\x01")
	f.Add(append([]byte{0, 7, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0}, q...), uint16(7))
	f.Add([]byte{0, 7, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0}, uint16(7))
	f.Fuzz(func(t *testing.T, b []byte, id uint16) {
		if answers(b, id, q) && (binary.BigEndian.Uint16(b) != id || b[2]&0x80 == 0) {
			t.Fatalf("%x was accepted for id %d", b, id)
		}
	})
}

// FuzzEntry: connection tracking's answers are the kernel's, and still bounded.
func FuzzEntry(f *testing.F) {
	f.Add(appendGet(nil, 1, client, theProxy))
	f.Add(appendGet(nil, 1, netip.MustParseAddrPort("[fd00::2]:4000"), netip.MustParseAddrPort("[::1]:15053")))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _, _ = parseEntry(b) })
}

func TestParseEntry(t *testing.T) {
	for _, tc := range [][2]string{{"10.8.0.2:40000", "10.9.0.1:53"}, {"[fd00::2]:40000", "[fd00::53]:53"}} {
		from, to := netip.MustParseAddrPort(tc[0]), netip.MustParseAddrPort(tc[1])
		// A request for the reply direction to→from, turned into the entry whose
		// original direction has destination from.
		b := appendGet(nil, 9, from, to)
		binary.NativeEndian.PutUint16(b[4:], ctMsgNew)
		binary.NativeEndian.PutUint16(b[22:], ctaTupleOrig) // after header, family and the length
		if got, seq, err := parseEntry(b); got != from || seq != 9 || err != nil {
			t.Errorf("%v, %d, %v, want %v", got, seq, err, from)
		}
	}
	none := make([]byte, 20)
	binary.NativeEndian.PutUint32(none, 20)
	binary.NativeEndian.PutUint16(none[4:], 2) // NLMSG_ERROR
	enoent := int32(-2)
	binary.NativeEndian.PutUint32(none[16:], uint32(enoent))
	if _, _, err := parseEntry(none); err != ErrNotTracked {
		t.Errorf("no entry: %v", err)
	}
}

// TestTwoOptionRecordsAreMalformed: RFC 6891 §6.1.1.
func TestTwoOptionRecordsAreMalformed(t *testing.T) {
	question := []byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 'a', 0, 0, 1, 0, 1}
	opt := []byte{0, 0, typeOPT, 4, 208, 0, 0, 0, 0, 0, 0}
	var m message
	if err := m.parse(append(question, opt...)); err != nil || !m.edns {
		t.Fatalf("one record: %v", err)
	}
	question[11] = 2
	if err := m.parse(append(append(question, opt...), opt...)); err != errMalformed {
		t.Errorf("two records: %v, want %v", err, errMalformed)
	}
}
