package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// ambitdState is where the lab's control plane keeps its certificates.
const ambitdState = "/run/ambit-lab/mesh/ambitd"

const webYAML = `apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: None, selector: {app: web}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: web}
spec:
  serviceName: web
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - {name: web, image: ambit-sample, command: [ambit-sample, echo]}
`

const vendorYAML = `apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: vendor}
spec:
  hosts: [api.vendor.example]
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  location: MESH_EXTERNAL
  resolution: STATIC
  workloadSelector: {labels: {app: web}}
`

// dig asks the client's resolver and returns the answers, one per word.
func (s *story) dig(args ...string) []string {
	return strings.Fields(s.run(append([]string{"exec", "client", "--", "ambit-sample", "lookup"}, args...)...).out)
}

func (s *story) names() {
	s.chapter("Names: the node's proxy answers DNS for the mesh")
	s.apply(webYAML, "a StatefulSet web with two pods, a headless Service web, a Service shop")
	s.apply(vendorYAML, "ServiceEntry vendor: api.vendor.example, which no DNS server knows and which has no address")
	s.must("wait", "--timeout", "120s")
	var pods []string
	ok := s.until(patience, func() (bool, string) {
		pods = strings.Fields(s.quiet("exec", "client", "--", "ambit-sample", "lookup", "web").out)
		one := strings.Fields(s.quiet("exec", "client", "--", "ambit-sample", "lookup", "web-1.web").out)
		return len(one) > 0 && len(pods) == 2*len(one), ""
	})
	s.check(ok, "the headless Service has the addresses of its pods: %s", strings.Join(pods, " "))
	one := s.dig("web-1.web")
	s.check(len(one) >= 1 && len(one) < len(pods), "and each pod of a StatefulSet its own name: web-1.web is %s", strings.Join(one, " "))
	var vip []string
	given := s.until(patience, func() (bool, string) {
		vip = strings.Fields(s.quiet("exec", "client", "--", "ambit-sample", "lookup", "api.vendor.example").out)
		return len(vip) > 0 && (strings.HasPrefix(vip[0], "240.240.") || strings.HasPrefix(vip[len(vip)-1], "240.240.")), ""
	})
	s.check(given, "the ServiceEntry was given an address of its own: %s", strings.Join(vip, " "))
	var got result
	s.until(patience, func() (bool, string) { // its endpoints may come a moment after its name
		got = s.quiet("exec", "client", "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "30", "http://api.vendor.example/")
		return got.out == "200", "curl http://api.vendor.example/ " + got.err
	})
	s.check(got.out == "200", "and a call to it is served: status %s", got.out)
}

func (s *story) failover() {
	s.chapter("An endpoint dies, and its callers do not notice")
	calls := s.calling("client", "http://shop/")
	defer calls.stop()
	served := func(n int) bool {
		return s.until(patience, func() (bool, string) { return calls.lines() >= n, "" })
	}
	served(20)
	for kills := range 3 {
		s.must("kill", "web-1", "-s", "KILL")
		served(calls.lines() + 30)
		again := fmt.Sprintf("restartCount: %d", kills+1) // else the next one would find nobody to kill
		s.until(patience, func() (bool, string) {
			pod := s.quiet("get", "pod", "web-1", "-o", "yaml").out
			return strings.Contains(pod, again) && strings.Contains(pod, "running:"), again
		})
	}
	calls.stop()
	all, failed := calls.calls()
	// A call that the process had begun to answer when it was killed is lost with it, with any mesh.
	s.check(all > 0 && failed <= 3, "%d calls while web-1 was killed three times: %d answered; what had not been sent went to the other endpoint", all, all-failed)
}

func (s *story) refusals() {
	s.chapter("From \"connection reset\" to the cause")
	s.line("$ ambit-lab exec node-1 -- curl 'localhost:15000/refusals?format=text'      (the client's side)")
	out := s.quiet("exec", "node-1", "--", "curl", "-sS", "http://127.0.0.1:15000/refusals?format=text").out
	trace, count := "", 0
	for line := range strings.Lines(out) {
		if w := strings.Fields(line); len(w) > 8 && w[3] == "default/stranger" {
			s.line("   %s", short(strings.TrimSpace(line)))
			count, _ = strconv.Atoi(w[0]) // a table of ours
			trace = w[7]
		}
	}
	s.check(trace != "", "the refusals of stranger are there, %d of them in one line", count)
	line := ""
	s.until(patience, func() (bool, string) {
		line = s.newLine(0, "ztunnel@node-2", trace)
		return line != "", "the other side's line with the same trace id: " + field(line, "error")
	})
	s.check(trace != "" && line != "", "and the destination's log says under the same trace id which rule it was")
}

func (s *story) roots() {
	s.chapter("Another root certificate, while everything runs")
	load := s.calling("client", "http://echo/")
	defer load.stop()
	ca := func(verb string, more ...string) result {
		return s.quiet(append([]string{"exec", "node-1", "--", "ambitd", "ca", verb, "--state-dir", ambitdState}, more...)...)
	}
	told := func(r result) string { // the first line says what was done
		line, _, _ := strings.Cut(strings.TrimSpace(r.out+r.err), "\n")
		return short(strings.Join(strings.Fields(line), " "))
	}
	s.line("$ ambitd ca rotate")
	r := ca("rotate")
	s.check(r.code == 0, "%s", told(r))
	both := s.until(patience, func() (bool, string) { return s.rootsOf("node-1") == 2 && s.rootsOf("node-2") == 2, "" })
	s.check(both, "both nodes trust two roots now")
	s.line("$ ambitd ca promote --force      (the lab cannot wait a day for proxies that do not follow at once)")
	client, echo := s.serial("node-1", "client"), s.serial("node-2", "echo")
	r = ca("promote", "--force")
	s.check(r.code == 0, "%s", told(r))
	s.until(patience, func() (bool, string) {
		return s.serial("node-1", "client") != client && s.serial("node-2", "echo") != echo, ""
	})
	load.stop()
	all, failed := load.calls()
	s.check(failed == 0 && all > 0, "%d calls were made meanwhile; %d failed", all, failed)
	s.line("$ ambitd ca retire --force      (a day later nothing stands on the old root; now it cuts what still does)")
	r = ca("retire", "--force")
	s.check(r.code == 0, "%s", told(r))
	one := s.until(patience, func() (bool, string) { return s.rootsOf("node-1") == 1 && s.rootsOf("node-2") == 1, "" })
	works := s.until(patience, func() (bool, string) { return s.works("client"), "" })
	s.check(one && works, "only the new root is trusted, and calls go on")
}

// rootsOf counts the roots that a node trusts now.
func (s *story) rootsOf(node string) int {
	out := s.quiet("exec", node, "--", "curl", "-sS", "http://127.0.0.1:15020/metrics").out
	return strings.Count(out, "\nambit_ztunnel_root_expiry_seconds{")
}

func (s *story) fair() {
	s.chapter("A noisy neighbour: one pod attacks, the others work")
	rate := func() (rate float64, p99 time.Duration, errs int) {
		var r struct {
			Rate   float64
			P99us  float64
			Errors int
		}
		out := s.quiet("exec", "client", "--", "ambit-sample", "load", "--conns", "4", "--for", "2s", "echo:9000").out
		_ = json.Unmarshal([]byte(out), &r) // nothing read fails the check
		return r.Rate, time.Duration(r.P99us) * time.Microsecond, r.Errors
	}
	beside := func(what string, args ...string) bool {
		b := s.background(append([]string{"exec", "web-0", "--", "ambit-sample"}, args...)...)
		defer b.stop()
		s.until(time.Second, func() (bool, string) { return false, "" })
		n, p99, errs := rate()
		s.line("   %-46s %6.0f requests/s, p99 %s, %d errors", what, n, p99.Round(100*time.Microsecond), errs)
		return n > 0 && errs == 0
	}
	ok := beside("beside 200 connections that behave:", "load", "--conns", "200", "--size", "65536", "--for", "6s", "echo:9000")
	ok = beside("beside 200 that never read their answers:", "attack", "--n", "200", "stalled", "echo:9000") && ok
	ok = beside("beside a storm of new connections:", "attack", "--n", "64", "connects", "echo:9000") && ok
	s.check(ok, "no request of the client failed; rates are for the eye: this machine is shared by all of them")
}
