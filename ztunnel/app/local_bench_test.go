package app

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/inpod"
	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// benchAuthority signs whatever is asked.
type benchAuthority struct {
	testing.TB
	ca *meshca.CA
}

func (a benchAuthority) Sign(_ context.Context, id identity.ID, csr string, _ time.Duration) ([]string, error) {
	b, _ := pem.Decode([]byte(csr))
	req, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return nil, err
	}
	return a.ca.ChainPEM(a.ca.Sign(a, req.PublicKey.(*ecdsa.PublicKey), id)), nil
}

// benchSameNode is a node with a client's pod and an application's, on loopback
// addresses, without namespaces and rules: what is measured is the proxy. It
// returns the address at which the client's connections enter it.
func benchSameNode(b testing.TB, way ambit.WorkloadExtension_SameNode, app func(net.Conn)) string {
	var wg sync.WaitGroup
	b.Cleanup(wg.Wait)
	listen := func(addr string, serve func(sockopt.Socket)) *netns.Listener {
		tl, err := net.Listen("tcp4", addr)
		if err != nil {
			b.Fatal(err)
		}
		ln, err := netns.NewListener(tl)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = ln.Close() })
		wg.Go(func() {
			_ = ln.Each(func(c *netns.Conn) { // until it is closed
				wg.Go(func() { defer c.Close(); serve(c) })
			})
		})
		return ln
	}
	target := listen("127.0.81.2:0", func(c sockopt.Socket) { app(c) }).Addr().(*net.TCPAddr).AddrPort()

	cfg := Defaults()
	cfg.NodeName, cfg.EnableOrigSrc, cfg.PacketMark = "n", false, 0
	n := newNode(cfg, slog.New(slog.DiscardHandler), nil, benchAuthority{b, meshca.New(b, "cluster.local")})
	ctx, cancel := context.WithCancel(context.Background())
	b.Cleanup(func() { _ = n.tunnels.Close(); n.leases.Close(); cancel(); n.store.Close() })
	wg.Go(func() { _ = n.certs.Run(ctx) })
	x, err := proto.Marshal(&ambit.WorkloadExtension{SameNode: way})
	if err != nil {
		b.Fatal(err)
	}
	serve := func(name string, a netip.Addr) (out, hbone func(context.Context, sockopt.Socket)) {
		m, err := anypb.New(&workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{
			Uid: name, Name: name, Namespace: "default", ServiceAccount: name, TrustDomain: "cluster.local", Node: "n",
			TunnelProtocol: workload.TunnelProtocol_HBONE, Addresses: [][]byte{a.AsSlice()},
			Extensions: []*workload.Extension{{Name: api.WorkloadExtension, Config: &anypb.Any{TypeUrl: api.WorkloadExtensionType, Value: x}}},
		}}})
		if err != nil {
			b.Fatal(err)
		}
		n.store.Apply(client.Delta{Type: api.AddressType, Added: []client.Resource{{Name: name, TypeURL: m.TypeUrl, Value: m.Value}}})
		ns, err := netns.Own()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = ns.Close() })
		h := n.serve(handoff.Pod{UID: name, Name: name, Namespace: "default", ServiceAccount: name, NS: ns}, podNet{
			originalDst: func(net.Conn) (netip.AddrPort, error) { return target, nil },
		})
		b.Cleanup(h.Close)
		return blocking(h.Outbound), blocking(h.HBONE)
	}
	_, hbone := serve("b", target.Addr())
	out, _ := serve("a", netip.MustParseAddr("127.0.81.1"))
	listen(netip.AddrPortFrom(target.Addr(), hbonePort).String(), func(c sockopt.Socket) { hbone(ctx, c) })
	return listen("127.0.81.1:0", func(c sockopt.Socket) { out(ctx, c) }).Addr().String()
}

var sameNodeWays = map[string]ambit.WorkloadExtension_SameNode{
	"local": ambit.WorkloadExtension_SAME_NODE_LOCAL, "hbone": ambit.WorkloadExtension_SAME_NODE_HBONE,
}

// dialFrom dials as the client's pod.
func dialFrom(b testing.TB, addr string) *net.TCPConn {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 81, 1)}}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// BenchmarkSameNodeConnect is a connection with one byte each way.
func BenchmarkSameNodeConnect(b *testing.B) {
	for name, way := range sameNodeWays {
		b.Run(name, func(b *testing.B) {
			addr := benchSameNode(b, way, func(c net.Conn) { _, _ = io.Copy(c, c) })
			buf := make([]byte, 1)
			for b.Loop() {
				c := dialFrom(b, addr)
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
				_ = c.CloseWrite()
				_, _ = c.Read(buf)
				_ = c.Close()
			}
		})
	}
}

// BenchmarkSameNodeEcho is one byte there and back on an open connection.
func BenchmarkSameNodeEcho(b *testing.B) {
	for name, way := range sameNodeWays {
		b.Run(name, func(b *testing.B) {
			c := dialFrom(b, benchSameNode(b, way, func(c net.Conn) { _, _ = io.Copy(c, c) }))
			defer c.Close()
			buf := make([]byte, 1)
			for b.Loop() {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkSameNodeSend is bulk in one direction.
func BenchmarkSameNodeSend(b *testing.B) {
	for name, way := range sameNodeWays {
		b.Run(name, func(b *testing.B) {
			c := dialFrom(b, benchSameNode(b, way, func(c net.Conn) { _, _ = io.Copy(io.Discard, struct{ io.Reader }{c}) }))
			defer c.Close()
			buf := make([]byte, 128<<10)
			b.SetBytes(int64(len(buf)))
			for b.Loop() {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// blocking returns when the connection has ended.
func blocking(h inpod.Handler) func(context.Context, sockopt.Socket) {
	return func(ctx context.Context, c sockopt.Socket) {
		endedc := make(chan struct{})
		h(ctx, c, func() { close(endedc) })
		<-endedc
	}
}
