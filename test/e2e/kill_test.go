package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"
)

// bystanders are a pod that joins and leaves the mesh, one that never is in it, and
// a service in front of the far server.
const bystanders = `
apiVersion: v1
kind: Pod
metadata: {name: moody, labels: {app: moody}}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, echo]}]
---
apiVersion: v1
kind: Pod
metadata: {name: plain, labels: {app: plain, istio.io/dataplane-mode: none}}
spec:
  nodeName: node-1
  containers: [{name: c, image: ambit-sample, command: [ambit-sample, pause]}]
---
apiVersion: v1
kind: Service
metadata: {name: far}
spec: {selector: {app: far}, ports: [{name: tcp, port: 9000}]}
`

// schedule is what is done to a mesh, drawn from a seed.
type schedule struct {
	l    *lab
	rand *rand.Rand
	done map[string]int
}

// step does one thing and says what.
func (s *schedule) step() string {
	node := fmt.Sprintf("node-%d", 1+s.rand.IntN(2))
	proxy, agent := "ztunnel@"+node, "ambit-node@"+node
	signal := func(sig string, victims ...string) {
		var all sync.WaitGroup // as much at the same time as can be
		for _, v := range victims {
			all.Go(func() { s.l.try("", "kill", v, "-s", sig) }) // one that is down at this moment is not killed
		}
		all.Wait()
	}
	term := []string{"KILL", "KILL", "KILL", "TERM"}[s.rand.IntN(4)]
	steps := []struct {
		name string
		do   func()
	}{
		{"proxy", func() { signal(term, proxy) }},
		{"proxy", func() { signal(term, proxy) }},
		{"both proxies", func() { signal("KILL", "ztunnel@node-1", "ztunnel@node-2") }},
		{"rolling restart", func() { s.l.tryFor(2*time.Minute, "", "restart", "--rolling", proxy) }},
		{"agent", func() { signal(term, agent) }},
		{"agent and proxy", func() { signal("KILL", agent, proxy) }},
		{"proxy beside a frozen agent", func() {
			signal("STOP", agent)
			signal("KILL", proxy)
			time.Sleep(time.Duration(s.rand.IntN(1500)) * time.Millisecond)
			signal("CONT", agent)
		}},
		{"control plane", func() { signal(term, "ambitd") }},
		{"all", func() {
			signal("KILL", "ambitd", "ambit-node@node-1", "ambit-node@node-2", "ztunnel@node-1", "ztunnel@node-2")
		}},
		{"label off", func() { s.l.try("", "label", "pod", "moody", "istio.io/dataplane-mode=none") }},
		{"label on", func() { s.l.try("", "label", "pod", "moody", "istio.io/dataplane-mode=ambient") }},
	}
	what := steps[s.rand.IntN(len(steps))]
	what.do()
	s.done[what.name]++
	return what.name
}

// Whatever process is killed, and however often: no byte is lost, added or changed
// without the client seeing a broken connection, and from a pod of the mesh to
// another no connection begins but to the tunnels' port, on any interface.
//
// AMBIT_KILLS=10m kills that long, AMBIT_SEED=N what seed N drew.
func TestProcessesKilledAtRandom(t *testing.T) { each(t, testProcessesKilledAtRandom) }

func testProcessesKilledAtRandom(t *testing.T, redirect string) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("AMBIT_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("AMBIT_SEED=%q: want a number", s)
		}
	}
	t.Logf("AMBIT_SEED=%d", seed)
	l := enrolPair(t, redirect)
	l.apply(bystanders)
	l.must("wait", "--timeout", "110s")
	d := killTime(t)
	measured := append(append(l.ips("client"), l.ips("near")...), l.ips("far")...)
	targets, vips := measured, l.vips("far")
	wire := l.capture()
	before := l.control(9000)

	var far []string
	for _, a := range append(l.ips("far"), vips...) {
		far = append(far, netip.AddrPortFrom(a, 9000).String())
	}
	end := d + 4*time.Second
	args := append([]string{"--conns", "8", "--max", "262144"}, far...)
	for _, a := range l.ips("near") {
		args = append(args, netip.AddrPortFrom(a, 9000).String())
	}
	soaks := map[string]<-chan answered{
		"client": l.soakFrom("client", end, args...),
		"near":   l.soakFrom("near", end, append([]string{"--conns", "2", "--max", "65536"}, far...)...),
		// Joins and leaves: its clear text is its own matter, its bytes are not.
		"moody": l.soakFrom("moody", end, append([]string{"--conns", "2", "--max", "65536"}, far...)...),
	}
	s := &schedule{l: l, rand: rand.New(rand.NewPCG(seed, 0)), done: map[string]int{}}
	for deadline := time.Now().Add(d); time.Now().Before(deadline); {
		s.step()
		time.Sleep(time.Duration(s.rand.IntN(1500)) * time.Millisecond)
	}
	t.Logf("done to the mesh in %s: %v", d, s.done)
	for pod, c := range soaks {
		a := <-c
		t.Logf("soak of %s: %+v", pod, a.s)
		if a.s.Wrong > 0 || a.s.Complete == 0 {
			t.Errorf("soak of %s: %+v (exit status %d) %s", pod, a.s, a.r.code, a.r.err)
		}
	}
	l.must("label", "pod", "moody", "istio.io/dataplane-mode=ambient")
	l.must("wait", "--timeout", "110s")
	after := l.control(9001)
	seen := wire.stop()
	before(seen)
	after(seen)
	out, tunnels := leaks(seen, measured, append(targets, vips...))
	t.Logf("SYNs between pods of the mesh: %d to port %d (each counted on every cable that it passed), %d kinds to others", tunnels, portHBONE, len(out))
	if len(out) > 0 || tunnels == 0 {
		t.Errorf("connections between pods of the mesh that were no tunnels, besides %d that were: %q", tunnels, out)
	}
	l.until("all is well after the kills", func() (bool, string) {
		a := <-l.soak(2*time.Second, l.ip("far")+":9000", l.ip("near")+":9000")
		if a.s.Wrong > 0 {
			t.Errorf("after the kills: %+v %s", a.s, a.r.err)
		}
		return a.s.Broken == 0 && a.s.Complete > 0, fmt.Sprintf("%+v %s", a.s, a.r.err)
	})
}

// vips are the addresses of a service.
func (l *lab) vips(service string) (all []netip.Addr) {
	l.t.Helper()
	var s struct {
		Spec struct{ ClusterIPs []netip.Addr }
	}
	l.decode(&s, "get", "service", service, "-o", "json")
	return s.Spec.ClusterIPs
}
