package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/delta"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
)

// onDemand is a client on demand against our control plane's own state machine.
type onDemand struct {
	*testing.T
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	served *delta.Store
	store  *store.Store
	client *client.Client
	grpc   *grpc.Server
	creds  credentials.TransportCredentials
	addr   string
	serves sync.WaitGroup

	mu       sync.Mutex
	requests []*discovery.DeltaDiscoveryRequest
	wakes    []chan struct{}
}

func newOnDemand(t *testing.T) *onDemand {
	ca := meshca.New(t, "cluster.local")
	leaf := ca.Leaf(t, identity.ID{}, meshca.Names("localhost"))
	o := &onDemand{T: t, served: delta.NewStore(api.AuthorizationType, api.AddressType), store: store.New(store.Config{}),
		creds: credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{leaf}, NextProtos: []string{"h2"}})}
	o.listen("127.0.0.1:0")
	var err error
	o.client, err = client.New(client.Config{
		Target: o.addr, ServerName: "localhost", Types: []string{api.AddressType, api.AuthorizationType}, Handler: o.store,
		TLS:      func() (*tls.Config, error) { return &tls.Config{RootCAs: ca.Pool()}, nil },
		OnDemand: api.AddressType, Has: o.has,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	donec := make(chan struct{})
	go func() { defer close(donec); _ = o.client.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-donec; o.stop(); o.store.Close() })
	return o
}

func (o *onDemand) has(name string) bool { return o.store.View().Mesh.Has(name) }

func (o *onDemand) listen(addr string) {
	o.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		o.Fatal(err)
	}
	o.addr = ln.Addr().String()
	g := grpc.NewServer(grpc.Creds(o.creds))
	discovery.RegisterAggregatedDiscoveryServiceServer(g, o)
	o.grpc = g
	o.serves.Go(func() { _ = g.Serve(ln) })
}

func (o *onDemand) stop() { o.grpc.Stop(); o.serves.Wait() }

func (o *onDemand) DeltaAggregatedResources(g grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]) error {
	state, wakec, requests := o.served.NewStream(delta.Limits{}), make(chan struct{}, 1), make(chan *discovery.DeltaDiscoveryRequest)
	o.mu.Lock()
	o.wakes = append(o.wakes, wakec)
	o.mu.Unlock()
	go func() { // ends with the stream
		for {
			r, err := g.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- r:
			case <-g.Context().Done():
				return
			}
		}
	}()
	for {
		select {
		case r := <-requests:
			o.mu.Lock()
			o.requests = append(o.requests, r)
			o.mu.Unlock()
			if _, err := state.Request(r); err != nil {
				return err
			}
		case <-wakec:
		case <-g.Context().Done():
			return nil
		}
		for {
			resp, err := state.Next()
			if err != nil {
				return err
			}
			if resp == nil {
				break
			}
			if err := g.Send(resp); err != nil {
				return err
			}
		}
	}
}

func (o *onDemand) apply(up []delta.Upsert, gone ...string) {
	o.Helper()
	var removals []delta.Removal
	for _, n := range gone {
		removals = append(removals, delta.Removal{Type: api.AddressType, Name: n})
	}
	if _, err := o.served.Apply(up, removals); err != nil {
		o.Fatal(err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, w := range o.wakes {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

func pod(uid string, last byte, services ...string) delta.Upsert {
	a := address(uid, last)
	a.GetWorkload().Services = map[string]*workload.PortList{}
	for _, s := range services {
		a.GetWorkload().Services[s] = &workload.PortList{}
	}
	return delta.Upsert{Type: api.AddressType, Name: uid, Aliases: []string{"/10.0.0." + string('0'+last)}, Via: services, Message: a}
}

func svc(name string) delta.Upsert {
	return delta.Upsert{Type: api.AddressType, Name: "default/" + name, Aliases: []string{"/10.9.0.1"}, Message: &workload.Address{Type: &workload.Address_Service{
		Service: &workload.Service{Name: name, Namespace: "default", Hostname: name, Addresses: []*workload.NetworkAddress{{Address: []byte{10, 9, 0, 1}}}}}}}
}

func (o *onDemand) demand(keys ...string) error {
	o.Helper()
	ctx, cancel := context.WithTimeout(o.Context(), 60*time.Second)
	defer cancel()
	return o.client.Demand(ctx, keys...)
}

func TestOnDemandKnowsWhatWasAskedFor(t *testing.T) {
	o := newOnDemand(t)
	o.apply([]delta.Upsert{pod("a", 1, "default/web"), pod("b", 2, "default/web"), pod("c", 3), svc("web")})
	if err := o.demand("c"); err != nil {
		t.Fatal(err)
	}
	if n := o.store.View().Mesh.Workloads(); n != 1 {
		t.Fatalf("%d workloads known after one was asked for", n)
	}
	// An address: the service and, in the same word, its workloads.
	if err := o.demand("/10.9.0.1"); err != nil {
		t.Fatal(err)
	}
	m := o.store.View().Mesh
	if m.Services() != 1 || m.Endpoints(mesh.Hostname{Namespace: "default", Name: "web"}).Len() != 2 {
		t.Fatalf("%d services, %d endpoints", m.Services(), m.Endpoints(mesh.Hostname{Namespace: "default", Name: "web"}).Len())
	}
	// What is not there is said at once, and counts once it is.
	if err := o.demand("/10.0.0.9", "default/none"); err != nil {
		t.Fatal(err)
	}
	if o.has("/10.0.0.9") {
		t.Error("something came from nothing")
	}
	o.apply([]delta.Upsert{pod("i", 9)})
	o.until("the late workload, unasked", func() bool { return o.has("/10.0.0.9") })
	// A new endpoint of what is subscribed to by address.
	o.apply([]delta.Upsert{pod("d", 4, "default/web")})
	o.until("the new endpoint", func() bool { return o.has("d") })
	o.apply(nil, "a")
	o.until("the endpoint's end", func() bool { return !o.has("a") })
	o.apply([]delta.Upsert{pod("e", 5)})
	if err := o.demand("e"); err != nil || !o.has("e") || o.store.View().Mesh.Workloads() != 5 {
		t.Errorf("%v, %d workloads", err, o.store.View().Mesh.Workloads())
	}
}

func (o *onDemand) until(what string, cond func() bool) {
	o.Helper()
	changed := make(chan struct{}, 1)
	defer o.store.Subscribe(func(_, _ *store.View, _ store.Change) {
		select {
		case changed <- struct{}{}:
		default:
		}
	})()
	for deadline := time.After(60 * time.Second); !cond(); {
		select {
		case <-changed:
		case <-deadline:
			o.Fatalf("never: %s", what)
		}
	}
}

func TestOnDemandManyWaitForOneKey(t *testing.T) {
	o := newOnDemand(t)
	o.apply([]delta.Upsert{pod("a", 1)})
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if err := o.demand("/10.0.0.1", "/10.0.0.8"); err != nil || !o.has("/10.0.0.1") {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	asked := 0
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, r := range o.requests {
		for _, n := range r.ResourceNamesSubscribe {
			if n == "/10.0.0.1" {
				asked++
			}
		}
		if _, first := r.InitialResourceVersions["/10.0.0.1"]; first {
			asked++
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times, want once for all", asked)
	}
}

// While the control plane is away nothing is decided about what is unknown, and
// what was asked for meanwhile is in the first request afterwards.
func TestOnDemandResumesWithWhatIsPending(t *testing.T) {
	o := newOnDemand(t)
	o.apply([]delta.Upsert{pod("a", 1), pod("b", 2)})
	if err := o.demand("a"); err != nil {
		t.Fatal(err)
	}
	o.stop()
	if err := o.demand("a"); err != nil {
		t.Errorf("what is known must not wait: %v", err)
	}
	pending := make(chan error, 1)
	go func() { pending <- o.demand("/10.0.0.2") }()
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() { gone <- o.client.Demand(ctx, "/10.0.0.2") }()
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("a waiter that left: %v", err)
	}
	o.mu.Lock()
	before := len(o.requests)
	o.mu.Unlock()
	o.listen(o.addr)
	if err := <-pending; err != nil || !o.has("b") {
		t.Fatalf("%v", err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	first := o.requests[before]
	for _, r := range o.requests[before:] {
		if r.TypeUrl == api.AddressType && r.ResponseNonce == "" { // with one it is the last of the stream before
			first = r
			break
		}
	}
	if !slices.Equal(first.ResourceNamesSubscribe, []string{"*"}) || !slices.Equal(first.ResourceNamesUnsubscribe, []string{"*"}) ||
		first.InitialResourceVersions["a"] == "" {
		t.Errorf("resumed with %v", first)
	}
}
