package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/test/fakexds"
	"github.com/ambit-mesh/ambit/test/golden"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/store"
)

func address(uid string, last byte, third ...byte) *workload.Address {
	return &workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{
		Uid: uid, Name: uid, Namespace: "default", Addresses: [][]byte{{10, 0, append(third, 0)[0], last}},
	}}}
}

// rig is a client with a store against a fake server.
type rig struct {
	*testing.T
	ctx    context.Context
	server *fakexds.Server
	store  *store.Store
	synced chan struct{}
	stop   func()

	mu     sync.Mutex
	deltas []client.Delta
	wakec  chan struct{}
}

func (r *rig) Apply(d client.Delta) []client.Reject {
	rejects := r.store.Apply(d)
	r.mu.Lock()
	r.deltas = append(r.deltas, d)
	close(r.wakec)
	r.wakec = make(chan struct{})
	r.mu.Unlock()
	return rejects
}

func newRig(t *testing.T) *rig {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return &rig{
		T: t, ctx: ctx, server: fakexds.New(t), store: store.New(store.Config{}),
		synced: make(chan struct{}), wakec: make(chan struct{}),
	}
}

func (r *rig) run() {
	r.Helper()
	node, err := client.NodeInfo{PodName: "ztunnel-1", Namespace: "ambit-system", NodeName: "n1"}.Node()
	if err != nil {
		r.Fatal(err)
	}
	tokens := 0
	c, err := client.New(client.Config{
		Target: r.server.Addr(), TLS: r.server.TLS, ClusterID: "Kubernetes", Node: node,
		Types: []string{api.AddressType, api.AuthorizationType}, Handler: r,
		Token:      func() (string, error) { tokens++; return fmt.Sprintf("token-%d\n", tokens), nil },
		Synced:     func() { close(r.synced) },
		Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		r.Fatal(err)
	}
	ctx, cancel := context.WithCancel(r.ctx)
	donec := make(chan error, 1)
	go func() { donec <- c.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-donec; !errors.Is(err, context.Canceled) {
			r.Errorf("Run returned %v, want context canceled", err)
		}
	})
	r.Cleanup(r.stop)
	select {
	case <-r.synced:
	case <-r.ctx.Done():
		r.Fatal("not synced")
	}
}

// until waits for a state of the store.
func (r *rig) until(what string, cond func(*store.View) bool) {
	r.Helper()
	for {
		r.mu.Lock()
		wakec := r.wakec
		r.mu.Unlock()
		if cond(r.store.View()) {
			return
		}
		select {
		case <-wakec:
		case <-r.ctx.Done():
			r.Fatalf("waited in vain: %s", what)
		}
	}
}

func (r *rig) request(what string, cond func(fakexds.Request) bool) fakexds.Request {
	r.Helper()
	req, err := r.server.Wait(r.ctx, cond)
	if err != nil {
		r.Fatalf("%s: %v", what, err)
	}
	return req
}

func TestSubscribeAckAndChange(t *testing.T) {
	r := newRig(t)
	r.server.Set("a", address("a", 1))
	r.run()
	if !r.store.View().Synced || r.store.View().Mesh.Workload("a") == nil {
		t.Fatal("synced without the workload")
	}
	first := r.server.Requests()[0]
	if len(first.GetResourceNamesSubscribe()) != 0 || len(first.GetInitialResourceVersions()) != 0 {
		t.Errorf("first request is not a wildcard: %v", first)
	}
	if got, want := first.GetNode().GetId(), "ztunnel~1.1.1.1~ztunnel-1.ambit-system~ambit-system.svc.cluster.local"; got != want {
		t.Errorf("node id %q, want %q", got, want)
	}
	if got := first.Header.Get("authorization"); len(got) != 1 || got[0] != "Bearer token-1" {
		t.Errorf("authorization %q", got)
	}
	if got := first.Header.Get("clusterid"); len(got) != 1 || got[0] != "Kubernetes" {
		t.Errorf("clusterid %q", got)
	}
	r.request("ACK", func(q fakexds.Request) bool { return q.GetResponseNonce() != "" && q.GetErrorDetail() == nil })
	r.server.Remove(api.AddressType, "a")
	r.until("removal", func(v *store.View) bool { return v.Mesh.Workload("a") == nil })
}

func TestRejectsOneResourceAndAppliesTheRest(t *testing.T) {
	r := newRig(t)
	r.server.Set("good", address("good", 1))
	bad := address("bad", 2)
	bad.GetWorkload().Addresses = [][]byte{{1, 2, 3}}
	r.server.Set("bad", bad)
	r.server.SetAny(api.AddressType, "wrong", &anypb.Any{TypeUrl: "type.googleapis.com/other"})
	r.run()
	nack := r.request("NACK", func(q fakexds.Request) bool { return q.GetErrorDetail() != nil })
	for _, want := range []string{"bad: ", "address of 3 bytes", "wrong: value has type type.googleapis.com/other"} {
		if !strings.Contains(nack.GetErrorDetail().GetMessage(), want) {
			t.Errorf("NACK %q lacks %q", nack.GetErrorDetail().GetMessage(), want)
		}
	}
	if r.store.View().Mesh.Workload("good") == nil {
		t.Error("neighbour of a bad resource was not applied")
	}
	// A refused resource is asked for again after a reconnect.
	r.server.Restart(t)
	again := r.request("resume", func(q fakexds.Request) bool { return q.Stream == 2 && q.GetTypeUrl() == api.AddressType })
	if got := again.GetInitialResourceVersions(); len(got) != 1 || got["good"] == "" {
		t.Errorf("initial versions %v, want only good", got)
	}
}

func TestResumeWithoutResend(t *testing.T) {
	r := newRig(t)
	for i := range 20 {
		r.server.Set(fmt.Sprintf("w%d", i), address(fmt.Sprintf("w%d", i), byte(i)))
	}
	r.server.Set("default/p", &security.Authorization{Namespace: "default", Name: "p"})
	r.run()
	before := len(r.server.Responses())
	r.server.Restart(t)
	// Changes while the client is away or on its way back.
	r.server.Remove(api.AddressType, "w3")
	r.server.Set("w4", address("w4", 104))
	r.until("changes after the restart", func(v *store.View) bool {
		w := v.Mesh.Workload("w4")
		return v.Mesh.Workload("w3") == nil && w != nil && w.Addrs[0].As4()[3] == 104
	})
	r.request("policies", func(q fakexds.Request) bool {
		return q.Stream == 2 && q.GetTypeUrl() == api.AuthorizationType && q.GetResponseNonce() != ""
	})
	var sent []string
	for _, resp := range r.server.Responses()[before:] {
		for _, res := range resp.GetResources() {
			sent = append(sent, res.GetName())
		}
	}
	if len(sent) != 1 || sent[0] != "w4" {
		t.Errorf("after the reconnect %q were sent, want only w4", sent)
	}
	if r.server.Requests()[len(r.server.Requests())-1].Header.Get("authorization")[0] != "Bearer token-2" {
		t.Error("token was not read anew for the second stream")
	}
	if v := r.store.View(); v.Mesh.Workloads() != 19 || v.Policies.Len() != 1 {
		t.Errorf("%d workloads, %d policies", v.Mesh.Workloads(), v.Policies.Len())
	}
}

func TestResumeRequestStaysBelowTheMessageLimit(t *testing.T) {
	r := newRig(t)
	const n = 30000
	pad := strings.Repeat("x", 150)
	r.server.Update(func(set func(string, string, *anypb.Any), _ func(string, string)) {
		for i := range n {
			name := fmt.Sprintf("%s-%d", pad, i)
			a, err := anypb.New(address(name, byte(i), byte(i>>8)))
			if err != nil {
				t.Fatal(err)
			}
			set(api.AddressType, name, a)
		}
	})
	r.run()
	r.server.Restart(t)
	q := r.request("resume", func(q fakexds.Request) bool { return q.Stream == 2 && q.GetTypeUrl() == api.AddressType })
	if size := proto.Size(q.DeltaDiscoveryRequest); size > 4<<20 || size < 3<<20 {
		t.Errorf("request of %d bytes", size)
	}
	r.request("ACK", func(q fakexds.Request) bool {
		return q.Stream == 2 && q.GetTypeUrl() == api.AddressType && q.GetResponseNonce() != ""
	})
	if got := r.store.View().Mesh.Workloads(); got != n {
		t.Errorf("%d workloads, want %d", got, n)
	}
}

// TestServerAwayAndUntrusted: a client without its control plane keeps trying,
// and what it knows stays in force.
func TestServerAwayAndUntrusted(t *testing.T) {
	r := newRig(t)
	r.server.Set("a", address("a", 1))
	r.run()
	r.server.Stop()
	if r.store.View().Mesh.Workload("a") == nil {
		t.Fatal("workload went with the control plane")
	}
	other := fakexds.New(t)
	c, err := client.New(client.Config{
		Target: other.Addr(), TLS: r.server.TLS, Types: []string{api.AddressType}, Handler: r,
		Synced: func() { t.Error("synced with an untrusted server") },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := c.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Run returned %v", err)
	}
	if n := len(other.Requests()); n > 0 {
		t.Errorf("%d requests were sent to a server with another root", n)
	}
}

// Dashboards and alerts depend on these names.
func TestExportedMetrics(t *testing.T) {
	golden.Run(t, "testdata/metrics.txtar", func(t *testing.T, ar *golden.Archive) {
		reg := prometheus.NewRegistry()
		_, err := client.New(client.Config{
			Target: "ambitd:15012", TLS: func() (*tls.Config, error) { return nil, nil },
			Types: []string{api.AddressType}, Handler: store.New(store.Config{}), Registerer: reg,
		})
		if err != nil {
			t.Fatal(err)
		}
		ar.Want("metrics", golden.Metrics(reg))
	})
}
