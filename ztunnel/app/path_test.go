package app

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/ztunnel/resolve"
)

// TestApplicationTunnel: an application that expects PROXY headers listens on
// loopback only, and learns from the header who calls and what was asked for.
func TestApplicationTunnel(t *testing.T) {
	w, a, b := twoPods(t)
	ln, err := b.NS.Listen(context.Background(), &net.ListenConfig{}, "tcp4", "127.0.0.1:15088")
	w.check(err)
	t.Cleanup(func() { _ = ln.Close() })
	gotc := make(chan string, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		head := make([]byte, 16)
		_, _ = io.ReadFull(c, head)
		rest := make([]byte, int(head[14])<<8|int(head[15]))
		_, _ = io.ReadFull(c, rest)
		line, _ := bufio.NewReader(c).ReadString('\n')
		_, _ = io.WriteString(c, "answer")
		gotc <- fmt.Sprintf("%s %s %s %q", hex.EncodeToString(rest[:8]), hex.EncodeToString(rest[10:12]), rest[15:], line)
	}()
	m := w.workload(b, "node-2")
	m.GetWorkload().ApplicationTunnel = &workload.ApplicationTunnel{Protocol: workload.ApplicationTunnel_PROXY, Port: 15088}
	w.push(api.AddressType, m.GetWorkload().Uid, m)
	c, err := w.dial(a, fmt.Sprintf("%s:8080", b.ip))
	w.check(err)
	_, err = io.WriteString(c, "hello\n")
	w.check(err)
	if answer, err := io.ReadAll(c); err != nil || string(answer) != "answer" {
		t.Fatalf("answer %q, %v", answer, err)
	}
	want := fmt.Sprintf(`%x%x 1f90 spiffe://cluster.local/ns/default/sa/a "hello\n"`, a.ip.As4(), b.ip.As4())
	if got := <-gotc; got != want {
		t.Errorf("application got  %s\nwant %s", got, want)
	}
}

// TestSecondEndpointWhenTheFirstIsGone: a pod whose node is gone is still an
// endpoint for a while. Nobody notices.
func TestSecondEndpointWhenTheFirstIsGone(t *testing.T) {
	w, a, b := twoPods(t)
	gone := w.addHost("gone") // nobody listens on 15008: refused at once
	host := "default/svc-b.default.svc.cluster.local"
	m := w.workload(gone, "node-3")
	m.GetWorkload().Services = map[string]*workload.PortList{host: {Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080}}}}
	w.push(api.AddressType, m.GetWorkload().Uid, m)
	w.setService(b, "10.96.0.1")
	for i := range 100 {
		w.wantAnswer(a, "10.96.0.1:80", a.ip.String()+"\nhello")
		if failures := a.node.health; failures != nil && i > 10 && w.counter(a.node, "ambit_ztunnel_endpoint_retries_total") > 0 {
			break
		}
	}
	a.node.logs.want(t, "connection complete", "retries=1", `dst.workload="b"`)
	if n := w.counter(a.node, "ambit_ztunnel_endpoint_retries_total"); n != 1 {
		t.Errorf("%v retries; the endpoint that failed should come last afterwards", n)
	}
	w.remove(api.AddressType, "Kubernetes//Pod/default/b")
	w.wantRefused(a, "10.96.0.1:80")
	a.node.logs.want(t, "error\taccess", "connection refused")
}

// counter is the sum of a metric's series.
func (w *world) counter(n *testNode, name string) (sum float64) {
	w.Helper()
	fs, err := n.reg.Gather()
	w.check(err)
	for _, f := range fs {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.Metric {
			sum += m.GetCounter().GetValue()
		}
	}
	return sum
}

// TestEndpointWithoutAddress: an endpoint that has only a host name is resolved
// when it is needed, in the family of the destination.
func TestEndpointWithoutAddress(t *testing.T) {
	w := newWorld(t)
	n := w.addNode("node-1")
	out := w.addHost("outside")
	n.names = resolve.New(resolve.Config{Registerer: prometheus.NewRegistry(), Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
		if host != "db.example.com." {
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		}
		return []netip.Addr{netip.MustParseAddr("2001:db8::1"), out.ip}, nil
	}})
	a := w.addPod("a", "node-1")
	w.listen(out, 8080, whoami)
	m := w.workload(out, "")
	m.GetWorkload().Addresses, m.GetWorkload().TunnelProtocol, m.GetWorkload().Hostname = nil, workload.TunnelProtocol_NONE, "db.example.com"
	w.push(api.AddressType, m.GetWorkload().Uid, m)
	w.setService(out, "10.96.0.1")
	w.wantAnswer(a, "10.96.0.1:80", a.ip.String()+"\nhello")
	n.logs.want(t, "connection complete", fmt.Sprintf("dst.addr=%s:8080", out.ip), `dst.workload="outside"`, `transport="plaintext"`)
	m.GetWorkload().Hostname = "gone.example.com"
	w.push(api.AddressType, m.GetWorkload().Uid, m)
	w.wantRefused(a, "10.96.0.1:80")
	n.logs.want(t, "error\taccess", `resolve host name \"gone.example.com\" of workload`, "no such host")
}

// TestSecondEndpointWhenTheApplicationDied: between an application's end and the
// control plane's word of it, callers reach another endpoint, from this node by
// the way inside the proxy and from elsewhere by tunnel.
func TestSecondEndpointWhenTheApplicationDied(t *testing.T) {
	w, a, b := twoPods(t)
	near := w.addPod("near", "node-1") // nobody listens in it
	far := w.addPod("far", "node-2")
	host := map[string]*workload.PortList{"default/svc-b.default.svc.cluster.local": {Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080}}}}
	w.setLocal(near, "node-1", func(m *workload.Workload) { m.Services = host })
	m := w.workload(far, "node-2")
	m.GetWorkload().Services = host
	w.push(api.AddressType, m.GetWorkload().Uid, m)
	w.setService(b, "10.96.0.1")
	// A retry may meet the second dead one, so one connection may fail; after it
	// both come last.
	failed := 0
	for range 60 {
		if _, err := w.ask(a, "10.96.0.1:80"); err != nil {
			failed++
		}
	}
	if failed > 1 {
		t.Errorf("%d of 60 connections failed, want at most one", failed)
	}
	for range 20 {
		w.wantAnswer(a, "10.96.0.1:80", a.ip.String()+"\nhello")
	}
	if w.counter(a.node, "ambit_ztunnel_endpoint_retries_total") == 0 {
		t.Error("no connection met a dead endpoint: nothing was tested")
	}
}
