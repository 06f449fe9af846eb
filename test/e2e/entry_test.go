package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// entries: a host outside the mesh by address, the same by name, a host inside it
// by selector, and a workload behind a Kubernetes service.
const entries = `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: static}
spec:
  hosts: [static.example.com]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  endpoints: [{address: %[1]s}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: dns}
spec:
  hosts: [dns.example.com]
  resolution: DNS
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: far.outside.svc.cluster.local, ports: {http: 8080}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: inside}
spec:
  hosts: [inside.example.com]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  workloadSelector: {labels: {app: echo}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: through}
spec:
  hosts: [through.example.com]
  addresses: [%[1]s/32]
  ports: [{number: 8080, name: http, protocol: HTTP}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, labels: {app: vm}}
spec: {address: %[1]s, ports: {http: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: vm}
spec: {selector: {app: vm}, ports: [{name: http, port: 80}]}
`

const outsideHost = `
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: outside, labels: {app: far}}
spec: {containers: [{name: echo, image: echo, readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}]}
---
apiVersion: v1
kind: Service
metadata: {name: far, namespace: outside}
spec: {clusterIP: None, selector: {app: far}, ports: [{name: http, port: 8080}]}
`

func TestServiceEntries(t *testing.T) { each(t, testServiceEntries) }

func testServiceEntries(t *testing.T, redirect string) {
	l := up(t, redirect)
	l.must("apply", "-f", "echo")
	l.apply(outsideHost)
	l.must("wait", "--timeout", "110s")
	l.must("wait", "-n", "outside", "--timeout", "110s")
	l.must("label", "ns", "default", "istio.io/dataplane-mode=ambient")
	ip := strings.TrimSpace(l.must("exec", "-n", "outside", "far", "--", "sh", "-c", "hostname -i | tr ' ' '\n' | grep -m1 '^10\\.'"))
	l.apply(fmt.Sprintf(entries, ip))
	l.must("wait", "--timeout", "110s")
	for _, tt := range []struct{ host, want string }{
		{"static.example.com", `"host": "far"`},
		{"dns.example.com", `"host": "far"`},
		{"inside.example.com", `"host": "echo`},
		{"vm", `"host": "far"`},
		{ip + ":8080", `"host": "far"`},
	} {
		t.Run(tt.host, func(t *testing.T) {
			l := &lab{t, l.name}
			l.until("an answer", func() (bool, string) {
				r := l.try("", "exec", "client", "--", "curl", "-sS", "--max-time", "5", "http://"+tt.host+"/")
				return r.code == 0 && strings.Contains(r.out, tt.want), r.out + r.err
			})
		})
	}
}
