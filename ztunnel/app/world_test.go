package app

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/test/netlab"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/client"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/inpod"
)

const waitLimit = 60 * time.Second

// world is a mesh of pods in real network namespaces, joined by one router,
// with a real data path per node and real redirection rules. What the control
// plane would say is said by the test.
//
//	pod a (node-1) ──┐
//	pod b (node-2) ──┼── router
//	client, no mesh ─┘
type world struct {
	*testing.T
	ca     *meshca.CA
	router *netlab.Host
	nodes  map[string]*testNode
	pods   map[string]*testPod
	v6     bool

	mu        sync.Mutex
	authority map[string]func(id identity.ID, pub *ecdsa.PublicKey) ([]string, error) // by namespace/sa
}

type testNode struct {
	*node
	pods *inpod.Manager
	logs *logBuffer
	reg  *prometheus.Registry
}

type testPod struct {
	*netlab.Host
	name   string
	ip, v6 netip.Addr
	node   *testNode
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
	c  chan struct{}
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.c)
	l.c = make(chan struct{})
	return l.b.Write(p)
}

// want waits for a line that contains all parts and returns it.
func (l *logBuffer) want(t testing.TB, parts ...string) string {
	t.Helper()
	deadline := time.After(waitLimit)
	for {
		l.mu.Lock()
		text, c := l.b.String(), l.c
		l.mu.Unlock()
	line:
		for s := range strings.Lines(text) {
			for _, p := range parts {
				if !strings.Contains(s, p) {
					continue line
				}
			}
			return s
		}
		select {
		case <-c:
		case <-deadline:
			t.Fatalf("no log line with %q in:\n%s", parts, text)
		}
	}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	netlab.Require(t)
	w := &world{T: t, ca: meshca.New(t, "cluster.local"), nodes: map[string]*testNode{}, pods: map[string]*testPod{}, v6: netlab.IPv6(),
		authority: map[string]func(identity.ID, *ecdsa.PublicKey) ([]string, error){}}
	w.router = netlab.MustHost(t, "router")
	w.check(w.router.Forward())
	return w
}

func (w *world) check(errs ...error) {
	w.Helper()
	if err := errors.Join(errs...); err != nil {
		w.Fatal(err)
	}
}

// Sign is the CA: by default it signs whatever is asked.
func (w *world) Sign(_ context.Context, id identity.ID, csr string, _ time.Duration) ([]string, error) {
	b, _ := pem.Decode([]byte(csr))
	req, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	f := w.authority[id.Namespace()+"/"+id.ServiceAccount()]
	w.mu.Unlock()
	if f != nil {
		return f(id, req.PublicKey.(*ecdsa.PublicKey))
	}
	return w.ca.ChainPEM(w.ca.Sign(w.T, req.PublicKey.(*ecdsa.PublicKey), id)), nil
}

func (w *world) addNode(name string) *testNode {
	cfg := Defaults()
	cfg.NodeName, cfg.TerminationDeadline = name, time.Second
	n := &testNode{logs: &logBuffer{c: make(chan struct{})}, reg: prometheus.NewRegistry()}
	log, _ := boot.NewLogger(n.logs, "text", "debug")
	n.node = newNode(cfg, log, n.reg, w)
	n.pods = inpod.New(inpod.Config{
		Serve: func(p handoff.Pod) (inpod.Handlers, error) {
			return n.serve(p, podNet{originalDst: originalDst}), nil
		},
		DrainTimeout: time.Second, Mark: int(cfg.PacketMark), IPv6: w.v6, Logger: boot.Scoped(log, "inpod"), Changed: n.changed.signal,
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{n.certs.Run, n.flow.Run, n.origins.Run, func(ctx context.Context) error { return n.identities(ctx, n.pods.Pods) }} {
		wg.Go(func() { _ = run(ctx) })
	}
	w.Cleanup(func() {
		dctx, dcancel := context.WithTimeout(context.Background(), time.Second)
		defer dcancel()
		n.pods.Shutdown(dctx)
		_ = n.tunnels.Close()
		n.leases.Close()
		cancel()
		wg.Wait()
		n.store.Close()
		if w.Failed() {
			w.Logf("log of %s:\n%s", name, n.logs.text())
		}
	})
	w.nodes[name] = n
	return n
}

// addHost joins a namespace to the router under 10.i.0.2 and fd00:i::2.
func (w *world) addHost(name string) *testPod {
	w.Helper()
	i := len(w.pods) + 1
	p := &testPod{Host: netlab.MustHost(w.T, name), name: name, ip: netip.AddrFrom4([4]byte{10, byte(i), 0, 2})}
	prefix := netip.MustParsePrefix
	w.check(netlab.Cable(p.Host, "eth0", w.router, name), p.Up("eth0"), w.router.Up(name),
		p.Addr("eth0", netip.PrefixFrom(p.ip, 24)), w.router.Addr(name, prefix(fmt.Sprintf("10.%d.0.1/24", i))),
		p.Route(netlab.Route{Dst: prefix("0.0.0.0/0"), Via: netip.AddrFrom4([4]byte{10, byte(i), 0, 1})}))
	if w.v6 {
		p.v6 = netip.MustParseAddr(fmt.Sprintf("fd00:%d::2", i))
		w.check(p.Addr("eth0", netip.PrefixFrom(p.v6, 64)), w.router.Addr(name, prefix(fmt.Sprintf("fd00:%d::1/64", i))),
			p.Route(netlab.Route{Dst: prefix("::/0"), Via: netip.MustParseAddr(fmt.Sprintf("fd00:%d::1", i))}))
	}
	w.pods[name] = p
	return p
}

// addPod enrols a pod: rules, workload, hand-over.
func (w *world) addPod(name, node string) *testPod {
	w.Helper()
	p := w.addHost(name)
	p.node = w.nodes[node]
	rules, err := redirect.New(redirect.Config{})
	w.check(err)
	w.check(rules.Apply(p.NS, redirect.PodRules{IPv6: w.v6}))
	w.setWorkload(p, node)
	w.handOver(p)
	return p
}

func (w *world) handOver(p *testPod) {
	w.Helper()
	ns, err := p.NS.Dup()
	w.check(err)
	w.check(p.node.pods.AddPod(context.Background(), handoff.Pod{UID: "uid-" + p.name, Name: p.name, Namespace: "default", ServiceAccount: p.name, NS: ns}))
}

func (w *world) setWorkload(p *testPod, node string, policies ...string) {
	m := w.workload(p, node, policies...)
	w.push(api.AddressType, m.GetWorkload().Uid, m)
}

func (w *world) workload(p *testPod, node string, policies ...string) *workload.Address {
	m := &workload.Workload{
		Uid: "Kubernetes//Pod/default/" + p.name, Name: p.name, Namespace: "default", ServiceAccount: p.name, TrustDomain: "cluster.local",
		Node: node, ClusterId: "Kubernetes", CanonicalName: p.name, CanonicalRevision: "v1", WorkloadName: p.name,
		TunnelProtocol: workload.TunnelProtocol_HBONE, Addresses: [][]byte{p.ip.AsSlice()}, AuthorizationPolicies: policies,
		Services: map[string]*workload.PortList{"default/svc-" + p.name + ".default.svc.cluster.local": {
			Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080}}}},
	}
	if p.v6.IsValid() {
		m.Addresses = append(m.Addresses, p.v6.AsSlice())
	}
	return &workload.Address{Type: &workload.Address_Workload{Workload: m}}
}

func (w *world) setService(p *testPod, vip string) {
	host := "svc-" + p.name + ".default.svc.cluster.local"
	w.push(api.AddressType, "default/"+host, &workload.Address{Type: &workload.Address_Service{Service: &workload.Service{
		Name: "svc-" + p.name, Namespace: "default", Hostname: host, Addresses: []*workload.NetworkAddress{{Address: netip.MustParseAddr(vip).AsSlice()}},
		Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080}},
	}}})
}

func (w *world) setPolicy(a *security.Authorization) {
	w.push(api.AuthorizationType, a.Namespace+"/"+a.Name, a)
}

// push tells every node.
func (w *world) push(typeURL, name string, m proto.Message) {
	w.Helper()
	v, err := anypb.New(m)
	w.check(err)
	for _, n := range w.nodes {
		if r := n.store.Apply(client.Delta{Type: typeURL, Added: []client.Resource{{Name: name, TypeURL: v.TypeUrl, Value: v.Value}}}); len(r) > 0 {
			w.Fatalf("refused: %v", r)
		}
	}
}

func (w *world) remove(typeURL, name string) {
	for _, n := range w.nodes {
		n.store.Apply(client.Delta{Type: typeURL, Removed: []string{name}})
	}
}

// listen serves connections inside a pod until the test ends.
func (w *world) listen(p *testPod, port int, serve func(*net.TCPConn)) {
	w.Helper()
	addr, network := fmt.Sprintf("0.0.0.0:%d", port), "tcp4"
	if w.v6 {
		addr, network = fmt.Sprintf("[::]:%d", port), "tcp"
	}
	ln, err := p.NS.Listen(context.Background(), &net.ListenConfig{}, network, addr)
	w.check(err)
	var wg sync.WaitGroup
	ctx, end := context.WithCancel(context.Background())
	// What is still open by then may have nobody left to end it.
	w.Cleanup(func() { _ = ln.Close(); end(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { _ = c.Close() })()
				_ = c.SetDeadline(time.Now().Add(waitLimit))
				serve(c.(*net.TCPConn))
			})
		}
	})
}

func (w *world) dial(p *testPod, addr string) (*net.TCPConn, error) {
	c, err := p.NS.Dial(context.Background(), &net.Dialer{Timeout: waitLimit}, "tcp", addr)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(waitLimit))
	w.Cleanup(func() { _ = c.Close() })
	return c.(*net.TCPConn), nil
}

// whoami answers the peer's address, then echoes.
func whoami(c *net.TCPConn) {
	ap := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	fmt.Fprintf(c, "%s\n", ap.Addr().Unmap())
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

// ask dials, sends a line, half-closes and reads all.
func (w *world) ask(p *testPod, addr string) (string, error) {
	c, err := w.dial(p, addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "hello"); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

func (w *world) wantAnswer(p *testPod, addr, want string) {
	w.Helper()
	got, err := w.ask(p, addr)
	if err != nil || got != want {
		w.Fatalf("%s → %s: got %q, %v; want %q", p.name, addr, got, err, want)
	}
}

// wantRefusedSoon allows for streams that were on their way while a tunnel
// drains: the first GOAWAY announces, only the second, a round trip later, ends
// new streams (RFC 9113 section 6.8).
func (w *world) wantRefusedSoon(p *testPod, addr string) {
	w.Helper()
	for range 1000 {
		if _, err := w.ask(p, addr); err != nil {
			return
		}
	}
	w.Fatalf("%s → %s: still answered after 1000 connections, want a reset", p.name, addr)
}

func (w *world) wantRefused(p *testPod, addr string) {
	w.Helper()
	if got, err := w.ask(p, addr); err == nil {
		w.Fatalf("%s → %s: got %q, want a reset", p.name, addr, got)
	}
}
