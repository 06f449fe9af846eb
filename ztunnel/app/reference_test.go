package app

import (
	"context"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/fakexds"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
)

// describeHost gives a control plane one workload at 127.0.0.1 and a service of
// it, and endpoints of a service that is not there.
func describeHost(xds *fakexds.Server) {
	ports := &workload.PortList{Ports: []*workload.Port{{ServicePort: 80, TargetPort: 8080}}}
	xds.Set("vm/client", &workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{
		Uid: "vm/client", Name: "client", Namespace: "default", ServiceAccount: "client", Addresses: [][]byte{{127, 0, 0, 1}},
		TunnelProtocol: workload.TunnelProtocol_HBONE, Services: map[string]*workload.PortList{
			"default/web.default.svc.cluster.local": ports, "default/late.default.svc.cluster.local": ports}}}})
	xds.Set("default/web.default.svc.cluster.local", &workload.Address{Type: &workload.Address_Service{Service: &workload.Service{
		Name: "web", Namespace: "default", Hostname: "web.default.svc.cluster.local", Ports: ports.Ports,
		Addresses: []*workload.NetworkAddress{{Address: []byte{127, 10, 0, 1}}}}}})
}

// Dashboards made for the reference find each of its metrics after traffic.
// (Those of revocation and of the time that name servers take appear with the
// first of these: see testdata/metrics.txtar.)
func TestMetricsOfTheReferenceAfterARun(t *testing.T) {
	if !inChild(t) {
		return
	}
	web, err := net.Listen("tcp4", "127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := web.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "hello")
			_ = c.Close() // the test has it or fails
		}
	}()
	defer func() { _ = web.Close(); <-served }()
	xds := fakexds.New(t)
	describeHost(xds)
	p := startDedicated(t, xds.TLS, "--xds-address", xds.Addr())
	socks := func(request string) string {
		t.Helper()
		c, err := net.Dial("tcp4", "127.0.0.1:15080")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "\x05\x01\x00"+request); err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(c) // until the other side ends it
		return string(b)
	}
	if got := socks("\x05\x01\x00\x03\x03web\x00\x50"); !strings.HasSuffix(got, "hello") {
		t.Fatalf("got %q", got)
	}
	socks("\x05\x01\x00\x01\x7f\x00\x00\x05\x00\x09")    // fails
	socks("\x05\x01\x00\x03\x0fexample.invalid\x00\x50") // is asked of DNS
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, "127.0.0.1:15053")
	}}
	if got, err := r.LookupHost(t.Context(), "web.default.svc.cluster.local."); err != nil || len(got) != 1 || got[0] != "127.10.0.1" {
		t.Errorf("DNS: %v, %v", got, err)
	}
	_, _ = r.LookupHost(t.Context(), "elsewhere.invalid.") // nobody is there to ask
	xds.Restart(t)
	if _, err := xds.Wait(t.Context(), func(r fakexds.Request) bool { return r.Stream == 2 && r.TypeUrl == api.AddressType }); err != nil {
		t.Fatal(err)
	}
	_, body := get(t, p.stats)
	wants := []string{
		`istio_tcp_connections_opened_total{`, `istio_tcp_connections_closed_total{`, `istio_tcp_connections_failed_total{`, `istio_tcp_sent_bytes_total{`,
		`istio_tcp_received_bytes_total{`, `istio_tcp_sockets_open{reporter="`, `istio_on_demand_dns_total{`, `istio_build{component="ztunnel",tag="1.2.3"} 1`,
		`istio_dns_requests_total{`,
		`istio_xds_connection_terminations_total{reason="`, `istio_xds_message_total{url="type.googleapis.com/istio.workload.Address"}`,
		`istio_xds_message_bytes_total{url="type.googleapis.com/istio.security.Authorization"}`, `workload_manager_active_proxy_count 1`,
		`workload_manager_pending_proxy_count 0`, `workload_manager_proxies_started_total 1`, `workload_manager_proxies_stopped_total 0`,
		`process_open_fds `, `process_max_fds `,
	}
	if len(readResolvConf("/etc/resolv.conf").servers) > 0 { // the host that runs the test has one to forward to
		wants = append(wants, `istio_dns_upstream_requests_total{`, `istio_dns_upstream_failures_total{`)
	}
	for _, want := range wants {
		if !strings.Contains(body, "\n"+want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	if t.Failed() {
		t.Log(body)
	}
	_, body = get(t, p.admin+"/config_dump")
	if !strings.Contains(body, `"default/late.default.svc.cluster.local": {`) {
		t.Errorf("no staged service in %s", body)
	}
	for path, want := range map[string]string{"/": `href="/config_dump"`, "/debug/pprof/heap?debug=1": "heap profile", "/logging": "current log level is debug"} {
		if code, body := get(t, p.admin+path); code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d %.200s", path, code, body)
		}
	}
	p.stop()
	if err := <-p.donec; err != nil {
		t.Error(err)
	}
}

// On demand nothing is known but what was asked for, and connections find their
// way all the same.
func TestDedicatedOnDemand(t *testing.T) {
	if !inChild(t) {
		return
	}
	if os.Getuid() == 0 {
		t.Fatal("still root")
	}
	xds := fakexds.New(t)
	describeHost(xds)
	p := startDedicated(t, xds.TLS, "--xds-address", xds.Addr(), "--xds-on-demand", "--instance-ip=127.0.0.1", "--istio-meta-dns-capture=false")
	r, err := xds.Wait(t.Context(), func(r fakexds.Request) bool { return r.TypeUrl == api.AddressType })
	if err != nil || len(r.ResourceNamesSubscribe) != 1 || r.ResourceNamesSubscribe[0] != "*" || len(r.ResourceNamesUnsubscribe) != 1 {
		t.Errorf("first request %v, %v", r.DeltaDiscoveryRequest, err)
	}
	p.stop()
	if err := <-p.donec; err != nil {
		t.Error(err)
	}
}
