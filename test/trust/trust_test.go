package trust

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/test/netlab"
	"github.com/ambit-mesh/ambit/xds/app"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/ca"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

func TestMain(m *testing.M) { leak.Main(m) }

// limit is reached only by a test that fails.
const limit = 60 * time.Second

// mesh is an ambitd and two nodes with a pod each.
type mesh struct {
	*testing.T
	ctx   context.Context
	state string
	addr  string
	a, b  *node
}

// node is what of a node proxy concerns certificates: the manager, and tunnels
// that stand on it in both directions.
type node struct {
	id      identity.ID
	certs   *cert.Manager
	tunnels *hbone.Dialer
	addr    netip.AddrPort

	mu   sync.Mutex
	cuts []error
}

func podYAML(name, namespace, account, node string, n int) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s, uid: uid-%[1]s}
spec: {nodeName: %[4]s, serviceAccountName: %[3]s, containers: [{name: c, image: i}]}
status: {phase: Running, podIP: 10.0.0.%[5]d, podIPs: [{ip: 10.0.0.%[5]d}], conditions: [{type: Ready, status: "True"}]}
---
`, name, namespace, account, node, n)
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	m := &mesh{T: t, ctx: ctx, state: t.TempDir()}
	source := t.TempDir()
	yaml := podYAML("zt-a", "ambit-system", "ztunnel", "node-a", 1) + podYAML("zt-b", "ambit-system", "ztunnel", "node-b", 2) +
		podYAML("pod-a", "demo", "a", "node-a", 3) + podYAML("pod-b", "demo", "b", "node-b", 4)
	if err := os.WriteFile(filepath.Join(source, "pods.yaml"), []byte(yaml), 0o644); err != nil {
		t.Fatal(err)
	}
	m.addr = freePort(t)
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	wg.Go(func() {
		cfg := app.Config{Sources: []string{source}, StateDir: m.state, Listen: []string{m.addr}, Monitoring: "127.0.0.1:0"}
		_, levels := boot.NewLogger(io.Discard, "text", "info")
		if err := app.Run(ctx, cfg, log.With("who", "ambitd"), levels, prometheus.NewRegistry()); err != nil {
			t.Errorf("ambitd: %v", err)
		}
	})
	m.until("ambitd has a CA", func() bool { _, err := os.Stat(filepath.Join(m.state, "ca-cert.pem")); return err == nil })
	m.a, m.b = m.node("a", &wg, log), m.node("b", &wg, log)
	return m
}

func freePort(t *testing.T) string {
	ln := netlab.ListenAgain(t)
	defer ln.Close()
	return ln.Addr().String()
}

func (m *mesh) until(what string, f func() bool) {
	m.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-m.ctx.Done():
			m.Fatalf("did not happen: %s", what)
		}
	}
}

func (m *mesh) node(name string, wg *sync.WaitGroup, log *slog.Logger) *node {
	m.Helper()
	tokens, err := ca.OpenTokens(m.state, nil, nil)
	if err != nil {
		m.Fatal(err)
	}
	client, err := cert.NewClient(cert.CAConfig{
		Target: m.addr,
		TLS: func() (*tls.Config, error) { // as ztunnel: the file is read for each connection
			pem, err := os.ReadFile(filepath.Join(m.state, ca.RootFile))
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM(pem)
			return &tls.Config{RootCAs: roots, ServerName: "localhost", NextProtos: []string{"h2"}}, err
		},
		Token: func() (string, error) {
			return tokens.Mint(ca.Caller{Namespace: "ambit-system", ServiceAccount: "ztunnel", PodName: "zt-" + name, PodUID: "uid-zt-" + name, Node: "node-" + name}, "", time.Hour)
		},
	})
	if err != nil {
		m.Fatal(err)
	}
	n := &node{id: identity.MustParse("spiffe://cluster.local/ns/demo/sa/" + name)}
	n.certs = cert.New(cert.Config{Authority: client, ReplaceSpread: time.Second, Logger: log.With("who", name)})
	n.certs.Retain([]identity.ID{n.id})
	n.tunnels = n.dialer()
	srv := hbone.NewServer(hbone.ServerConfig{
		TLS: func(ctx context.Context, _ netip.AddrPort) (*tls.Config, error) {
			if _, err := n.certs.Get(ctx, n.id); err != nil {
				return nil, err
			}
			return n.certs.ServerConfig(n.id), nil
		},
		Handler: func(_ context.Context, r *hbone.Request) {
			s, err := r.Accept()
			if err != nil {
				return
			}
			defer s.Close()
			_, _ = io.Copy(s, s)
			_ = s.CloseWrite()
		},
		Opened: n.track(cert.Destination),
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		m.Fatal(err)
	}
	n.addr = netip.MustParseAddrPort(ln.Addr().String())
	work, stop := context.WithCancel(context.Background())
	wg.Go(func() { _ = n.certs.Run(work) })
	wg.Go(func() { _ = n.certs.FollowTrust(work, client) })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { _ = srv.ServeConn(work, c) })
		}
	})
	m.Cleanup(func() {
		_ = n.tunnels.Close()
		_, _ = ln.Close(), srv.Close()
		stop()
		_ = client.Close()
	})
	return n
}

func (n *node) track(side cert.Side) func(*tls.ConnectionState, func(error)) func() {
	return func(cs *tls.ConnectionState, cut func(error)) func() {
		return n.certs.Track(side, cs, func(err error) {
			n.mu.Lock()
			n.cuts = append(n.cuts, err)
			n.mu.Unlock()
			cut(err)
		})
	}
}

func (n *node) dialer() *hbone.Dialer {
	return hbone.NewDialer(hbone.DialerConfig{
		DialTransport: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", k.Addr.String())
		},
		TLS: func(ctx context.Context, k hbone.Key) (*tls.Config, error) {
			peers, err := cert.SplitPeers(k.Peers)
			if err != nil {
				return nil, err
			}
			if _, err := n.certs.Get(ctx, k.Local); err != nil {
				return nil, err
			}
			return n.certs.ClientConfig(k.Local, peers), nil
		},
		Opened: n.track(cert.Source),
	})
}

// open makes a stream to another node's pod.
func (n *node) open(ctx context.Context, d *hbone.Dialer, to *node) (*hbone.Stream, error) {
	s, _, err := d.Connect(ctx, hbone.Key{Local: n.id, Peers: to.id.String(), Addr: to.addr}, hbone.ConnectRequest{Authority: "10.0.0.9:80"})
	return s, err
}

// echo sends a message and waits for it.
func echo(s *hbone.Stream, text string) error {
	if _, err := io.WriteString(s, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(s, got); err != nil {
		return err
	}
	if string(got) != text {
		return fmt.Errorf("sent %q, got %q", text, got)
	}
	return nil
}

// call is one exchange, over a tunnel of its own if fresh.
func (n *node) call(ctx context.Context, to *node, fresh bool) error {
	d := n.tunnels
	if fresh {
		d = n.dialer()
		defer d.Close()
	}
	s, err := n.open(ctx, d, to)
	if err != nil {
		return err
	}
	defer s.Close()
	return echo(s, "hello")
}

// load calls in both directions, over shared and over fresh tunnels, until the
// stop; it returns how many calls there were and what failed.
type load struct {
	mu     sync.Mutex
	calls  int
	failed []error
	stop   func()
}

func (m *mesh) load() *load {
	l := &load{}
	ctx, cancel := context.WithCancel(m.ctx)
	var wg sync.WaitGroup
	for _, pair := range [][2]*node{{m.a, m.b}, {m.b, m.a}} {
		for _, fresh := range []bool{true, false} {
			wg.Go(func() {
				for ctx.Err() == nil {
					err := pair[0].call(m.ctx, pair[1], fresh)
					l.mu.Lock()
					l.calls++
					if err != nil && len(l.failed) < 20 {
						l.failed = append(l.failed, fmt.Errorf("%s to %s, fresh %v: %w", pair[0].id, pair[1].id, fresh, err))
					}
					l.mu.Unlock()
				}
			})
		}
	}
	l.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	m.Cleanup(l.stop)
	return l
}

func (l *load) count() int { l.mu.Lock(); defer l.mu.Unlock(); return l.calls }

// more waits until n further calls were made.
func (m *mesh) more(l *load, n int) {
	m.Helper()
	target := l.count() + n
	m.until("calls go on", func() bool { return l.count() >= target })
}

// keep runs a command on the state directory, as `ambitd ca` does.
func (m *mesh) keep(do func(*ca.Keeper) (*ca.Report, error)) *ca.Report {
	m.Helper()
	k, err := ca.Keep(ca.Config{StateDir: m.state, TrustDomain: "cluster.local"})
	if err != nil {
		m.Fatal(err)
	}
	defer k.Close()
	r, err := do(k)
	if err != nil {
		m.Fatal(err)
	}
	m.Log(r.Phase, r.Did)
	return r
}

func (m *mesh) nodes() []*node { return []*node{m.a, m.b} }

// roots waits until both nodes trust n roots.
func (m *mesh) roots(n int) {
	m.Helper()
	m.until(fmt.Sprint(n, " roots at both nodes"), func() bool {
		return len(m.a.certs.Trust().Roots("cluster.local")) == n && len(m.b.certs.Trust().Roots("cluster.local")) == n
	})
}

// leavesOf waits until both nodes show a certificate of this CA.
func (m *mesh) leavesOf(fingerprint string) {
	m.Helper()
	m.until("certificates of "+fingerprint, func() bool {
		for _, n := range m.nodes() {
			c, err := n.certs.Get(m.ctx, n.id)
			if err != nil {
				m.Fatal(err)
			}
			by := signer(c)
			if by == nil || ca.Fingerprint(by) != fingerprint {
				return false
			}
		}
		return true
	})
}

func signer(c *cert.Certificate) *x509.Certificate {
	for _, r := range append(append([]*x509.Certificate(nil), c.Chain...), c.Roots...) {
		if c.Leaf.CheckSignatureFrom(r) == nil {
			return r
		}
	}
	return nil
}

func (n *node) cutBy() []error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]error(nil), n.cuts...)
}
