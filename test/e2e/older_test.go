package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// outsider is a pod that joins the mesh with connections open.
const outsider = `
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: shop, annotations: {ambit.dev/on-enrol: "ON-ENROL"}}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, pause]}]
`

const outside = `
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {istio.io/dataplane-mode: none}}
spec:
  nodeName: node-2
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, echo]}]
`

// TestOlderConnections has pods join the mesh with connections open: each does with
// them what its annotation asks for.
func TestOlderConnections(t *testing.T) { each(t, testOlderConnections) }

func testOlderConnections(t *testing.T, redirect string) {
	l := up(t, redirect)
	l.apply(outside)
	pods := map[string]string{"keep": "keep", "reset": "reset", "drain": "drain=2s"}
	for name, onEnrol := range pods {
		l.apply(strings.NewReplacer("NAME", name, "ON-ENROL", onEnrol).Replace(outsider))
	}
	l.must("wait", "--timeout", "110s")
	server := l.ip("server") + ":9000"
	held := map[string]*held{}
	for name := range pods {
		held[name] = l.hold("-n", "shop", name, "--", "ambit-sample", "hold", "-n", "3", "-for", "10m", server)
	}
	for name := range pods {
		l.until("connections of "+name, func() (bool, string) {
			r := l.try("", "exec", "-n", "shop", name, "--", "ss", "-tnH", "state", "established")
			return strings.Count(r.out, ":9000") == 3, r.out + r.err
		})
	}
	l.must("label", "ns", "shop", "istio.io/dataplane-mode=ambient")
	l.until("the older ones are kept, reset and drained", func() (bool, string) {
		var s struct {
			Pods []struct {
				Name, Redirection, OnEnrol string
				PreEnrolment               int
			}
		}
		l.decode(&s, "exec", "node-1", "--", "ambit-node", "status", "-o", "json")
		got := map[string]string{}
		for _, p := range s.Pods {
			got[p.Name] = fmt.Sprint(p.Redirection, " ", p.PreEnrolment)
		}
		return got["keep"] == "enabled 3" && got["reset"] == "enabled 0" && got["drain"] == "enabled 0", fmt.Sprint(s)
	})
	if redirect == eBPF {
		if got := l.flows("node-1", "shop/keep", "pre-enrolment"); len(got) != 3 || got[0].Destination != server {
			t.Errorf("flows of a pod with older connections: %v", got)
		}
	}
	for name, want := range map[string]string{"keep": `"kept":3`, "reset": `"kept":0`, "drain": `"kept":0`} {
		if r := held[name].end(); !strings.Contains(r.out, `"open":3`) || !strings.Contains(r.out, want) {
			t.Errorf("%s: %q %s, want %s", name, r.out, r.err, want)
		}
	}
}
