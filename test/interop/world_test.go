//go:build interop

package interop

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// world is what every test has: a server on each node with a service of its own,
// clients of several identities on the nodes that calls come from, and pods that
// are not in the mesh.
func world(t *testing.T, l *lab) {
	t.Helper()
	var b strings.Builder
	for _, ns := range []string{"default", "other"} {
		fmt.Fprintf(&b, namespaceYAML, ns)
	}
	b.WriteString("---\napiVersion: v1\nkind: Namespace\nmetadata: {name: outside}\n")
	for _, sa := range []string{"default/client", "default/stranger", "default/server", "other/client"} {
		ns, name, _ := strings.Cut(sa, "/")
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: %s, namespace: %s}\n", name, ns)
	}
	for _, n := range allNodes {
		b.WriteString(serverYAML("server-"+n, n, "server"))
		fmt.Fprintf(&b, serviceYAML, "server-"+n, "server-"+n)
	}
	fmt.Fprintf(&b, headlessYAML, "all")
	for _, n := range []string{"node-1", "node-2"} {
		b.WriteString(clientYAML("default", "client-"+n, n, "client"))
		b.WriteString(clientYAML("default", "stranger-"+n, n, "stranger"))
		b.WriteString(clientYAML("other", "client-"+n, n, "client"))
		b.WriteString(clientYAML("outside", "outsider-"+n, n, "default"))
	}
	l.apply(t, b.String())
	for _, ns := range []string{"default", "other", "outside"} {
		l.must(t, "wait", "-n", ns, "--timeout", "60s")
	}
	ready(t, l)
}

// ready waits until every direction answers under mutual TLS.
func ready(t *testing.T, l *lab) {
	t.Helper()
	for _, r := range routes {
		until(t, 30*time.Second, r.name+" is encrypted", func() (bool, string) {
			mark := l.logged("ztunnel@" + r.to)
			res := l.traffic(r.client(), "echo", r.server())
			seen := l.lines(mark, "ztunnel@"+r.to, "connection complete", "sa/client", `direction="inbound"`)
			return res.code == 0 && len(seen) > 0, res.out + res.err
		})
	}
}

const namespaceYAML = `---
apiVersion: v1
kind: Namespace
metadata: {name: %s, labels: {istio.io/dataplane-mode: ambient}}
`

const serviceYAML = `---
apiVersion: v1
kind: Service
metadata: {name: %s}
spec:
  selector: {name: %s}
  ports:
` + servicePorts

const headlessYAML = `---
apiVersion: v1
kind: Service
metadata: {name: %s}
spec:
  clusterIP: None
  selector: {app: server}
  ports:
` + servicePorts

const servicePorts = `  - {name: echo, port: 7001}
  - {name: sink, port: 7002}
  - {name: duplex, port: 7003}
  - {name: greet, port: 7004}
  - {name: abort, port: 7005}
  - {name: observe, port: 7006}
  - {name: ask, port: 7007}
  - {name: who, port: 7008}
  - {name: other, port: 7009}
  - {name: bye, port: 7010}
  - {name: switch, port: 7012}
  - {name: drop, port: 7013}
  - {name: nobody, port: 7099}
  - {name: mapped, port: 80, targetPort: 7001}
`

// serverYAML is a pod that serves, on a node.
func serverYAML(name, node, app string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {name: %s, app: %s}}
spec:
  serviceAccountName: server
  hostname: %s
  subdomain: all
  terminationGracePeriodSeconds: 3
  nodeSelector: {kubernetes.io/hostname: %s}
  containers:
  - name: c
    image: ambit-sample
    command: [%s, %s, serve]
    readinessProbe: {tcpSocket: {port: 7011}, periodSeconds: 1, failureThreshold: 1}
`, name, name, app, name, node, self, Verb)
}

// programYAML is a pod that runs this program with arguments.
func programYAML(ns, name, node, labels string, args ...string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {name: %s%s}}
spec:
  serviceAccountName: %s
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: %s}
  containers:
  - {name: c, image: ambit-sample, command: ["%s", %s, "%s"]}
`, name, ns, name, labels, map[bool]string{true: "default", false: "server"}[ns == "outside"], node, self, Verb, strings.Join(args, `", "`))
}

func clientYAML(ns, name, node, sa string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, labels: {app: %s}}
spec:
  serviceAccountName: %s
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: %s}
  containers:
  - {name: c, image: curl}
`, name, ns, sa, sa, node)
}
