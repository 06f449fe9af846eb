package dns

import (
	"context"
	"net"
	"sync"
	"testing"

	mdns "github.com/miekg/dns"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// fixedServer answers from shop and forwards nothing.
func fixedServer() *Server {
	s, self := shop(), endpoint("shop", "client", "10.8.0.2", "")
	return NewServer(Config{
		Resolver: NewResolver(ResolverConfig{}), Namespace: "shop",
		Mesh: func() *mesh.Snapshot { return s }, Known: func() *mesh.Workload { return self }, Metrics: NewMetrics(nil),
	})
}

func rawQuestion(tb testing.TB, name string, t uint16) []byte {
	q := new(mdns.Msg)
	q.SetQuestion(name, t)
	q.SetEdns0(1232, false)
	b, err := q.Pack()
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// BenchmarkQuery is a whole query but for its two system calls.
func BenchmarkQuery(b *testing.B) {
	srv := fixedServer()
	for _, bb := range []struct {
		name, question string
		qtype          uint16
	}{
		{"service", "web.shop.svc.cluster.local.", mdns.TypeA},
		{"headless", "db.shop.svc.cluster.local.", mdns.TypeA},
		{"search", "api.example.com.shop.svc.cluster.local.", mdns.TypeA},
		{"srv", "_pg._tcp.db.shop.svc.cluster.local.", mdns.TypeSRV},
		{"foreign", "www.foreign.test.", mdns.TypeA},
	} {
		b.Run(bb.name, func(b *testing.B) {
			raw := rawQuestion(b, bb.question, bb.qtype)
			var m message
			var a answer
			var out []byte
			b.ReportAllocs()
			for b.Loop() {
				if _, reply := srv.datagram(raw, &m, &a, out[:0]); reply != nil {
					out = reply
				}
			}
		})
	}
}

// roundTrip is a client over loopback.
type roundTrip struct {
	c        net.Conn
	raw, buf []byte
}

func newRoundTrip(tb testing.TB) *roundTrip {
	srv := fixedServer()
	lc := &net.ListenConfig{Control: sockopt.ControlFor(sockopt.Options{PacketInfo: true, OwnPodOnly: true})}
	ln, err := lc.ListenPacket(tb.Context(), "udp4", "0.0.0.0:0")
	if err != nil {
		tb.Fatal(err)
	}
	pc := ln.(*net.UDPConn)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { srv.ServePacket(ctx, pc) })
	tb.Cleanup(func() { cancel(); wg.Wait() })
	c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: pc.LocalAddr().(*net.UDPAddr).Port})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return &roundTrip{c, rawQuestion(tb, "web.shop.svc.cluster.local.", mdns.TypeA), make([]byte, 1500)}
}

func (r *roundTrip) ask(tb testing.TB) {
	if _, err := r.c.Write(r.raw); err != nil {
		tb.Fatal(err)
	}
	if _, err := r.c.Read(r.buf); err != nil {
		tb.Fatal(err)
	}
}

// BenchmarkRoundTrip is a client's view of a name of the mesh.
func BenchmarkRoundTrip(b *testing.B) {
	r := newRoundTrip(b)
	b.ReportAllocs()
	for b.Loop() {
		r.ask(b)
	}
}
