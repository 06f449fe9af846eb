//go:build interop

package interop

import (
	"fmt"
	"strings"
	"testing"
)

// TestNetworks reaches pods that the mesh says are in another network: through a
// gateway, with a tunnel inside the tunnel. The gateway lets its node's proxy
// terminate the outer one; outside the mesh, a relay stands for the network between.
//
//	client ── outer tunnel ──▶ gateway's proxy ──▶ gateway ──▶ relay ──▶ far pod's proxy
//	       ╚══════════════════ inner tunnel ═══════════════════════════▶
func TestNetworks(t *testing.T) {
	l := up(t, "--env", "NETWORK=near")
	l.must(t, "label", "ns", "ambit-system", "topology.istio.io/network=near")
	world(t, l)
	var b strings.Builder
	b.WriteString(classYAML)
	for _, n := range allNodes {
		far := strings.Replace(serverYAML("far-"+n, n, "far"), "labels:", "annotations: {topology.istio.io/network: \"far-"+n+"\"}, labels:", 1)
		b.WriteString(far)
		fmt.Fprintf(&b, serviceYAML, "far-"+n, "far-"+n)
	}
	l.apply(t, b.String())
	l.must(t, "wait", "--timeout", "60s")
	b.Reset()
	for _, n := range allNodes {
		b.WriteString(programYAML("outside", "relay-"+n, "node-1", "", "forward", ":9015", l.address(t, "far-"+n, 4)+":15008"))
	}
	l.apply(t, b.String())
	l.must(t, "wait", "-n", "outside", "--timeout", "60s")
	b.Reset()
	for _, n := range allNodes {
		fmt.Fprintf(&b, bindingYAML, "bind-"+n)
		b.WriteString(programYAML("default", "gateway-"+n, n, ", gateway.networking.k8s.io/gateway-name: bind-"+n, "gateway", ":15090", l.address(t, "outside/relay-"+n, 4)+":9015"))
	}
	l.apply(t, b.String())
	l.must(t, "wait", "--timeout", "60s")
	b.Reset()
	for _, n := range allNodes {
		fmt.Fprintf(&b, remoteYAML, n, l.address(t, "gateway-"+n, 4))
	}
	l.apply(t, b.String())
	each(t, "another network: a tunnel inside a gateway's tunnel", func(t *testing.T, r route) string {
		until(t, patience, "an answer", func() (bool, string) {
			mark := l.logged("ztunnel@" + r.to)
			res := l.traffic(r.client(), "echo", "far-"+r.to)
			if res.code != 0 {
				return false, res.out + res.err
			}
			// The bytes came from the relay, the identity from the client.
			lines := l.lines(mark, "ztunnel@"+r.to, "connection complete", "far-"+r.to, "sa/client", `direction="inbound"`, "src.addr="+l.address(t, "outside/relay-"+r.to, 4)+":")
			return len(lines) > 0, "no inbound line from the relay with the client's identity"
		})
		return ""
	})
	each(t, "another network: 20 MB both ways, 50 connections", func(t *testing.T, r route) string {
		l.call(t, r.client(), "duplex", "-n", "20000000", "far-"+r.to)
		l.call(t, r.client(), "many", "-n", "50", "far-"+r.to)
		l.call(t, r.client(), "sink", "-n", "1000000", "far-"+r.to)
		return ""
	})
}

// bindingYAML makes a gateway pod's proxy hand connections over with a header.
const bindingYAML = `---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: %[1]s, namespace: default, annotations: {ambient.istio.io/waypoint-inbound-binding: PROXY/15090}}
spec:
  gatewayClassName: vendor
  listeners:
  - {name: proxy, port: 15090, protocol: istio.io/PROXY}
status: {addresses: [{type: Hostname, value: %[1]s.default.svc.cluster.local}]}
`

// remoteYAML says which address leads into a network.
const remoteYAML = `---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: to-%[1]s
  namespace: default
  labels: {topology.istio.io/network: far-%[1]s}
  annotations: {gateway.istio.io/service-account: server}
spec:
  gatewayClassName: istio-remote
  addresses: [{type: IPAddress, value: %[2]s}]
  listeners: [{name: cross-network, port: 15008, protocol: HBONE, tls: {mode: Passthrough}}]
`
