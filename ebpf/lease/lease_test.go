package lease_test

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/lease"
	wire "github.com/ambit-mesh/ambit/xds/api/lease"
)

// kernel is a Holder that tells what it is asked for.
type kernel struct {
	metrics *prometheus.Registry
	askedc  chan any
	owner   lease.Events
	refuse  atomic.Bool
}

func (k *kernel) Grant(o lease.Events, g lease.Grant) error {
	k.owner = o
	k.askedc <- g
	if k.refuse.Load() {
		return &lease.RefusedError{Reason: "no"}
	}
	return nil
}
func (k *kernel) Renew(lease.Events) error              { k.askedc <- "renew"; return nil }
func (k *kernel) Cut(_ lease.Events, conn uint64) error { k.askedc <- conn; return nil }
func (k *kernel) Abandon(o lease.Events)                { k.askedc <- "abandon" }

// proxy hears of connections.
type proxy struct{ heardc chan any }

func (p *proxy) Opened(o lease.Opened) { p.heardc <- o }
func (p *proxy) Closed(c lease.Closed) { p.heardc <- c }

var grant = lease.Grant{
	Key: lease.Key{NetNS: 7, Addr: netip.MustParseAddrPort("10.96.0.1:80")},
	Targets: []lease.Target{
		{NetNS: 8, Addr: netip.MustParseAddrPort("10.8.0.2:8080"), Share: 1 << 30},
		{NetNS: 9, Addr: netip.MustParseAddrPort("10.8.0.3:8080"), Share: 1 << 30},
	},
	Cut: true,
}

func start(t *testing.T, admit func(handoff.Peer) error) (*kernel, *proxy, *lease.Client, chan string, string) {
	t.Helper()
	k, p := &kernel{askedc: make(chan any, 16)}, &proxy{make(chan any, 16)}
	dir, err := os.MkdirTemp("", "lease") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "lease.sock")
	k.metrics = prometheus.NewRegistry()
	srv, err := lease.Listen(lease.ServerConfig{Path: path, Holder: k, Admit: admit, Registerer: k.metrics})
	if err != nil {
		t.Fatal(err)
	}
	linkc := make(chan string, 64)
	c := lease.NewClient(lease.ClientConfig{Path: path, Events: p, Connected: func() { linkc <- "up" }, Disconnected: func() {
		select {
		case linkc <- "down":
		default:
		}
	}})
	ctx, cancel := context.WithCancel(context.Background())
	donec := make(chan error, 2)
	go func() { donec <- srv.Run(ctx) }()
	go func() { donec <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-donec; err != nil {
				t.Error(err)
			}
		}
		os.RemoveAll(dir)
	})
	return k, p, c, linkc, path
}

func admitAll(handoff.Peer) error { return nil }

func receive[T any](t *testing.T, c chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(60 * time.Second):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

func TestLeaseRequestsAndEvents(t *testing.T) {
	k, p, c, linkc, _ := start(t, func(peer handoff.Peer) error {
		if peer.PID != os.Getpid() {
			return errors.New("not the proxy")
		}
		return nil
	})
	if got := receive(t, linkc); got != "up" {
		t.Fatalf("link is %s", got)
	}
	if err := c.Grant(grant); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, k.askedc); !reflect.DeepEqual(got, grant) {
		t.Errorf("asked for %+v, want %+v", got, grant)
	}
	if err := errors.Join(c.Renew(), c.Cut(11)); err != nil {
		t.Fatal(err)
	}
	if a, b := receive(t, k.askedc), receive(t, k.askedc); a != "renew" || b != uint64(11) {
		t.Errorf("asked for %v and %v", a, b)
	}
	k.refuse.Store(true)
	if _, ok := errors.AsType[*lease.RefusedError](c.Grant(grant)); !ok {
		t.Error("a refusal does not arrive as one")
	}
	receive(t, k.askedc)
	o := lease.Opened{Conn: 11, Key: grant.Key, Target: 8, Src: netip.MustParseAddrPort("10.8.0.9:40000"), Dst: grant.Targets[0].Addr, Age: time.Millisecond}
	k.owner.Opened(o)
	if got := receive(t, p.heardc); got != o {
		t.Errorf("heard %+v, want %+v", got, o)
	}
	k.wantMetrics(t, 1, 0)
	cl := lease.Closed{Conn: 11, Sent: 5, Received: 6, RTT: 7 * time.Microsecond, Retransmits: 1, Took: time.Second, Failed: true}
	k.owner.Closed(cl)
	if got := receive(t, p.heardc); got != cl {
		t.Errorf("heard %+v, want %+v", got, cl)
	}
	k.wantMetrics(t, 0, 0)
	o.Conn = 12
	k.owner.Opened(o)
	k.owner.Closed(lease.Closed{Conn: 12, Lost: true})
	k.wantMetrics(t, 0, 1)
}

// wantMetrics compares the agent's live connections and those that were lost.
func (k *kernel) wantMetrics(t *testing.T, live, lost float64) {
	t.Helper()
	all, err := k.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range all {
		m := f.GetMetric()[0]
		got[f.GetName()] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
	}
	want := map[string]float64{"ambit_node_direct_connections": live, "ambit_node_direct_connections_lost_total": lost}
	if !maps.Equal(got, want) {
		t.Errorf("metrics are %v, want %v", got, want)
	}
}

// TestLeaseEndsWithItsProxy has a proxy that breaks off, and one that talks
// nonsense.
func TestLeaseEndsWithItsProxy(t *testing.T) {
	k, _, _, _, path := start(t, admitAll)
	garbage := []byte{0xff, 0xff, 0xff}
	endless, err := proto.Marshal(&wire.Request{Payload: &wire.Request_Grant{Grant: &wire.Grant{To: &wire.Endpoint{Address: []byte{1}}}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		send []byte
	}{{"leaves", nil}, {"garbage", garbage}, {"address of one byte", endless}, {"too long", make([]byte, 2000)}, {"unknown", []byte{0x7a, 0}}} {
		c, err := net.Dial("unixpacket", path)
		if err != nil {
			t.Fatal(err)
		}
		if tc.send != nil {
			if _, err := c.Write(tc.send); err != nil {
				t.Fatal(err)
			}
			if n, err := c.Read(make([]byte, 10)); n > 0 {
				t.Errorf("%s: answered (%v)", tc.name, err)
			}
		}
		c.Close()
		if got := receive(t, k.askedc); got != "abandon" {
			t.Errorf("%s: %v, want its leases abandoned", tc.name, got)
		}
	}
}

func TestLeaseStrangersAreTurnedAway(t *testing.T) {
	k, _, c, linkc, _ := start(t, func(handoff.Peer) error { return errors.New("not the proxy") })
	receive(t, linkc)
	if err := c.Grant(grant); err == nil {
		t.Error("a stranger was granted a lease")
	}
	select {
	case got := <-k.askedc:
		t.Errorf("a stranger's request reached the kernel: %v", got)
	default:
	}
}

func TestLeaseWithoutAgent(t *testing.T) {
	c := lease.NewClient(lease.ClientConfig{Path: "/nonexistent"})
	if err := c.Grant(grant); !errors.Is(err, lease.ErrNoAgent) {
		t.Errorf("error is %v, want ErrNoAgent", err)
	}
}

func TestGrantCheck(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(*lease.Grant)
		bad  bool
	}{
		{"complete", func(*lease.Grant) {}, false},
		{"end", func(g *lease.Grant) { g.Targets = nil }, false},
		{"no namespace", func(g *lease.Grant) { g.Key.NetNS = 0 }, true},
		{"no port", func(g *lease.Grant) { g.Key.Addr = netip.AddrPortFrom(g.Key.Addr.Addr(), 0) }, true},
		{"mapped", func(g *lease.Grant) { g.Key.Addr = netip.MustParseAddrPort("[::ffff:10.0.0.1]:80") }, true},
		{"family", func(g *lease.Grant) { g.Targets[0].Addr = netip.MustParseAddrPort("[fd00::1]:80") }, true},
		{"no share", func(g *lease.Grant) { g.Targets[0].Share = 0 }, true},
		{"more than all", func(g *lease.Grant) { g.Targets[0].Share, g.Targets[1].Share = lease.All, 1 }, true},
		{"twice", func(g *lease.Grant) { g.Targets[1] = g.Targets[0] }, true},
		{"itself", func(g *lease.Grant) { g.Targets[1].NetNS = g.Key.NetNS }, true},
		{"too many", func(g *lease.Grant) { g.Targets = make([]lease.Target, lease.MaxTargets+1) }, true},
	} {
		g := grant
		g.Targets = append([]lease.Target(nil), grant.Targets...)
		tc.edit(&g)
		if err := g.Check(); (err != nil) != tc.bad {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}
