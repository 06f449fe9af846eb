package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/netlab"
)

// accelerated is a client and two servers of a service, one on its node.
const accelerated = `
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}, annotations: {ambit.dev/accelerate: "true"}}
---
apiVersion: v1
kind: Service
metadata: {name: echo}
spec: {ports: [{name: tcp, port: 9000}], selector: {role: echo}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, pause]}]
---
apiVersion: v1
kind: Pod
metadata: {name: near, labels: {app: near, role: echo}}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, echo]}]
---
apiVersion: v1
kind: Pod
metadata: {name: far, labels: {app: far, role: echo}}
spec:
  nodeName: node-2
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, echo]}]
`

const denyNear = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-near}
spec: {selector: {matchLabels: {app: near}}, action: DENY, rules: [{from: [{source: {namespaces: [default]}}]}]}
`

// load is what a client of fresh connections got.
type load struct{ Requests, Errors int }

func (l *lab) load(to string) (got load) {
	l.t.Helper()
	r := l.try("", "exec", "client", "--", "ambit-sample", "load", "--fresh", "--conns", "2", "--for", "500ms", to)
	_ = json.Unmarshal([]byte(r.out), &got) // a failure shows in requests
	return got
}

// transports counts outbound connections of the client to a pod in the log of its
// proxy, by transport, from a line on.
func (l *lab) transports(dst string, from *int) map[string]int {
	l.t.Helper()
	lines := strings.Split(strings.TrimSpace(l.must("logs", "ztunnel@node-1", "--tail", "1000000")), "\n")
	got := map[string]int{}
	for _, line := range lines[min(*from, len(lines)):] {
		if !strings.Contains(line, `direction="outbound"`) || !strings.Contains(line, `dst.workload="`+dst+`"`) || !strings.Contains(line, "connection complete") {
			continue
		}
		for _, t := range []string{"direct", "local", "hbone"} {
			if strings.Contains(line, `transport="`+t+`"`) {
				got[t]++
			}
		}
	}
	*from = len(lines)
	return got
}

// liveFlow is what `ambit-node flows -o json` tells of a connection.
type liveFlow struct{ Pod, Direction, Source, Destination, Decision, State string }

// flows are a pod's open connections with that decision, as the node's agent lists them.
func (l *lab) flows(node, pod, decision string) (got []liveFlow) {
	l.t.Helper()
	var all struct{ Flows []liveFlow }
	l.decode(&all, "exec", node, "--", "ambit-node", "flows", "-o", "json", "--pod", pod)
	return slices.DeleteFunc(all.Flows, func(f liveFlow) bool { return f.Decision != decision || f.State != "established" })
}

// TestAcceleration has connections between pods of a node go without the proxy,
// and no longer than they may.
func TestAcceleration(t *testing.T) {
	netlab.RequireEBPF(t)
	l := up(t, eBPF)
	l.apply(accelerated)
	l.must("wait", "--timeout", "110s")
	near := l.ip("near") + ":9000"
	at := 0
	l.until("direct connections", func() (bool, string) {
		got := l.load(near)
		seen := l.transports("near", &at)
		return got.Requests > 0 && got.Errors == 0 && seen["direct"] > 10*seen["local"], fmt.Sprint(got, seen)
	})

	// Of a service's connections, those that would have gone to the neighbour.
	l.until("a service's share", func() (bool, string) {
		got := l.load("echo:9000")
		a := at
		n, f := l.transports("near", &a), l.transports("far", &at)
		share := float64(n["direct"]+n["local"]) / float64(got.Requests+1)
		return got.Errors == 0 && n["direct"] > 10*n["local"] && f["hbone"] > 0 && share > 0.35 && share < 0.65, fmt.Sprint(got, n, f)
	})

	// A denial cuts what lives, and nothing new gets in.
	live := l.hold("client", "--", "ambit-sample", "hold", "-n", "3", "-for", "10m", near)
	l.until("connections that live", func() (bool, string) {
		out := l.must("exec", "node-1", "--", "curl", "-s", "http://127.0.0.1:15020/metrics")
		return strings.Contains(out, "ambit_ztunnel_direct_connections 3"), out
	})
	l.until("ambit-node flows tells of them", func() (bool, string) {
		got := l.flows("node-1", "default/client", "direct")
		return len(got) == 3 && got[0].Destination == near && got[0].Direction == "outbound", fmt.Sprint(got)
	})
	l.apply(denyNear)
	l.until("the denial", func() (bool, string) {
		out := l.must("exec", "node-1", "--", "curl", "-s", "http://127.0.0.1:15020/metrics")
		got := l.load(near)
		return strings.Contains(out, "ambit_ztunnel_direct_connections 0") && got.Requests == 0 && got.Errors > 0, out
	})
	l.until("a line says that a direct connection was denied", func() (bool, string) {
		log := l.must("logs", "ztunnel@node-1", "--tail", "1000000")
		return slices.ContainsFunc(strings.Split(log, "\n"), func(line string) bool {
			return strings.Contains(line, `transport="direct"`) && strings.Contains(line, "deny-near")
		}), log
	})
	l.must("delete", "authorizationpolicy", "deny-near")
	l.until("direct connections again", func() (bool, string) {
		got := l.load(near)
		return got.Errors == 0 && l.transports("near", &at)["direct"] > 0, fmt.Sprint(got)
	})
	live.end()

	// Without proxy nothing goes anywhere, and with the next one it does again.
	l.must("restart", "ztunnel@node-1")
	l.until("direct connections after the proxy's restart", func() (bool, string) {
		got := l.load(near)
		return got.Requests > 0 && got.Errors == 0 && l.transports("near", &at)["direct"] > 0, fmt.Sprint(got)
	})
	l.must("restart", "ambit-node@node-1")
	l.until("direct connections after the agent's restart", func() (bool, string) {
		got := l.load(near)
		return got.Requests > 0 && got.Errors == 0 && l.transports("near", &at)["direct"] > 0, fmt.Sprint(got)
	})
	// Opting out.
	l.apply(`{apiVersion: v1, kind: Namespace, metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}, annotations: {ambit.dev/accelerate: "false"}}}`)
	l.until("connections through the proxy", func() (bool, string) {
		got := l.load(near)
		seen := l.transports("near", &at)
		return got.Errors == 0 && seen["local"] > 0 && seen["direct"] == 0, fmt.Sprint(got, seen)
	})
}
