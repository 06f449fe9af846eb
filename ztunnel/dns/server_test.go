package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

func inBubble(t *testing.T, f func(t *testing.T, b *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newBench(t, ledger.DefaultLimits())) })
}

// TestForwardedBytes: the question leaves and the answer comes back as they are,
// but for the id.
func TestForwardedBytes(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		q := question("WWW.foreign.test.", mdns.TypeTXT, 7)
		q.SetEdns0(4096, true)
		q.IsEdns0().Option = append(q.IsEdns0().Option, &mdns.EDNS0_LOCAL{Code: 65001, Data: []byte("opaque")})
		q.CheckingDisabled, q.AuthenticatedData = true, true
		raw := packed(t, q)
		b.send(raw)
		up := <-b.dialled
		got := <-up.udp.outc
		if up.server != asked || up.network != "udp" || !bytes.Equal(got.b[2:], raw[2:]) {
			t.Fatalf("asked %v over %s for %x, want %x", up.server, up.network, got.b, raw)
		}
		// An answer that no library made: unknown bits, 4 KiB, garbage behind.
		answer := append(slices.Clone(got.b), bytes.Repeat([]byte{0xfe}, 4096-len(got.b))...)
		answer[2], answer[3] = 0x80|0x02, 0x73 // TC, Z, AD, NXDOMAIN
		up.udp.inc <- packet{b: answer}
		out := <-b.sock.outc
		binary.BigEndian.PutUint16(answer, 7)
		if out.peer != client || !bytes.Equal(out.b, answer) {
			t.Errorf("the answer went to %v, %d bytes, changed=%t", out.peer, len(out.b), !bytes.Equal(out.b, answer))
		}
	})
}

// TestForgedAnswers: only the answer with our id to our question counts.
func TestForgedAnswers(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		b.send(packed(t, question("www.foreign.test.", mdns.TypeA, 7)))
		up := <-b.dialled
		q := unpacked(t, (<-up.udp.outc).b)
		forge := func(f func(*mdns.Msg)) {
			m := new(mdns.Msg)
			m.SetReply(q)
			m.Answer = append(m.Answer, &mdns.A{Hdr: mdns.RR_Header{Name: "www.foreign.test.", Rrtype: mdns.TypeA, Class: 1}, A: []byte{6, 6, 6, 6}})
			f(m)
			up.udp.inc <- packet{b: packed(t, m)}
		}
		forge(func(m *mdns.Msg) { m.Id++ })
		forge(func(m *mdns.Msg) { m.Response = false })
		forge(func(m *mdns.Msg) { m.Opcode = mdns.OpcodeNotify })
		forge(func(m *mdns.Msg) { m.Question[0].Name = "www.other.test." })
		forge(func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeAAAA })
		forge(func(m *mdns.Msg) { m.Question[0].Qclass = mdns.ClassCHAOS })
		forge(func(m *mdns.Msg) { m.Question = nil })
		forge(func(m *mdns.Msg) { m.Question, m.Rcode = nil, mdns.RcodeFormatError }) // with records
		forge(func(m *mdns.Msg) { m.Question = append(m.Question, m.Question[0]) })
		up.udp.inc <- packet{b: []byte{1}}
		up.udp.inc <- packet{}
		synctest.Wait()
		if len(b.sock.outc) > 0 {
			t.Fatalf("a forged answer was passed on: %v", b.reply())
		}
		time.Sleep(time.Second)
		forge(func(m *mdns.Msg) {
			m.Question[0].Name = "WWW.Foreign.test." // some servers change the case
			m.Answer[0].(*mdns.A).A = []byte{1, 2, 3, 4}
		})
		if m := b.reply(); m.Id != 7 || m.Answer[0].(*mdns.A).A.String() != "1.2.3.4" {
			t.Errorf("the true answer: %v", m)
		}
	})
}

func TestErrorsWithoutTheirQuestion(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		b.send(packed(t, question("www.foreign.test.", mdns.TypeA, 7)))
		up := <-b.dialled
		raw := (<-up.udp.outc).b
		up.udp.inc <- packet{b: append(slices.Clone(raw[:2]), 0x80, 0x01, 0, 0, 0, 0, 0, 0, 0, 0)}
		if m := b.reply(); m.Rcode != mdns.RcodeFormatError || m.Id != 7 {
			t.Errorf("an old server's refusal of EDNS became %v", m)
		}
	})
}

// TestAnswerThatDoesNotFit is refused and not cut off.
func TestAnswerThatDoesNotFit(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		for size, want := range map[int]int{smallBuffer: mdns.RcodeSuccess, smallBuffer + 1: mdns.RcodeServerFailure} {
			b.send(packed(t, question("www.foreign.test.", mdns.TypeA, 7)))
			up := <-b.dialled
			raw := (<-up.udp.outc).b
			answer := append(slices.Clone(raw), make([]byte, size-len(raw))...)
			answer[2] |= 0x80
			up.udp.inc <- packet{b: answer}
			if got := int((<-b.sock.outc).b[3] & rcodes); got != want {
				t.Errorf("%d bytes: %s, want %s", size, mdns.RcodeToString[got], mdns.RcodeToString[want])
			}
		}
	})
}

func TestUpstreamTimesOut(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		start := time.Now()
		b.send(packed(t, question("www.foreign.test.", mdns.TypeA, 7)))
		up := <-b.dialled
		if m := b.reply(); m.Rcode != mdns.RcodeServerFailure || m.Id != 7 || time.Since(start) != upstreamTimeout {
			t.Errorf("after %v: %v", time.Since(start), m)
		}
		<-up.udp.donec // its socket is closed, so what comes later meets nobody
	})
}

// TestEachQueryHasItsOwnSocketAndID, and answers may come in any order.
func TestEachQueryHasItsOwnSocketAndID(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		const n = 20
		ids := map[uint16]bool{}
		var ups []upstream
		for i := range n {
			b.send(packed(t, question("www.foreign.test.", mdns.TypeA, uint16(i))))
			ups = append(ups, <-b.dialled)
		}
		for i := n - 1; i >= 0; i-- {
			q := unpacked(t, (<-ups[i].udp.outc).b)
			ids[q.Id] = true
			m := new(mdns.Msg)
			m.SetReply(q)
			ups[i].udp.inc <- packet{b: packed(t, m)}
			if got := b.reply(); got.Id != uint16(i) {
				t.Errorf("answer %d has id %d", i, got.Id)
			}
		}
		if len(ids) < n-2 {
			t.Errorf("%d queries had %d ids", n, len(ids))
		}
	})
}

func TestQueriesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limits := ledger.DefaultLimits()
		limits[ledger.Queries] = 3
		b := newBench(t, limits)
		for i := range 3 {
			b.send(packed(t, question("www.foreign.test.", mdns.TypeA, uint16(i))))
			<-b.dialled
		}
		b.send(packed(t, question("www.foreign.test.", mdns.TypeA, 3)))
		if m := b.reply(); m.Id != 3 || m.Rcode != mdns.RcodeServerFailure {
			t.Errorf("one query too many: %v", m)
		}
		b.send(packed(t, question("web.shop.svc.cluster.local.", mdns.TypeA, 4)))
		if m := b.reply(); m.Id != 4 || len(m.Answer) != 1 {
			t.Errorf("the mesh's own names need no place: %v", m)
		}
	})
}

// TestQueriesEndWithThePod: at once, and with their sockets.
func TestQueriesEndWithThePod(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		b.send(packed(t, question("www.foreign.test.", mdns.TypeA, 7)))
		up := <-b.dialled
		<-up.udp.outc
		start := time.Now()
		b.end()
		<-up.udp.donec
		if d := time.Since(start); d != 0 {
			t.Errorf("the pod's end took %v", d)
		}
	})
}

// TestMeshNamesWaitForTheirPod: a pod that the control plane has not named yet is
// told nothing of the mesh; foreign names do not wait.
func TestMeshNamesWaitForTheirPod(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		self := b.self
		b.self = nil
		b.send(packed(t, question("www.foreign.test.", mdns.TypeA, 1)))
		up := <-b.dialled
		m := new(mdns.Msg)
		m.SetReply(unpacked(t, (<-up.udp.outc).b))
		up.udp.inc <- packet{b: packed(t, m)}
		if m := b.reply(); m.Id != 1 || m.Rcode != mdns.RcodeSuccess {
			t.Errorf("a foreign name: %v", m)
		}
		start := time.Now()
		b.send(packed(t, question("web.shop.svc.cluster.local.", mdns.TypeA, 2)))
		if m := b.reply(); m.Rcode != mdns.RcodeServerFailure || len(m.Answer) > 0 || time.Since(start) != selfWait {
			t.Errorf("after %v: %v", time.Since(start), m)
		}
		b.send(packed(t, question("web.shop.svc.cluster.local.", mdns.TypeA, 3)))
		time.Sleep(selfWait / 2)
		b.mu.Lock()
		b.self = self
		b.mu.Unlock()
		close(b.selfc)
		if m := b.reply(); m.Rcode != mdns.RcodeSuccess || len(m.Answer) != 1 {
			t.Errorf("the pod came: %v", m)
		}
	})
}

func TestOwnAnswersOverUDP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		things := []any{service("shop/db.shop.svc.cluster.local")}
		for i := range 200 {
			things = append(things, endpoint("shop", string(rune('a'+i%26))+"-"+string(rune('a'+i/26)), netip.AddrFrom4([4]byte{10, 1, 0, byte(i)}).String(), "", "db.shop.svc.cluster.local"))
		}
		b := newBench(t, ledger.DefaultLimits())
		b.mesh = snapshot(things...)
		ask := func(size uint16) (*mdns.Msg, int) {
			q := question("db.shop.svc.cluster.local.", mdns.TypeA, 1)
			if size > 0 {
				q.SetEdns0(size, true)
			}
			b.send(packed(t, q))
			raw := (<-b.sock.outc).b
			return unpacked(t, raw), len(raw)
		}
		for _, tc := range []struct {
			size      uint16
			limit     int
			truncated bool
		}{{0, 512, true}, {100, 512, true}, {1232, 1232, true}, {4096, 4096, false}} {
			m, n := ask(tc.size)
			if n > tc.limit || m.Truncated != tc.truncated || tc.truncated && n < tc.limit-32 || !tc.truncated && len(m.Answer) != 200 {
				t.Errorf("a client that takes %d bytes got %d, truncated=%t, %d records", tc.size, n, m.Truncated, len(m.Answer))
			}
			if o := m.IsEdns0(); (o != nil) != (tc.size > 0) || o != nil && (!o.Do() || o.UDPSize() != ednsSize) {
				t.Errorf("EDNS of the answer: %v", o)
			}
			if !m.Authoritative || !m.RecursionAvailable || !m.RecursionDesired || m.Answer[0].Header().Ttl != 30 {
				t.Errorf("header of %v", m)
			}
		}
	})
}

func TestNegativeAnswers(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		for name, zone := range map[string]string{
			"v4.shop.svc.cluster.local.": "cluster.local.", "elsewhere.example.com.": "elsewhere.example.com.",
		} {
			b.send(packed(t, question(name, mdns.TypeAAAA, 1)))
			m := b.reply()
			if m.Rcode != mdns.RcodeSuccess || len(m.Answer) != 0 || len(m.Ns) != 1 {
				t.Fatalf("%s: %v", name, m)
			}
			if soa, ok := m.Ns[0].(*mdns.SOA); !ok || soa.Hdr.Name != zone || soa.Minttl != negativeTTL {
				t.Errorf("%s: %v", name, m.Ns[0])
			}
		}
		b.send(packed(t, question("api.example.com.", mdns.TypeHTTPS, 1))) // its hints would lead around the mesh
		if m := b.reply(); m.Rcode != mdns.RcodeSuccess || len(m.Answer) != 0 || len(m.Ns) != 1 {
			t.Errorf("HTTPS: %v", m)
		}
	})
}

func TestSRVBringsAddresses(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		b.send(packed(t, question("_pg._tcp.db.shop.svc.cluster.local.", mdns.TypeSRV, 1)))
		m := b.reply()
		hosts := map[string]bool{}
		for _, rr := range m.Answer {
			hosts[rr.(*mdns.SRV).Target] = true
		}
		for _, rr := range m.Extra {
			delete(hosts, rr.Header().Name)
		}
		if len(m.Answer) != 2 || len(m.Extra) != 2 || len(hosts) != 0 {
			t.Errorf("%v", m)
		}
	})
}

func TestOddQueries(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		good := packed(t, question("web.shop.svc.cluster.local.", mdns.TypeA, 7))
		change := func(f func([]byte) []byte) []byte { return f(slices.Clone(good)) }
		for _, tc := range []struct {
			name  string
			raw   []byte
			rcode int // -1: no answer
		}{
			{"a good one", good, mdns.RcodeSuccess},
			{"nothing", nil, -1},
			{"half a header", good[:11], -1},
			{"a response", change(func(b []byte) []byte { b[2] |= 0x80; return b }), -1},
			{"NOTIFY", change(func(b []byte) []byte { b[2] |= 4 << 3; return b }), mdns.RcodeNotImplemented},
			{"no question", change(func(b []byte) []byte { b[5] = 0; return b }), mdns.RcodeFormatError},
			{"two questions", change(func(b []byte) []byte { b[5] = 2; return append(b, b[12:]...) }), mdns.RcodeFormatError},
			{"cut off", good[:20], mdns.RcodeFormatError},
			{"a pointer for a name", append(slices.Clone(good[:12]), 0xc0, 0x0c, 0, 1, 0, 1), mdns.RcodeFormatError},
			{"records that are not there", change(func(b []byte) []byte { b[11] = 9; return b }), mdns.RcodeFormatError},
		} {
			b.send(tc.raw)
			synctest.Wait()
			if tc.rcode < 0 {
				if len(b.sock.outc) > 0 {
					t.Errorf("%s was answered: %v", tc.name, b.reply())
				}
				continue
			}
			if m := b.reply(); m.Rcode != tc.rcode || m.Id != 7 || !m.Response {
				t.Errorf("%s: %v, want %s", tc.name, m, mdns.RcodeToString[tc.rcode])
			}
		}
	})
}

// TestForeignQuestions: classes, EDNS versions and names that are no host names
// are the server's affair, whatever they look like.
func TestForeignQuestions(t *testing.T) {
	for name, f := range map[string]func(*mdns.Msg){
		"class": func(m *mdns.Msg) { m.Question[0].Qclass = mdns.ClassCHAOS },
		"EDNS version": func(m *mdns.Msg) {
			m.SetEdns0(1232, false)
			m.IsEdns0().SetVersion(1)
		},
		"a dot in a label": func(m *mdns.Msg) { m.Question[0].Name = `web\.shop.svc.cluster.local.` },
		"the root":         func(m *mdns.Msg) { m.Question[0].Name = "." },
		"a transfer":       func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeAXFR },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, b *bench) {
				q := question("web.shop.svc.cluster.local.", mdns.TypeA, 7)
				f(q)
				b.send(packed(t, q))
				<-b.dialled
			})
		})
	}
}

// tcp opens a TCP connection to the server.
func (b *bench) tcp() *memnet.Conn {
	ours, theirs := memnet.PipeAddr(client, theProxy)
	ctx, cancel := context.WithCancel(context.Background())
	b.ends.Go(func() { defer theirs.Close(); b.srv.ServeStream(ctx, theirs) })
	before := b.cancel
	b.cancel = func() { cancel(); before() }
	return ours
}

func sendTCP(t *testing.T, c io.Writer, raw []byte) {
	t.Helper()
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(raw))), raw...)); err != nil {
		t.Fatal(err)
	}
}

func readTCP(t *testing.T, c io.Reader) []byte {
	t.Helper()
	buf := make([]byte, maxMessage)
	b, err := readMessage(c, buf)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStreams(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		c := b.tcp()
		defer c.Close()
		var up upstream
		for round := range uint16(3) {
			sendTCP(t, c, packed(t, question("web.shop.svc.cluster.local.", mdns.TypeA, round)))
			if m := unpacked(t, readTCP(t, c)); m.Id != round || len(m.Answer) != 1 {
				t.Errorf("own name: %v", m)
			}
			raw := packed(t, question("www.foreign.test.", mdns.TypeTXT, round))
			sendTCP(t, c, raw)
			if round != 1 { // one connection for many questions, a fresh one when the server has ended it
				up = <-b.dialled
			}
			q := readTCP(t, up.tcp)
			if !bytes.Equal(q[2:], raw[2:]) || up.network != "tcp" || up.server != asked {
				t.Fatalf("forwarded %x to %v", q, up)
			}
			answer := append(slices.Clone(q), bytes.Repeat([]byte{9}, 30000)...)
			answer[2] |= 0x80
			wrong := slices.Clone(answer)
			wrong[0]++
			sendTCP(t, up.tcp, wrong)
			sendTCP(t, up.tcp, answer)
			binary.BigEndian.PutUint16(answer, round)
			if got := readTCP(t, c); !bytes.Equal(got, answer) {
				t.Errorf("round %d: %d bytes came back, changed", round, len(got))
			}
			if round == 1 {
				_ = up.tcp.Close()
				synctest.Wait()
			}
		}
		_ = up.tcp.Close()
		// Idle.
		start := time.Now()
		if _, err := c.Read(make([]byte, 1)); err == nil || time.Since(start) != idleTimeout {
			t.Errorf("an idle connection ended after %v with %v", time.Since(start), err)
		}
	})
}

// TestLargeQueriesTakeMorePlaces: what they hold is larger too.
func TestLargeQueriesTakeMorePlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limits := ledger.DefaultLimits()
		limits[ledger.Queries] = largeQuery + 1
		b := newBench(t, limits)
		q := question("www.foreign.test.", mdns.TypeA, 1)
		q.SetEdns0(65535, false)
		b.send(packed(t, q))
		up := <-b.dialled
		raw := (<-up.udp.outc).b
		b.send(packed(t, q))
		if m := b.reply(); m.Rcode != mdns.RcodeServerFailure {
			t.Errorf("a second large query: %v", m)
		}
		c := b.tcp()
		defer c.Close()
		sendTCP(t, c, packed(t, question("web.shop.svc.cluster.local.", mdns.TypeA, 2)))
		if n, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("%d bytes over TCP without a place", n)
		}
		answer := append(slices.Clone(raw), make([]byte, 60000)...)
		answer[2] |= 0x80
		up.udp.inc <- packet{b: answer}
		if out := <-b.sock.outc; len(out.b) != len(answer) {
			t.Errorf("%d of %d bytes came back", len(out.b), len(answer))
		}
		b.send(packed(t, question("www.foreign.test.", mdns.TypeA, 3)))
		<-b.dialled
	})
}

func TestStreamUpstreamFails(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		c := b.tcp()
		defer c.Close()
		sendTCP(t, c, packed(t, question("www.foreign.test.", mdns.TypeTXT, 5)))
		up := <-b.dialled
		if m := unpacked(t, readTCP(t, c)); m.Rcode != mdns.RcodeServerFailure || m.Id != 5 {
			t.Errorf("a silent server: %v", m)
		}
		if _, err := io.Copy(io.Discard, up.tcp); err != nil {
			t.Errorf("the connection to it was not ended in order: %v", err)
		}
	})
}

// TestTransfersPass: a zone transfer is many messages.
func TestTransfersPass(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		c := b.tcp()
		defer c.Close()
		sendTCP(t, c, packed(t, question("zone.test.", mdns.TypeAXFR, 5)))
		up := <-b.dialled
		q := readTCP(t, up.tcp)
		for range 3 {
			sendTCP(t, up.tcp, q)
			if got := readTCP(t, c); !bytes.Equal(got, q) {
				t.Errorf("a part came as %x", got)
			}
		}
		_ = up.tcp.Close()
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("the connection goes on after the transfer")
		}
	})
}

func TestStreamsAreBoundedAndEndWithThePod(t *testing.T) {
	inBubble(t, func(t *testing.T, b *bench) {
		var open []*memnet.Conn
		for range maxStreams {
			open = append(open, b.tcp())
		}
		synctest.Wait()
		extra := b.tcp()
		start := time.Now()
		if _, err := extra.Read(make([]byte, 1)); err == nil || time.Since(start) != 0 {
			t.Errorf("one connection too many ended after %v", time.Since(start))
		}
		sendTCP(t, open[0], packed(t, question("www.foreign.test.", mdns.TypeTXT, 5)))
		<-b.dialled
		b.end()
		if d := time.Since(start); d != 0 {
			t.Errorf("the pod's end took %v", d)
		}
		for _, c := range append(open, extra) {
			_ = c.Close()
		}
	})
}
