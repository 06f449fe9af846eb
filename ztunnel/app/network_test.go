package app

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// gateway is a network gateway: it ends outer tunnels and hands their bytes on
// to a pod's HBONE port, without looking into them.
type gateway struct {
	*testPod
	streams atomic.Int32
	asked   sync.Map // authorities
}

func (w *world) addGateway(to func() *testPod) *gateway {
	w.Helper()
	g := &gateway{testPod: w.addHost("gw")}
	id := identity.MustParse("spiffe://cluster.local/ns/default/sa/gw")
	certs := cert.New(cert.Config{Authority: w})
	ctx, cancel := context.WithCancel(context.Background())
	srv := hbone.NewServer(hbone.ServerConfig{
		TLS: func(ctx context.Context, _ netip.AddrPort) (*tls.Config, error) {
			if _, err := certs.Get(ctx, id); err != nil {
				return nil, err
			}
			return certs.ServerConfig(id), nil
		},
		Handler: func(ctx context.Context, r *hbone.Request) {
			g.streams.Add(1)
			g.asked.Store(r.Authority+" "+r.Header("x-forwarded-network"), true)
			up, err := g.NS.Dial(ctx, &net.Dialer{}, "tcp", fmt.Sprintf("%s:15008", to().ip))
			if err != nil {
				r.Reject(503)
				return
			}
			s, err := r.Accept()
			if err != nil {
				_ = up.Close()
				return
			}
			_ = relay.Join(ctx, s, up.(relay.Conn), nil)
		},
	})
	ln, err := g.NS.Listen(ctx, &net.ListenConfig{}, "tcp4", "0.0.0.0:15008")
	w.check(err)
	var wg sync.WaitGroup
	wg.Go(func() { _ = certs.Run(ctx) })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { _ = srv.ServeConn(ctx, c) })
		}
	})
	w.Cleanup(func() { _ = ln.Close(); _ = srv.Close(); cancel(); wg.Wait() })
	m := w.workload(g.testPod, "node-9")
	m.GetWorkload().Network, m.GetWorkload().Services = "other", nil
	w.push(api.AddressType, m.GetWorkload().Uid, m)
	return g
}

// TestAnotherNetwork: a service whose endpoint is in another network is reached
// through that network's gateway, which sees neither who it is for nor a byte
// of it.
func TestAnotherNetwork(t *testing.T) {
	w, a, b := twoPods(t)
	g := w.addGateway(func() *testPod { return b })
	far := func(change ...func(*workload.Workload)) {
		m := w.workload(b, "node-2")
		m.GetWorkload().Network = "other"
		m.GetWorkload().WorkloadType = workload.WorkloadType_DEPLOYMENT
		m.GetWorkload().NetworkGateway = &workload.GatewayAddress{HboneMtlsPort: 15008,
			Destination: &workload.GatewayAddress_Address{Address: &workload.NetworkAddress{Network: "other", Address: g.ip.AsSlice()}}}
		for _, f := range change {
			f(m.GetWorkload())
		}
		w.push(api.AddressType, m.GetWorkload().Uid, m)
	}
	const host = "svc-b.default.svc.cluster.local"
	service := func(sans ...string) {
		w.push(api.AddressType, "default/"+host, &workload.Address{Type: &workload.Address_Service{Service: &workload.Service{
			Name: "svc-b", Namespace: "default", Hostname: host, SubjectAltNames: sans,
			Addresses: []*workload.NetworkAddress{{Address: netip.MustParseAddr("10.96.0.1").AsSlice()}},
			Ports:     []*workload.Port{{ServicePort: 80, TargetPort: 8080}},
		}}})
	}
	far()
	service()
	w.wantRefused(a, "10.96.0.1:80")
	a.node.logs.want(t, "error\taccess", "no subject alternative names")

	service("spiffe://cluster.local/ns/default/sa/other")
	w.wantRefused(a, "10.96.0.1:80")
	a.node.logs.want(t, "error\taccess", "inner tunnel to "+host+":80", "certificate of destination not accepted")

	service("spiffe://cluster.local/ns/default/sa/b")
	before := g.streams.Load()
	for range 3 * hbone.GatewaySlots {
		// The application sees the gateway: nobody else can be dialled back.
		w.wantAnswer(a, "10.96.0.1:80", g.ip.String()+"\nhello")
	}
	if n := g.streams.Load() - before; n > hbone.GatewaySlots {
		t.Errorf("%d inner tunnels for %d connections", n, 3*hbone.GatewaySlots)
	}
	a.node.logs.want(t, "info\taccess\tconnection complete", `direction="outbound"`, "dst.addr="+g.ip.String()+":15008", `dst.hbone_addr="`+host+`:80"`,
		`dst.workload="b"`, `dst.identity="spiffe://cluster.local/ns/default/sa/b"`)
	b.node.logs.want(t, "info\taccess\tconnection complete", `direction="inbound"`, "src.addr="+g.ip.String(), `src.workload="a"`, `src.namespace="default"`, `src.identity="spiffe://cluster.local/ns/default/sa/a"`)
	g.asked.Range(func(k, _ any) bool {
		if got := strings.TrimSpace(k.(string)); got != host+":80" {
			t.Errorf("the gateway was asked for %q", got)
		}
		return true
	})

	c, err := w.dial(a, "10.96.0.1:80")
	w.check(err)
	_, err = io.ReadFull(c, make([]byte, len(g.ip.String())+1))
	w.check(err)
	eventually(t, "only this connection is live, and names who is at its end", func() bool {
		rows := a.node.flow.List() // the last of the others may not be over yet
		return len(rows) == 1 && rows[0].DstWorkload == "default/b"
	})
}
