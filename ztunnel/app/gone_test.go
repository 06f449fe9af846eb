package app

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

const dyingHost, dyingVIP = "svc.default.svc.cluster.local", "10.96.0.9"

// dyingEndpoint is a mesh of pods a, b and c where a has pooled tunnels to b and
// c with an open stream in each, and b serves a service. Then b's cable
// vanishes: nothing of b's answers any more, and nobody says so.
func dyingEndpoint(t *testing.T) (w *world, a, b, c *testPod) {
	w, a, b = twoPods(t)
	c = w.addPod("c", "node-2")
	w.setWorkload(a, "node-1")
	w.push(api.AddressType, "default/"+dyingHost, &workload.Address{Type: &workload.Address_Service{Service: &workload.Service{
		Name: "svc", Namespace: "default", Hostname: dyingHost, Addresses: []*workload.NetworkAddress{{Address: netip.MustParseAddr(dyingVIP).AsSlice()}},
		Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8088}},
	}}})
	for _, p := range []*testPod{b, c} {
		w.listen(p, 8088, func(conn *net.TCPConn) { _, _ = io.WriteString(conn, p.name); _, _ = io.Copy(conn, conn) })
		conn, err := w.dial(a, fmt.Sprintf("%s:8088", p.ip))
		w.check(err)
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatalf("no tunnel to %s: %v", p.name, err)
		}
	}
	w.endpoint(b)
	w.check(w.router.Unplug("b"))
	return w, a, b, c
}

// endpoint makes a pod one of the service's.
func (w *world) endpoint(p *testPod) {
	m := w.workload(p, "node-2")
	m.GetWorkload().Services = map[string]*workload.PortList{"default/" + dyingHost: {Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8088}}}}
	w.push(api.AddressType, m.GetWorkload().Uid, m)
}

func (w *world) retried(n *testNode) float64 {
	return w.counter(n, "ambit_ztunnel_endpoint_retries_total")
}

// wantGreeting has the server speak first: what a client says may go along with the
// request for a tunnel's stream, while the tunnel was heard of a moment ago, and is then
// sent to nobody else.
func (w *world) wantGreeting(p *testPod, addr, want string) {
	w.Helper()
	c, err := w.dial(p, addr)
	if err != nil {
		w.Error(err)
		return
	}
	defer c.Close()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		w.Errorf("%s → %s: greeted with %q, %v; want %q", p.name, addr, b, err, want)
	}
}

// TestEndpointDiesSilently: the control plane does not know yet that a pod has
// died. Calls that go into its pooled tunnel come to the other endpoint.
func TestEndpointDiesSilently(t *testing.T) {
	w, a, _, c := dyingEndpoint(t)
	w.endpoint(c)
	for range 100 {
		w.wantGreeting(a, dyingVIP+":80", "c")
		if w.retried(a.node) > 0 {
			w.wantGreeting(a, dyingVIP+":80", "c") // the dead one comes last now
			return
		}
	}
	t.Error("100 calls were answered, none by a retry: was the dead endpoint ever chosen?")
}

// TestEndpointLeavesUnderCalls: the control plane takes the dead pod away while
// calls wait for it.
func TestEndpointLeavesUnderCalls(t *testing.T) {
	const calls = 5
	w, a, b, c := dyingEndpoint(t)
	account := w.account(a)
	open := account.InUse(ledger.Streams)
	var wg sync.WaitGroup
	for range calls {
		wg.Go(func() {
			w.wantGreeting(a, dyingVIP+":80", "c")
		})
	}
	eventually(t, "all calls wait for the dead endpoint", func() bool { return account.InUse(ledger.Streams) == open+calls })
	w.endpoint(c)
	w.remove(api.AddressType, "Kubernetes//Pod/default/"+b.name)
	wg.Wait()
	if n := w.retried(a.node); n != calls {
		t.Errorf("%v retries of %d calls", n, calls)
	}
}

// TestWorkloadLeavesAndReturns: a pod that ends in order, or leaves the mesh,
// keeps its open connections; whoever has its address next gets tunnels of its
// own.
func TestWorkloadLeavesAndReturns(t *testing.T) {
	w, a, b := twoPods(t)
	addr := fmt.Sprintf("%s:8080", b.ip)
	c, err := w.dial(a, addr)
	w.check(err)
	if _, err := c.Read(make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	dials := w.counter(a.node, "ambit_ztunnel_hbone_dials_total")
	m := w.workload(b, "node-2")
	m.GetWorkload().CanonicalRevision = "v2"
	w.push(api.AddressType, m.GetWorkload().Uid, m) // changed, and still there
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
	if got := w.counter(a.node, "ambit_ztunnel_hbone_dials_total"); got != dials {
		t.Fatalf("%v tunnels dialled after a change, %v before", got, dials)
	}
	// Node-2 hears of it later: what it cuts then is its own decision.
	a.node.store.Apply(client.Delta{Type: api.AddressType, Removed: []string{m.GetWorkload().Uid}})
	w.setWorkload(b, "node-2")
	w.wantAnswer(a, addr, a.ip.String()+"\nhello")
	if got := w.counter(a.node, "ambit_ztunnel_hbone_dials_total"); got != dials+1 {
		t.Errorf("%v tunnels dialled after the pod left and returned, want one more than %v", got, dials)
	}
	_, err = io.WriteString(c, "x")
	w.check(err)
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Errorf("the open connection was cut: %v", err)
	}
}

func TestVacated(t *testing.T) {
	ip, other := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	wl := func(uid, network string, hbone workload.TunnelProtocol, addrs ...netip.Addr) *mesh.Workload {
		return &mesh.Workload{UID: uid, Addrs: addrs, Traits: &mesh.Traits{Network: network, Tunnel: hbone}}
	}
	const none, tunnel = workload.TunnelProtocol_NONE, workload.TunnelProtocol_HBONE
	old := wl("u", "net", tunnel, ip)
	for _, c := range []struct {
		name     string
		old, now *mesh.Workload
		beside   *mesh.Workload // another one that there is now
		network  string
		want     bool
	}{
		{"it left", old, nil, nil, "", true},
		{"it left this network", old, nil, nil, "net", true},
		{"it left another network", old, nil, nil, "here", false},
		{"it changed otherwise", old, wl("u", "net", tunnel, ip), nil, "", false},
		{"it got another address beside", old, wl("u", "net", tunnel, other, ip), nil, "", false},
		{"its address changed", old, wl("u", "net", tunnel, other), nil, "", true},
		{"its network changed", old, wl("u", "far", tunnel, ip), nil, "", true},
		{"it is no longer enrolled", old, wl("u", "net", none, ip), nil, "", true},
		{"another has its address", old, nil, wl("v", "net", tunnel, ip), "", true},
		{"it had no tunnels", wl("u", "net", none, ip), nil, nil, "", false},
		{"it is new", nil, old, nil, "", false},
	} {
		m := mesh.Empty().Edit()
		for _, w := range []*mesh.Workload{c.now, c.beside} {
			if w != nil {
				m.PutWorkload(w)
			}
		}
		got := vacated(m.Commit(), store.Change{Workloads: []store.WorkloadChange{{UID: "u", Old: c.old, New: c.now}}}, c.network)
		if got[ip] != c.want || len(got) > 1 {
			t.Errorf("%s: vacated %v, want %v of %v", c.name, got, c.want, ip)
		}
	}
}
