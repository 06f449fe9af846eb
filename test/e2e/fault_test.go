package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"
)

// soakTime is how long processes are killed at random. AMBIT_SOAK=10m is what a
// release is tested with; the default keeps the test in every run.
func soakTime(t *testing.T) time.Duration {
	s := os.Getenv("AMBIT_SOAK")
	if s == "" {
		return 15 * time.Second
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("AMBIT_SOAK=%q: %v", s, err)
	}
	return d
}

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
func enrolPair(t *testing.T, args ...string) *lab {
	t.Helper()
	l := up(t, args...)
	l.apply(pair)
	l.must("label", "ns", "default", "istio.io/dataplane-mode=ambient")
	l.must("wait")
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
	c := make(chan answered, 1)
	go func() {
		var a answered
		a.r = l.tryFor(d+2*time.Minute, "", append([]string{"exec", "client", "--", "ambit-sample", "soak", "-for", d.String()}, args...)...)
		_ = json.Unmarshal([]byte(a.r.out), &a.s) // a failure shows in complete connections
		c <- a
	}()
	return c
}

// Whatever process is killed, and however often: no byte is lost, added or
// changed without the client seeing a broken connection, and nothing between
// enrolled pods crosses the wire in clear text.
func TestProcessesKilledAtRandom(t *testing.T) {
	l := enrolPair(t)
	d := soakTime(t)
	const marker = "ambit-soak-marker"
	sniffed := make(chan result, 1)
	go func() {
		sniffed <- l.tryFor(d+time.Minute, "", "exec", "node-1", "--", "ambit-sample", "sniff", "eth0", marker, (d + 2*time.Second).String())
	}()
	done := l.soak(d, "--conns", "8", "--max", "262144", "--marker", marker, l.ip("far")+":9000", l.ip("near")+":9000")

	victims := []string{"ambitd", "ztunnel@node-1", "ztunnel@node-2", "ambit-node@node-1", "ambit-node@node-2"}
	kills, deadline := map[string]int{}, time.Now().Add(d-3*time.Second)
	for time.Now().Before(deadline) {
		v := victims[rand.IntN(len(victims))]
		switch {
		case strings.HasPrefix(v, "ztunnel") && rand.IntN(3) == 0:
			l.try("", "restart", "--rolling", v) // one that is down at this moment is not replaced
		case rand.IntN(4) == 0:
			l.try("", "kill", v, "-s", "TERM")
		default:
			l.try("", "kill", v, "-s", "KILL")
		}
		kills[v]++
		select {
		case a := <-done:
			t.Fatalf("the soak ended early: %+v %s", a.s, a.r.err)
		case <-time.After(time.Duration(rand.IntN(1500)) * time.Millisecond):
		}
	}
	a := <-done
	t.Logf("kills %v; soak %+v", kills, a.s)
	if a.s.Wrong > 0 || a.s.Complete == 0 {
		t.Errorf("soak: %+v (exit status %d) %s", a.s, a.r.code, a.r.err)
	}
	seen := <-sniffed
	if !strings.Contains(seen.out, `"marker":0`) || strings.Contains(seen.out, `"hbone":0`) {
		t.Errorf("on the wire: %s%s; want no marker in clear text, and tunnels", seen.out, seen.err)
	}
	l.must("wait")
	if a := <-l.soak(2*time.Second, l.ip("far")+":9000", l.ip("near")+":9000"); a.s.Broken+a.s.Wrong > 0 || a.s.Complete == 0 {
		t.Errorf("after the kills: %+v %s", a.s, a.r.err)
	}
}

// A rolling restart takes no connection away that the old proxy had not taken.
func TestRollingRestartRefusesNobody(t *testing.T) {
	l := enrolPair(t)
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
func TestControlPlaneAway(t *testing.T) {
	l := enrolPair(t)
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
