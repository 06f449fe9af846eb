package direct

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/lease"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// bench is a Keeper between an agent and a configuration that a test plays.
type bench struct {
	*testing.T
	k    *Keeper
	flow *flow.Table

	mu     sync.Mutex
	asked  []string
	refuse error
	view   *store.View
	cert   bool
	pods   map[string]*mesh.Workload // by stay, which is the name
	left   map[string]bool
}

var (
	toNear    = netip.MustParseAddrPort("10.0.0.2:8080")
	toService = netip.MustParseAddrPort("10.96.0.1:80")
	cookies   = map[string]uint64{"src": 1, "near": 2}
)

// run has f in a bubble with a Keeper whose agent is connected.
func run(t *testing.T, f func(b *bench)) {
	synctest.Test(t, func(t *testing.T) {
		b := &bench{T: t, cert: true, left: map[string]bool{}}
		b.pods = map[string]*mesh.Workload{"src": wl("src", "10.0.0.1"), "near": wl("near", "10.0.0.2")}
		b.set()
		b.flow = flow.New(flow.Config{View: b.current})
		b.k = New(Config{Agent: b, Pods: b, View: b.current, Flow: b.flow})
		ctx, cancel := context.WithCancel(t.Context())
		donec := make(chan error, 2)
		go func() { donec <- b.k.Run(ctx) }()
		go func() { donec <- b.flow.Run(ctx) }()
		b.k.Connected()
		f(b)
		cancel()
		for range 2 {
			if err := <-donec; err != nil {
				t.Error(err)
			}
		}
		if n := b.flow.Len(""); n != 0 {
			t.Errorf("%d records are left", n)
		}
	})
}

func wl(name, addr string) *mesh.Workload {
	return &mesh.Workload{UID: name, Name: name, Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Node: "node-1", Traits: &mesh.Traits{Namespace: "default", Identity: identity.MustParse("spiffe://cluster.local/ns/default/sa/" + name), Tunnel: workload.TunnelProtocol_HBONE, Healthy: true, Capacity: 1, SameNode: ambit.WorkloadExtension_SAME_NODE_LOCAL, Services: map[mesh.Hostname][]mesh.Port{{Namespace: "default", Name: "svc"}: {{Service: 80, Target: 8080}}}}}
}

// set publishes a configuration of the pods, one more endpoint elsewhere, and
// policies.
func (b *bench) set(policies ...*security.Authorization) {
	m, p := mesh.Empty().Edit(), policy.Empty().Edit()
	b.mu.Lock()
	for _, w := range b.pods {
		if w.Name == "src" {
			w.Services = nil
		}
		m.PutWorkload(w)
	}
	far := wl("far", "10.0.0.3")
	far.Node = "node-2"
	m.PutWorkload(far)
	m.PutService(&mesh.Service{Name: "svc", Namespace: "default", Host: mesh.Hostname{Namespace: "default", Name: "svc"},
		VIPs: []mesh.NetAddr{{Addr: toService.Addr()}}, Ports: []mesh.Port{{Service: 80, Target: 8080}}})
	for _, a := range policies {
		p.Put(a)
	}
	old := b.view
	b.view = &store.View{Mesh: m.Commit(), Policies: p.Commit(), Generation: 1}
	if old != nil {
		b.view.Generation = old.Generation + 1
	}
	now := b.view
	b.mu.Unlock()
	if b.k != nil {
		b.k.Changed(old, now, store.Change{})
		synctest.Wait()
	}
}

func deny() *security.Authorization {
	return &security.Authorization{Name: "deny", Namespace: "default", Scope: security.Scope_NAMESPACE, Action: security.Action_DENY,
		Rules: []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{{
			Principals: []*security.StringMatch{{MatchType: &security.StringMatch_Exact{Exact: "cluster.local/ns/default/sa/src"}}}}}}}}}}
}

func (b *bench) current() *store.View { b.mu.Lock(); defer b.mu.Unlock(); return b.view }

// Grant, Renew and Cut are the agent's.
func (b *bench) Grant(g lease.Grant) error {
	var to []string
	for _, t := range g.Targets {
		to = append(to, fmt.Sprintf("%v=%.2f", t.Addr, float64(t.Share)/lease.All))
	}
	return b.ask(fmt.Sprintf("grant %v [%s] cut=%v", g.Key.Addr, strings.Join(to, " "), g.Cut))
}
func (b *bench) Renew() error          { return b.ask("renew") }
func (b *bench) Cut(conn uint64) error { return b.ask(fmt.Sprint("cut ", conn)) }
func (b *bench) ask(what string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = append(b.asked, what)
	return b.refuse
}

// want compares what the agent was asked for since the last time, but for renewals.
func (b *bench) want(why string, want ...string) {
	b.Helper()
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	var got []string
	for _, a := range b.asked {
		if a != "renew" {
			got = append(got, a)
		}
	}
	b.asked = nil
	if g, w := strings.Join(got, "\n"), strings.Join(want, "\n"); g != w {
		b.Errorf("%s: the agent was asked for\n%s\nwant\n%s", why, g, w)
	}
}

func (b *bench) pod(w *mesh.Workload) (Pod, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if w == nil || b.left[w.Name] || b.pods[w.Name] == nil || cookies[w.Name] == 0 {
		return Pod{}, false
	}
	return Pod{UID: w.UID, NetNS: cookies[w.Name], Self: w, Enter: func(func(error)) (func(), bool) { return func() {}, true }}, true
}
func (b *bench) ByStay(stay string) (Pod, bool) {
	b.mu.Lock()
	w := b.pods[stay]
	b.mu.Unlock()
	return b.pod(w)
}
func (b *bench) ByWorkload(w *mesh.Workload) (Pod, bool) { return b.pod(w) }
func (b *bench) Certified(*mesh.Workload) bool           { b.mu.Lock(); defer b.mu.Unlock(); return b.cert }

func (b *bench) open(conn uint64) {
	b.k.Opened(lease.Opened{Conn: conn, Key: lease.Key{NetNS: 1, Addr: toNear}, Target: 2,
		Src: netip.MustParseAddrPort("10.0.0.1:40000"), Dst: toNear})
	synctest.Wait()
}

const granted = "grant 10.0.0.2:8080 [10.0.0.2:8080=1.00] cut=false"

func TestKeeperFollowsTheConfiguration(t *testing.T) {
	ended, cut := "grant 10.0.0.2:8080 [] cut=false", "grant 10.0.0.2:8080 [] cut=true"
	for _, tc := range []struct {
		name string
		do   func(b *bench)
		want string
	}{
		{"nothing", func(b *bench) { b.set() }, ""},
		{"denied", func(b *bench) { b.set(deny()) }, cut},
		{"destination gone from the mesh", func(b *bench) { delete(b.pods, "near"); b.set() }, cut},
		{"destination leaves the node's proxy", func(b *bench) { b.left["near"] = true; b.k.Left("near") }, cut},
		{"source leaves", func(b *bench) { b.left["src"] = true; b.k.Left("src") }, cut},
		{"terminating", func(b *bench) { w := wl("near", "10.0.0.2"); w.Terminating = true; b.pods["near"] = w; b.set() }, ended},
		{"tunnels again", func(b *bench) { w := wl("near", "10.0.0.2"); w.SameNode = 0; b.pods["near"] = w; b.set() }, ended},
		{"a waypoint", func(b *bench) {
			w := wl("near", "10.0.0.2")
			w.Waypoint = &mesh.GatewayAddress{Host: mesh.Hostname{Namespace: "default", Name: "wp"}}
			b.pods["near"] = w
			b.set()
		}, ended},
		{"no certificate", func(b *bench) { b.cert = false; b.set() }, cut},
		{"unused", func(b *bench) { time.Sleep(idle + lease.Interval) }, ended},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run(t, func(b *bench) {
				b.k.Offer("src", toNear)
				b.want("offered", granted)
				tc.do(b)
				if tc.want == "" {
					b.want(tc.name)
				} else {
					b.want(tc.name, tc.want)
				}
			})
		})
	}
}

func TestKeeperShares(t *testing.T) {
	run(t, func(b *bench) {
		b.k.Offer("src", toService)
		b.want("offered", "grant 10.96.0.1:80 [10.0.0.2:8080=0.50] cut=false")
		near, far := b.current().Mesh.Workload("near"), b.current().Mesh.Workload("far")
		if !b.k.Has("src", toService, near) || b.k.Has("src", toService, far) || b.k.Has("near", toService, near) || b.k.Has("src", toNear, near) {
			t.Error("the proxy takes others for leased")
		}
		w := wl("near", "10.0.0.2")
		w.Capacity = 3
		b.pods["near"] = w
		b.set()
		b.want("more capacity", "grant 10.96.0.1:80 [10.0.0.2:8080=0.75] cut=false")
		b.k.Disconnected()
		synctest.Wait()
		if b.k.Has("src", toService, w) {
			t.Error("the proxy believes in a lease without an agent")
		}
		b.k.Connected()
		b.want("another agent", "grant 10.96.0.1:80 [10.0.0.2:8080=0.75] cut=false")
	})
}

func TestKeeperRefused(t *testing.T) {
	run(t, func(b *bench) {
		b.refusing(&lease.RefusedError{Reason: "not accelerated"})
		b.k.Offer("src", toNear)
		b.want("offered", granted)
		b.k.Offer("src", toNear)
		b.want("again at once")
		time.Sleep(backoff) // the bubble's clock
		b.want("less and less often", granted, granted, granted)
		b.refusing(nil)
		time.Sleep(backoff + lease.Interval)
		b.want("later", granted)
	})
}

// A pair that is refused forever takes a place no longer than it is in use.
func TestKeeperForgetsWhatIsRefused(t *testing.T) {
	run(t, func(b *bench) {
		b.refusing(&lease.RefusedError{Reason: "not accelerated"})
		b.k.Offer("src", toNear)
		time.Sleep(idle + 2*lease.Interval)
		synctest.Wait()
		if n := len(b.k.leases); n != 0 { // Run waits
			t.Errorf("%d pairs are kept", n)
		}
	})
}

// TestKeeperNextAgent has leases in force again as soon as there is an agent again,
// whatever was asked of the last one, and whoever noticed its end first.
func TestKeeperNextAgent(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
	}{
		{"asked before it was known that it is gone", lease.ErrNoAgent},
		{"refused by the last one", &lease.RefusedError{Reason: "not accelerated"}},
		{"the last one broke", errors.New("broken pipe")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run(t, func(b *bench) {
				b.refusing(tc.err)
				b.k.Offer("src", toNear)
				b.want("offered", granted)
				b.k.Disconnected()
				synctest.Wait()
				b.refusing(nil)
				b.k.Connected()
				b.want("the next agent", granted)
			})
		})
	}
}

// TestKeeperConnections has what becomes of live connections.
func TestKeeperConnections(t *testing.T) {
	run(t, func(b *bench) {
		b.k.Offer("src", toNear)
		b.want("offered", granted)
		b.open(7)
		b.open(7) // told again
		var sides []string
		for _, l := range b.flow.List() {
			sides = append(sides, fmt.Sprintf("%s %s %s→%s", l.Direction, l.Transport, l.SrcWorkload, l.DstWorkload))
		}
		if len(sides) != 2 || !strings.Contains(sides[0]+sides[1], "inbound direct default/src→default/near") {
			t.Errorf("records are %q", sides)
		}
		b.k.Closed(lease.Closed{Conn: 7, Sent: 5, Received: 6})
		b.want("closed")
		if n := b.flow.Len(""); n != 0 {
			t.Errorf("%d records are left", n)
		}

		b.open(8)
		b.flow.CutPod("near", flow.ErrDrained)
		b.want("cut by the table", "cut 8")
		b.k.Closed(lease.Closed{Conn: 8})

		b.open(9)
		b.k.Closed(lease.Closed{Conn: 9, Failed: true})
		b.want("an attempt that failed", "grant 10.0.0.2:8080 [] cut=false")
		time.Sleep(backoff + lease.Interval)
		b.want("later", granted)

		b.open(10)
		b.set(deny())
		b.want("denied", "grant 10.0.0.2:8080 [] cut=true")
		b.k.Closed(lease.Closed{Conn: 10})
		b.open(11)
		b.want("one that raced with it", "cut 11")

		b.set()
		b.want("allowed again", granted)
		b.open(12)
		b.k.Disconnected()
		b.k.Connected()
		b.want("another agent", granted)
		time.Sleep(reunion + 2*lease.Interval)
		synctest.Wait()
		if n := b.flow.Len(""); n != 0 {
			t.Errorf("%d records of an agent that forgot them", n)
		}
		b.k.Opened(lease.Opened{Conn: 13, Key: lease.Key{NetNS: 1, Addr: toService}})
		b.want("under no lease of ours", "cut 13")
	})
}

// TestKeeperCutsUntilItIsSo has an agent that cannot end a connection, or is away.
func TestKeeperCutsUntilItIsSo(t *testing.T) {
	run(t, func(b *bench) {
		b.k.Offer("src", toNear)
		b.want("offered", granted)
		b.open(8)
		b.refusing(errors.New("kernel is out of memory"))
		b.flow.CutPod("near", flow.ErrDrained)
		b.want("cut by the table", "cut 8")
		time.Sleep(lease.Interval)
		b.want("still there", "cut 8")
		b.refusing(nil)
		time.Sleep(lease.Interval)
		b.want("and again", "cut 8")
		b.k.Closed(lease.Closed{Conn: 8})
		time.Sleep(lease.Interval)
		b.want("it has ended")

		b.open(9)
		b.refusing(lease.ErrNoAgent)
		b.k.Disconnected()
		b.flow.CutPod("near", flow.ErrDrained)
		b.want("nobody is there to end it", "cut 9")
		time.Sleep(lease.Interval)
		b.want("nobody to ask")
		b.refusing(nil)
		b.k.Connected()
		b.want("another agent", granted)
		b.open(9)
		b.want("which has it", "cut 9")
		b.k.Closed(lease.Closed{Conn: 9})
	})
}

func (b *bench) refusing(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refuse = err
}

// TestKeeperAgentFails has an agent that fails for other reasons.
func TestKeeperAgentFails(t *testing.T) {
	run(t, func(b *bench) {
		b.k.Offer("src", toNear)
		b.want("offered", granted)
		b.mu.Lock()
		b.refuse = errors.New("map is full")
		b.mu.Unlock()
		w := wl("near", "10.0.0.9")
		b.pods["near"] = w
		b.set()
		b.want("address changed", "grant 10.0.0.2:8080 [] cut=true", "grant 10.0.0.2:8080 [] cut=true")
	})
}
