package e2e

import (
	"cmp"
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"
)

const neighbours = `
apiVersion: v1
kind: Pod
metadata: {name: victim, namespace: default}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, pause]}]
---
apiVersion: v1
kind: Pod
metadata: {name: neighbour, namespace: default}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, pause]}]
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, namespace: default, labels: {istio.io/dataplane-mode: none}}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, pause]}]
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: default}
spec:
  nodeName: node-2
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, echo]}]
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: default}
spec:
  nodeName: node-2
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, echo]}]
`

// loaded is what a closed loop of requests saw.
type loaded struct {
	Requests, Errors int
	Rate             float64
	P99              float64 `json:"p99us"`
	Error            string
}

// beside loads the server from the victim for d while another pod does
// something else, which begins before and ends after.
func (l *lab) beside(d time.Duration, pod string, args ...string) (got loaded) {
	l.t.Helper()
	done := make(chan result, 1)
	limit := strconv.Itoa(int(d/time.Second) + 3)
	go func() {
		done <- l.try("", append([]string{"exec", pod, "--", "timeout", "-s", "INT", limit, "ambit-sample"}, args...)...)
	}()
	time.Sleep(time.Second) // both kinds of neighbour get it; nothing below depends on how far they came
	r := l.try("", "exec", "victim", "--", "ambit-sample", "load", "--conns", "8", "--for", d.String(), l.ip("server")+":9000")
	if err := json.Unmarshal([]byte(r.out), &got); err != nil {
		l.t.Fatalf("load beside %q: %v\n%s%s", args, err, r.out, r.err)
	}
	<-done
	return got
}

// Each request of a pod is answered while a neighbour attacks, on either node.
//
// AMBIT_FAIR=5 measures, five times in turn, what an attack leaves a pod of what
// an equal load that behaves does, and logs the medians. They are for the eye:
// all of the mesh, the load and the attack share this machine's processors, and
// a pod's processes are not held back by the proxy.
func TestFairSharing(t *testing.T) {
	rounds, d := 1, time.Second
	if s := os.Getenv("AMBIT_FAIR"); s != "" {
		var err error
		if rounds, err = strconv.Atoi(s); err != nil || rounds < 1 {
			t.Fatalf("AMBIT_FAIR=%q: want a number of rounds", s)
		}
		d = 4 * time.Second
	}
	l := up(t, either)
	l.apply(neighbours)
	l.must("label", "ns", "default", "istio.io/dataplane-mode=ambient")
	l.must("wait", "--timeout", "110s")
	l.until("pods reach each other", func() (bool, string) {
		a := l.try("", "exec", "victim", "--", "ambit-sample", "load", "--conns", "1", "--for", "100ms", l.ip("server")+":9000")
		b := l.try("", "exec", "neighbour", "--", "ambit-sample", "load", "--conns", "1", "--for", "100ms", l.ip("other")+":9000")
		return a.code+b.code == 0, a.err + b.err
	})
	other, tunnels := l.ip("other")+":9000", l.ip("other")+":15008"
	for _, c := range []struct {
		name          string
		pod           string
		fair, attacks []string
	}{
		{"streams that nobody reads", "neighbour", []string{"load", "--conns", "1000", "--size", "65536", "--for", "1m", other}, []string{"attack", "--n", "1000", "stalled", other}},
		{"connections", "neighbour", []string{"load", "--fresh", "--conns", "64", "--for", "1m", other}, []string{"attack", "--n", "64", "connects", other}},
		{"connections that are refused", "neighbour", []string{"load", "--fresh", "--conns", "64", "--for", "1m", other}, []string{"attack", "--n", "64", "connects", l.ip("other") + ":9999"}},
		{"handshakes", "stranger", []string{"load", "--tls", "--conns", "64", "--for", "1m", tunnels}, []string{"attack", "--n", "10000", "handshakes", tunnels}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var rate, p99 []float64
			for range rounds {
				fair, attacked := l.beside(d, c.pod, c.fair...), l.beside(d, c.pod, c.attacks...)
				if fair.Errors+attacked.Errors > 0 || fair.Requests == 0 || attacked.Requests == 0 {
					t.Errorf("want each request answered: %+v beside a load, %+v beside an attack", fair, attacked)
					return
				}
				rate, p99 = append(rate, attacked.Rate/fair.Rate), append(p99, attacked.P99/fair.P99)
			}
			t.Logf("under attack: %.2f of the rate, %.2f of the p99 beside an equal load", median(rate), median(p99))
		})
	}
}

func median[T cmp.Ordered](v []T) T {
	slices.Sort(v)
	return v[len(v)/2]
}
