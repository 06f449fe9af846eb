//go:build interop

package interop

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestFeatures is about what needs objects of its own: names that only the mesh
// knows, waypoints behind a proxy, revocation.
func TestFeatures(t *testing.T) {
	const crl = "/run/ambit-lab/mesh/ambitd/ca-crl.pem" // ambitd writes it with the first revocation
	// The other project's proxy answers DNS on loopback alone, where rules lead queries and programs cannot.
	l := up(t, "--env", "CRL_PATH="+crl, "--redirect", "nftables")
	world(t, l)
	entries(t, l)
	sandwiched(t, l)
	revoked(t, l)
}

const entriesYAML = `---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: inside-%[1]s}
spec:
  hosts: [inside-%[1]s.example.com]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 7001, name: tcp, protocol: TCP}]
  workloadSelector: {labels: {name: server-%[1]s}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: address-%[1]s}
spec:
  hosts: [address-%[1]s.example.com]
  resolution: STATIC
  ports: [{number: 81, name: tcp, protocol: TCP, targetPort: 7001}]
  endpoints: [{address: %[2]s}]
`

// entries calls names that only the mesh's DNS knows, answered by the client's
// proxy, with addresses that only the mesh knows.
func entries(t *testing.T, l *lab) {

	for _, n := range allNodes {
		l.apply(t, fmt.Sprintf(entriesYAML, n, l.address(t, "server-"+n, 4)))
	}
	calls := func(host, port string) func(*testing.T, route) string {
		return func(t *testing.T, r route) string {
			host := fmt.Sprintf(host, r.to)
			until(t, patience, host+" answers", func() (bool, string) {
				out := l.traffic(r.client(), "probe", host+":"+port)
				return strings.Contains(out.out, `"ok"`), out.out + out.err
			})
			return ""
		}
	}
	each(t, "DNS: a ServiceEntry's name, pods by selector", calls("inside-%s.example.com", "7001"))
	each(t, "DNS: a ServiceEntry's name, by address and port", calls("address-%s.example.com", "81"))
	each(t, "DNS: names of Services, short and whole", func(t *testing.T, r route) string {
		for _, h := range []string{r.server(), r.server() + ".default", r.server() + ".default.svc", r.server() + ".default.svc.cluster.local", r.server() + ".all"} {
			l.call(t, r.client(), "echo", h)
		}
		return ""
	})
	dig := func(what, want string, args ...string) func(*testing.T, route) string {
		return func(t *testing.T, r route) string {
			out := l.do("", append([]string{"exec", r.client(), "--", "dig", "+time=3", "+tries=2"}, args...)...)
			if !strings.Contains(out.out, want) {
				t.Errorf("%s: want %q in %s%s", what, want, out.out, out.err)
			}
			return ""
		}
	}
	source := []string{"ours→ours", "theirs→theirs"} // the client's proxy alone answers
	each(t, "DNS: over TCP", dig("dig", "status: NOERROR", "+tcp", "server-node-1.default.svc.cluster.local"), source...)
	each(t, "DNS: NXDOMAIN of the cluster's server is passed on", dig("dig", "status: NXDOMAIN", "nothing.default.svc.cluster.local"), source...)
	each(t, "DNS: AAAA", dig("dig", "fd00:10:96:", "AAAA", "server-node-1.default.svc.cluster.local"), source...)
	each(t, "DNS: a reverse question is forwarded", dig("dig", "status:", "-x", "10.96.0.10"), source...)
}

// sandwichYAML is a waypoint whose HBONE the node's proxy terminates.
const sandwichYAML = `---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp-%[1]s, namespace: default, annotations: {ambient.istio.io/waypoint-inbound-binding: PROXY/15088}}
spec:
  gatewayClassName: vendor
  listeners:
  - {name: proxy, port: 15088, protocol: istio.io/PROXY, allowedRoutes: {namespaces: {from: All}}}
status: {addresses: [{type: Hostname, value: wp-%[1]s.default.svc.cluster.local}]}
---
apiVersion: v1
kind: Service
metadata: {name: wp-%[1]s}
spec: {selector: {gateway.networking.k8s.io/gateway-name: wp-%[1]s}, ports: [{name: hbone, port: 15008}]}
---
apiVersion: v1
kind: Service
metadata: {name: behind-%[1]s, labels: {istio.io/use-waypoint: wp-%[1]s}}
spec: {selector: {app: nobody}, ports: [{name: tcp, port: 7777}]}
`

const classYAML = `---
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: vendor, labels: {istio.io/waypoint-for: all}}
spec: {controllerName: vendor.example/waypoint}
`

func sandwiched(t *testing.T, l *lab) {
	var b strings.Builder
	b.WriteString(classYAML)
	for _, n := range allNodes {
		fmt.Fprintf(&b, sandwichYAML, n)
		b.WriteString(strings.Replace(serverYAML("wp-"+n, n, "waypoint"), "app: waypoint", "app: waypoint, gateway.networking.k8s.io/gateway-name: wp-"+n, 1))
	}
	l.apply(t, b.String())
	l.must(t, "wait", "--timeout", "60s")
	each(t, "waypoint behind a proxy: PROXY header with address and identity", func(t *testing.T, r route) string {
		for f, vip := range l.vips(t, "behind-"+r.to) {
			at := vip + ":7777"
			if f == 6 {
				at = "[" + vip + "]:7777"
			}
			want := []string{"command=0x21", "src=" + l.address(t, r.client(), f), "dst=" + at, "identity=spiffe://cluster.local/ns/default/sa/client"}
			until(t, patience, at, func() (bool, string) {
				res := l.traffic(r.client(), "line", at)
				for _, w := range want {
					if !strings.Contains(res.out, w+" ") {
						return false, fmt.Sprintf("want %q in %s%s", w, res.out, res.err)
					}
				}
				return true, ""
			})
		}
		return ""
	})
}

// revoked puts certificates on the list: live connections end, new ones fail.
func revoked(t *testing.T, l *lab) {
	held := map[string]*background{}
	for _, r := range routes {
		held[r.name] = l.begin(t, r.client(), "hold", l.address(t, r.server(), 4))
	}
	before := map[string]string{}
	for _, n := range []string{"node-1", "node-2"} {
		before[n] = l.serial(t, n, "client")
		l.must(t, "exec", "control", "--", bin+"/ambitd", "ca", "revoke", "--state-dir", "/run/ambit-lab/mesh/ambitd", "--serial", before[n])
	}
	each(t, "CRL: a revoked client's live connection is cut", func(t *testing.T, r route) string {
		if b := held[r.name]; !b.ended(20 * time.Second) {
			t.Errorf("still open: %s", b.text())
		}
		return ""
	})
	each(t, "CRL: that certificate is not let in again, others are", func(t *testing.T, r route) string {
		defer l.call(t, "stranger-"+r.from, "echo", r.server())
		if slices.Contains(ourNodes, r.from) { // ours notices that its own is on the list
			until(t, 30*time.Second, "another certificate", func() (bool, string) {
				now := l.serial(t, r.from, "client")
				res := l.traffic(r.client(), "echo", l.address(t, r.server(), 4))
				return now != before[r.from] && res.code == 0, now + " " + res.err
			})
			return "back with another certificate"
		}
		until(t, patience, "refused", func() (bool, string) {
			res := l.traffic(r.client(), "echo", l.address(t, r.server(), 4))
			return res.code != 0, "let in"
		})
		return ""
	})
}
