package dns

import (
	"context"
	"net"
	"sync"
	"testing"

	mdns "github.com/miekg/dns"

	"github.com/ambit-mesh/ambit/xds/mesh"
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

// BenchmarkRoundTrip is a client's view of a name of the mesh, over loopback.
func BenchmarkRoundTrip(b *testing.B) {
	srv := fixedServer()
	pc, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { srv.ServePacket(ctx, pc) })
	c, err := net.DialUDP("udp", nil, pc.LocalAddr().(*net.UDPAddr))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	raw, buf := rawQuestion(b, "web.shop.svc.cluster.local.", mdns.TypeA), make([]byte, 1500)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(raw); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}
