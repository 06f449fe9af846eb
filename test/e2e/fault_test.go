package e2e

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"
)

// pair is a client on one node, a server on the other, and a second server
// beside the client.
const pair = `
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, pause]}]
---
apiVersion: v1
kind: Pod
metadata: {name: far, labels: {app: far}}
spec:
  nodeName: node-2
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, echo]}]
---
apiVersion: v1
kind: Pod
metadata: {name: near, labels: {app: near}}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, echo]}]
`

// ip is a pod's first address.
func (l *lab) ip(pod string) string {
	l.t.Helper()
	var p struct{ Status struct{ PodIP string } }
	if err := json.Unmarshal([]byte(l.must("get", "pod", pod, "-o", "json")), &p); err != nil || p.Status.PodIP == "" {
		l.t.Fatalf("address of pod %s: %q, %v", pod, p.Status.PodIP, err)
	}
	return p.Status.PodIP
}

// enrolPair starts a mesh with the pair in it.
func enrolPair(t *testing.T, redirect string) *lab {
	t.Helper()
	l := up(t, redirect)
	l.apply(pair)
	l.must("label", "ns", "default", "istio.io/dataplane-mode=ambient")
	l.must("wait", "--timeout", "110s")
	return l
}

type soaked struct {
	Complete, Broken, Wrong int
	Bytes                   int64
	First                   string
}

type answered struct {
	r result
	s soaked
}

// soak runs random traffic with every byte compared, in the background.
func (l *lab) soak(d time.Duration, args ...string) <-chan answered {
	return l.soakFrom("client", d, args...)
}

func (l *lab) soakFrom(pod string, d time.Duration, args ...string) <-chan answered {
	c := make(chan answered, 1)
	go func() {
		var a answered
		a.r = l.tryFor(d+2*time.Minute, "", append([]string{"exec", pod, "--", "ambit-sample", "soak", "-for", d.String()}, args...)...)
		_ = json.Unmarshal([]byte(a.r.out), &a.s) // a failure shows in complete connections
		c <- a
	}()
	return c
}

// A rolling restart takes no connection away that the old proxy had not taken.
func TestRollingRestartRefusesNobody(t *testing.T) { each(t, testRollingRestartRefusesNobody) }

func testRollingRestartRefusesNobody(t *testing.T, redirect string) {
	l := enrolPair(t, redirect)
	done := make(chan result, 1)
	go func() {
		done <- l.try("", "exec", "client", "--", "ambit-sample", "load", "--fresh", "--conns", "4", "--for", "6s", l.ip("far")+":9000")
	}()
	for i := range 4 {
		l.must("restart", "--rolling", fmt.Sprintf("ztunnel@node-%d", i%2+1))
	}
	r := <-done
	var got struct {
		Requests, Errors int
		Error            string
	}
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || got.Requests == 0 || got.Errors > 0 {
		t.Errorf("connections during four rolling restarts: %+v, %v %s", got, err, r.err)
	}
}

// Without the control plane the mesh goes on: connections, new connections, and
// a proxy that starts anew comes back when the control plane does.
func TestControlPlaneAway(t *testing.T) { each(t, testControlPlaneAway) }

func testControlPlaneAway(t *testing.T, redirect string) {
	l := enrolPair(t, redirect)
	far := l.ip("far") + ":9000"
	l.must("kill", "ambitd", "-s", "STOP") // accepts and never answers: worse than gone
	if a := <-l.soak(2*time.Second, far); a.s.Broken+a.s.Wrong > 0 || a.s.Complete == 0 {
		t.Errorf("control plane silent: %+v %s", a.s, a.r.err)
	}
	l.must("kill", "ztunnel@node-2", "-s", "KILL") // starts without a control plane: fails closed
	a := <-l.soak(2*time.Second, "--conns", "2", far)
	if a.s.Wrong > 0 {
		t.Errorf("proxy without configuration: %+v", a.s)
	}
	l.must("kill", "ambitd", "-s", "CONT")
	l.until("the proxy that started meanwhile serves", func() (bool, string) {
		a := <-l.soak(time.Second, "--conns", "2", far)
		return a.s.Complete > 0 && a.s.Broken+a.s.Wrong == 0, fmt.Sprintf("%+v", a.s)
	})
}
