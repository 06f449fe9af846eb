package app

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// churnBatch is how many pods come and go together.
const churnBatch = 100

// churnBatches is how many batches a test takes, at least three: the first is
// what the others are compared with. AMBIT_PODS is the number of pods that a
// release is tested with; the default keeps the tests in every run.
func churnBatches(t *testing.T, pods int) int {
	t.Helper()
	if s := os.Getenv("AMBIT_PODS"); s != "" {
		var err error
		if pods, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	return max(pods/churnBatch, 3)
}

func churnName(batch, i int) string { return fmt.Sprintf("crowd-%d-%d", batch, i) }

// crowd is the change that brings a batch of pods, or takes it away. The first
// has the address; all of a batch have one identity, as whichever listener gets
// a connection must do.
func crowd(batch int, addr netip.Addr, away bool) client.Delta {
	d := client.Delta{Type: api.AddressType}
	for i := range churnBatch {
		name := churnName(batch, i)
		m := &workload.Workload{Uid: "Kubernetes//Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: fmt.Sprint("crowd-", batch),
			TrustDomain: "cluster.local", Node: "node-1", WorkloadName: name, CanonicalName: name, TunnelProtocol: workload.TunnelProtocol_HBONE}
		if i == 0 {
			m.Addresses = [][]byte{addr.AsSlice()}
		}
		if away {
			d.Removed = append(d.Removed, m.Uid)
			continue
		}
		v, err := anypb.New(&workload.Address{Type: &workload.Address_Workload{Workload: m}})
		if err != nil {
			panic("BUG: " + err.Error())
		}
		d.Added = append(d.Added, client.Resource{Name: m.Uid, TypeURL: v.TypeUrl, Value: v.Value})
	}
	return d
}

func churnPod(batch, i int) handoff.Pod {
	return handoff.Pod{UID: churnName(batch, i), Name: churnName(batch, i), Namespace: "default", ServiceAccount: fmt.Sprint("crowd-", batch)}
}

// held is what a node holds for its pods.
type held struct {
	goroutines, descriptors, accounts, stays, serving, neighbours, connections int
}

func (n *node) held() held {
	n.mu.Lock()
	defer n.mu.Unlock()
	return held{
		goroutines: runtime.NumGoroutine(), descriptors: len(leak.Descriptors()), accounts: n.ledger.Accounts(),
		stays: len(n.pods), serving: len(n.serving), neighbours: len(n.neighbours), connections: n.flow.Len(""),
	}
}

// TestThousandsOfPodsComeAndGo enrols and removes pods, 100 at a time, with
// traffic in both directions. They share one namespace, and so its ports, as an
// old and a new proxy do. Nothing of them stays: what stayed
// of each pod is ten times what the slack allows for.
func TestThousandsOfPodsComeAndGo(t *testing.T) {
	batches := churnBatches(t, 300)
	w, a, _ := twoPods(t)
	n := a.node
	shared := w.addHost("crowd")
	rules, err := redirect.New(redirect.Config{})
	w.check(err)
	w.check(rules.Apply(shared.NS, redirect.PodRules{IPv6: w.v6}))
	w.listen(shared, 8080, whoami)
	w.wantAnswer(a, fmt.Sprintf("%s:8080", w.pods["b"].ip), a.ip.String()+"\nhello") // what a first connection leaves is not theirs

	round := func(batch int) {
		for _, other := range w.nodes {
			if r := other.store.Apply(crowd(batch, shared.ip, false)); len(r) > 0 {
				t.Fatalf("refused: %v", r[0])
			}
		}
		for i := range churnBatch {
			p := churnPod(batch, i)
			if p.NS, err = shared.NS.Dup(); err != nil {
				t.Fatal(err)
			}
			w.check(n.pods.AddPod(t.Context(), p))
		}
		for range 5 {
			w.wantAnswer(w.pods["b"], fmt.Sprintf("%s:8080", shared.ip), w.pods["b"].ip.String()+"\nhello")
			w.wantAnswer(shared, fmt.Sprintf("%s:8080", w.pods["b"].ip), shared.ip.String()+"\nhello")
		}
		for i := range churnBatch {
			w.check(n.pods.DelPod(churnName(batch, i)))
		}
		for _, other := range w.nodes {
			other.store.Apply(crowd(batch, shared.ip, true))
		}
	}
	round(0)
	var before held
	eventually(t, "the first batch is gone", func() bool { before = n.held(); return before.stays == 1 && before.connections == 0 })
	for batch := 1; batch < batches; batch++ {
		round(batch)
	}
	var after held
	ok := func() bool {
		after = n.held()
		return after.accounts == before.accounts && after.stays == before.stays && after.serving == before.serving && after.neighbours == before.neighbours &&
			after.connections == 0 && after.goroutines <= before.goroutines+20 && after.descriptors <= before.descriptors+20
	}
	for deadline := time.Now().Add(waitLimit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %d pods the node holds %+v, before %+v", batches*churnBatch, after, before)
		}
	}
}

// issuer signs what is asked.
type issuer struct {
	t  *testing.T
	ca *meshca.CA
}

func (i issuer) Sign(_ context.Context, id identity.ID, csr string, _ time.Duration) ([]string, error) {
	b, _ := pem.Decode([]byte(csr))
	req, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return nil, err
	}
	return i.ca.ChainPEM(i.ca.Sign(i.t, req.PublicKey.(*ecdsa.PublicKey), id)), nil
}

// series counts what a node exports.
func series(t *testing.T, reg *prometheus.Registry) int {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range families {
		n += len(f.GetMetric())
	}
	return n
}

// TestThousandsOfPodsLeaveNoSeries: an hour after its pods, each with a
// connection, a node exports what it did before, and has the certificates it had.
func TestThousandsOfPodsLeaveNoSeries(t *testing.T) {
	batches := churnBatches(t, 500)
	synctest.Test(t, func(t *testing.T) {
		cfg := Defaults()
		cfg.NodeName, cfg.DNSCapture = "node-1", false
		reg := prometheus.NewRegistry()
		n := newNode(cfg, slog.New(slog.DiscardHandler), reg, issuer{t, meshca.New(t, "cluster.local")})
		var now []handoff.Pod
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for _, run := range []func(context.Context) error{n.certs.Run, n.flow.Run,
			func(ctx context.Context) error {
				return n.identities(ctx, func() []handoff.Pod { n.mu.Lock(); defer n.mu.Unlock(); return slices.Clone(now) })
			}} {
			wg.Go(func() { _ = run(ctx) })
		}
		defer func() { stop(); wg.Wait(); n.leases.Close(); _ = n.tunnels.Close(); n.store.Close() }()
		addr := netip.MustParseAddr("10.0.0.1")
		round := func(batch int) {
			n.store.Apply(crowd(batch, addr, false))
			var closers []func()
			n.mu.Lock()
			for i := range churnBatch {
				now = append(now, churnPod(batch, i))
			}
			n.mu.Unlock()
			for i := range churnBatch {
				p := churnPod(batch, i)
				h := n.serve(p, podNet{})
				closers = append(closers, func() { h.Cut(flow.ErrPodGone); h.Close() })
				self := n.lookup(p)
				if self == nil {
					t.Fatalf("no workload for %s", p.Name)
				}
				if _, err := n.certs.Get(ctx, self.Identity); err != nil {
					t.Fatal(err)
				}
				c, _ := n.flow.Begin(ctx, flow.Record{Direction: flow.Outbound, Pod: p.UID, Src: self, Dst: self, Transport: flow.HBONE,
					SrcAddr: netip.AddrPortFrom(addr, 4000), DstAddr: netip.AddrPortFrom(addr, 80)})
				c.Describe() // counts it as opened
				c.End(nil)
			}
			for _, end := range closers {
				end()
			}
			n.mu.Lock()
			now = nil
			n.mu.Unlock()
			n.store.Apply(crowd(batch, addr, true))
		}
		round(0)
		time.Sleep(time.Hour)
		before := series(t, reg)
		for batch := 1; batch < batches; batch++ {
			round(batch)
		}
		if got := series(t, reg); got < before+churnBatch {
			t.Errorf("%d series with hundreds of pods just gone, %d without any: is anything counted?", got, before)
		}
		time.Sleep(time.Hour)
		if got := series(t, reg); got != before {
			t.Errorf("%d series, %d before the pods", got, before)
		}
		if left := n.certs.Status(); len(left) > 0 {
			t.Errorf("%d certificates left, such as %v", len(left), left[0])
		}
		if left := n.ledger.Accounts(); left > 0 {
			t.Errorf("%d accounts left", left)
		}
	})
}
