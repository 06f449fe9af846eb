package app

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/fakexds"
	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// TestMetricsAreScrapedThroughTheMesh: the proxy's own pod takes tunnels to its
// metrics, under policy, and to nothing else of its host.
func TestMetricsAreScrapedThroughTheMesh(t *testing.T) {
	w := newWorld(t)
	xds := fakexds.New(t)
	const uid = "Kubernetes//Pod/ambit-system/ztunnel-1"
	self := &workload.Workload{Uid: uid, Name: "ztunnel-1", Namespace: "ambit-system", ServiceAccount: "ztunnel", Node: "node-1",
		TrustDomain: "cluster.local", NetworkMode: workload.NetworkMode_HOST_NETWORK}
	xds.Set(uid, &workload.Address{Type: &workload.Address_Workload{Workload: self}})
	p := startProcess(t, w, xds, "node-1", filepath.Join(t.TempDir(), "nobody.sock"),
		"--pod-name=ztunnel-1", "--pod-namespace=ambit-system", "--service-account=ztunnel")
	p.logs.want(t, "pod served", "ambit-system/ztunnel-1")

	leaf := w.ca.Leaf(t, friend)
	d := hbone.NewDialer(hbone.DialerConfig{
		DialTransport: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
			return (&net.Dialer{Timeout: waitLimit}).DialContext(ctx, "tcp", k.Addr.String())
		},
		TLS: func(context.Context, hbone.Key) (*tls.Config, error) {
			return &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true, Certificates: []tls.Certificate{leaf}}, nil
		},
	})
	defer d.Close()
	connect := func(authority string) (*hbone.Stream, error) {
		ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
		defer cancel()
		s, _, err := d.Connect(ctx, hbone.Key{Pod: "p", Local: friend, Addr: netip.MustParseAddrPort("127.0.0.1:15008")}, hbone.ConnectRequest{Authority: authority})
		return s, err
	}
	stats := strings.TrimSuffix(strings.TrimPrefix(p.stats, "http://"), "/metrics")
	scrape := func() (string, error) {
		c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return connect(stats) }}}
		defer c.CloseIdleConnections()
		r, err := c.Get(p.stats)
		if err != nil {
			return "", err
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		return string(b), err
	}
	if got, err := scrape(); err != nil || !strings.Contains(got, "istio_build{") {
		t.Fatalf("metrics through the mesh: %v, %.200q", err, got)
	}
	for _, url := range []string{p.admin, p.ready} {
		authority, _, _ := strings.Cut(strings.TrimPrefix(url, "http://"), "/")
		s, err := connect(authority)
		if e, ok := errors.AsType[*hbone.StatusError](err); !ok || e.Code != 503 {
			t.Errorf("CONNECT %s: %v, %v, want 503", authority, s, err)
		}
	}
	p.logs.want(t, "is not for the mesh here")

	xds.Set("ambit-system/nobody", &security.Authorization{Namespace: "ambit-system", Name: "nobody", Scope: security.Scope_NAMESPACE, Action: security.Action_ALLOW})
	eventually(t, "the policy holds for the proxy's own port", func() bool {
		_, err := connect(stats)
		e, ok := errors.AsType[*hbone.StatusError](err)
		return ok && e.Code == 401
	})
	p.stop()
	w.check(<-p.donec)
}
