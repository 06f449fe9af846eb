package main

import (
	"context"
	"encoding/json"
	"io"
	"strings"
	"time"
)

// marker is what the demo sends and looks for in captured packets.
const marker = "this-is-the-secret-of-the-demo"

// demo starts a lab, shows the mesh at work, and ends it.
func demo(ctx context.Context, o options, stdout, stderr io.Writer) int {
	if o.name == "default" {
		o.name = "demo"
	}
	ctx, cancel := context.WithTimeout(ctx, 8*time.Minute)
	defer cancel()
	s := &story{stopc: ctx.Done(), name: o.name, out: stdout, began: time.Now()}
	s.chapter("Prerequisites")
	if !s.prerequisites(o.redirect) {
		return s.end()
	}
	s.chapter("A cluster on this machine: two nodes, the control plane, an agent and a proxy per node")
	// The shortest life that ambitd gives, so that half of it passes within the demo.
	o.secretTTL = "1m"
	how := ""
	if o.redirect != "auto" {
		how = " --redirect " + o.redirect
	}
	s.line("$ ambit-lab --name %s up --nodes 2 --secret-ttl %s%s", o.name, o.secretTTL, how)
	l, err := start(ctx, o, stderr)
	if err != nil {
		s.check(false, "the lab starts: %v", err)
		return s.end()
	}
	defer l.kill()
	s.check(true, "the lab is up: ambitd, 2 x ambit-node, 2 x ztunnel, all ready")
	for _, chapter := range []func(){
		s.plain, s.enrol, s.encrypted, s.captured, s.bookinfo, s.names, s.failover, s.strict, s.authorize, s.refusals, s.revoke, s.rotate, s.roots, s.survive, s.fair,
		s.metrics, s.leave,
	} {
		if ctx.Err() != nil {
			break
		}
		chapter()
		if s.fatal {
			break
		}
	}
	if ctx.Err() != nil {
		s.check(false, "the demo ends in time: %v", context.Cause(ctx))
	}
	return s.end()
}

func (s *story) plain() {
	s.chapter("Before: no mesh. A client on node-1 calls a server on node-2")
	s.must("apply", "-f", "echo")
	s.must("wait", "--timeout", "120s")
	wire := s.sniff("node-1", "eth0")
	got := s.run("exec", "client", "--", "curl", "-sS", "--max-time", "30", "-d", marker, "http://echo/hello")
	seen := wire.stop()
	s.check(got.code == 0 && strings.Contains(got.out, marker), "the server answers and repeats what it was sent")
	s.check(seen.Marker > 0, "and everyone on the wire between the nodes can read it: %d of %d packets have the text %q", seen.Marker, seen.Packets, marker)
}

func (s *story) enrol() {
	s.chapter("One label, and the same pods are in the mesh. Nothing restarts")
	before := s.quiet("get", "pods", "-o", "name").out
	s.must("label", "ns", "default", "istio.io/dataplane-mode=ambient")
	s.must("wait", "--timeout", "120s")
	s.check(before == s.quiet("get", "pods", "-o", "name").out, "the same pods run: %s", strings.Join(strings.Fields(before), " "))
	s.line("$ ambit-lab exec client -- curl http://echo/hello      (the same call; its line in ztunnel's access log on node-2:)")
	ok := s.until(patience, func() (bool, string) {
		mark := s.logged("ztunnel@node-2")
		s.quiet("exec", "client", "--", "curl", "-sS", "--max-time", "5", "-d", marker, "http://echo/hello")
		line := s.newLine(mark, "ztunnel@node-2", "connection complete", `direction="inbound"`, "dst.hbone_addr")
		return field(line, "src.identity") == identityOf("client") && field(line, "dst.identity") == identityOf("echo"), accessLine(line)
	})
	s.check(ok, "it is mutual TLS now: the certificates' names are %s and %s", identityOf("client"), identityOf("echo"))
}

func (s *story) encrypted() {
	s.chapter("What is plain text, and where")
	wire, eth, lo := s.sniff("node-1", "eth0"), s.sniff("client", "eth0"), s.sniff("client", "lo")
	got := s.run("exec", "client", "--", "curl", "-sS", "--max-time", "30", "-d", marker, "http://echo/hello")
	w, e, l := wire.stop(), eth.stop(), lo.stop()
	s.check(got.code == 0 && strings.Contains(got.out, marker), "the server still gets the text")
	s.check(w.Marker == 0 && w.TLS > 0 && w.HBONE > 0, "on the wire between the nodes: %d packets, %d with TLS records, %d to or from port 15008, %d with the text", w.Packets, w.TLS, w.HBONE, w.Marker)
	s.check(e.Marker == 0 && e.TLS > 0, "on the pod's own interface: %d packets, %d with TLS records, %d with the text", e.Packets, e.TLS, e.Marker)
	s.check(l.Marker > 0, "plain text is only inside the two pods, between the program and the proxy's socket there (loopback: %d packets with the text)", l.Marker)
	var a struct{ Peer string }
	_ = json.Unmarshal([]byte(got.out), &a) // an empty peer fails the check
	ips := s.quiet("get", "pods", "-l", "app=client", "-o", "yaml").out
	host := strings.Trim(a.Peer[:max(strings.LastIndexByte(a.Peer, ':'), 0)], "[]")
	s.check(host != "" && strings.Contains(ips, "ip: "+host), "the server sees the client's own address: %s", a.Peer)
}

func (s *story) bookinfo() {
	s.chapter("Bookinfo: four services, each call between them through the mesh")
	s.must("apply", "-n", "bookinfo", "-f", "bookinfo")
	s.line("   (pods of one node may do without a tunnel; here each call is to have one)")
	s.must("annotate", "ns", "bookinfo", "ambit.dev/same-node=hbone")
	s.must("label", "ns", "bookinfo", "istio.io/dataplane-mode=ambient")
	s.must("wait", "-n", "bookinfo", "--timeout", "120s")
	s.line("$ ambit-lab exec client -- curl http://productpage.bookinfo:9080/productpage")
	ok := s.until(patience, func() (bool, string) {
		mark := s.marks()
		page := s.quiet("exec", "client", "--", "curl", "-sS", "--max-time", "8", "http://productpage.bookinfo:9080/productpage").out
		text := between(page, "<title>", "</title>") + "; reviews served by " + between(page, "<u>", "</u>")
		whole := strings.Contains(page, "PublisherA") && strings.Contains(page, "Reviewer1") && !strings.Contains(page, "Error fetching")
		for _, sa := range []string{"bookinfo-details", "bookinfo-reviews"} {
			line := s.newLineAnywhere(mark, "connection complete", "/sa/bookinfo-productpage\"", "/sa/"+sa+"\"")
			whole = whole && line != ""
		}
		return whole, text
	})
	s.check(ok, "the page is whole, and productpage reached details and reviews with certificates")
}

const strictYAML = `apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
`

const outsiderYAML = `apiVersion: v1
kind: Pod
metadata: {name: outsider, namespace: outside}
spec:
  nodeSelector: {kubernetes.io/hostname: node-1}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: curl, image: curlimages/curl}
`

func (s *story) strict() {
	s.chapter("STRICT: who is not in the mesh stays outside")
	s.apply(outsiderYAML, "a pod in a namespace that is not in the mesh")
	s.must("wait", "-n", "outside", "--timeout", "120s")
	plain := s.run("exec", "-n", "outside", "outsider", "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "30", "http://echo.default/")
	s.check(plain.out == "200", "by default (PERMISSIVE) its plain call is let in: status %s", plain.out)
	s.apply(strictYAML, "PeerAuthentication default: STRICT")
	s.line("$ ambit-lab exec -n outside outsider -- curl http://echo.default/")
	var why string
	ok := s.until(patience, func() (bool, string) {
		mark := s.logged("ztunnel@node-2")
		r := s.quiet("exec", "-n", "outside", "outsider", "--", "curl", "-sS", "-o", "/dev/null", "--max-time", "5", "http://echo.default/")
		why = field(s.newLine(mark, "ztunnel@node-2", "STRICT"), "error")
		return r.code != 0 && why != "", strings.TrimSpace(r.err) + "   ztunnel's log: " + why
	})
	s.check(ok, "the plain call is refused, and the log says why")
	s.check(s.works("client"), "a client in the mesh is not affected")
}

const allowClientYAML = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: echo-callers, namespace: default}
spec:
  selector: {matchLabels: {app: echo}}
  action: ALLOW
  rules:
  - from:
    - source: {principals: ["cluster.local/ns/default/sa/client"]}
`

func (s *story) authorize() {
	s.chapter("AuthorizationPolicy: by identity, not by address")
	s.check(s.works("stranger"), "the pod stranger, with the service account stranger, may call echo")
	s.apply(allowClientYAML, "AuthorizationPolicy echo-callers: only cluster.local/ns/default/sa/client")
	s.line("$ ambit-lab exec stranger -- curl http://echo/")
	var why string
	ok := s.until(patience, func() (bool, string) {
		mark := s.logged("ztunnel@node-2")
		r := s.quiet("exec", "stranger", "--", "curl", "-sS", "-o", "/dev/null", "--max-time", "5", "http://echo/")
		why = field(s.newLine(mark, "ztunnel@node-2", `/sa/stranger"`, "error="), "error")
		return r.code != 0 && why != "", strings.TrimSpace(r.err) + "   ztunnel's log: " + why
	})
	s.check(ok, "stranger is denied, with the reason")
	s.check(s.works("client"), "client is allowed")
}

const denyClientYAML = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-client, namespace: default}
spec:
  selector: {matchLabels: {app: echo}}
  action: DENY
  rules:
  - from:
    - source: {principals: ["cluster.local/ns/default/sa/client"]}
`

func (s *story) revoke() {
	s.chapter("A policy change closes connections that run")
	c := s.background("exec", "client", "--", "curl", "-sSN", "--max-time", "300", "http://echo/stream")
	defer c.stop()
	if !s.until(patience, func() (bool, string) { return c.lines() >= 3, c.last() }) {
		s.check(false, "a stream runs: %s", c.last())
		return
	}
	s.check(true, "a stream of lines runs over one connection: %s ...", c.last())
	mark := s.logged("ztunnel@node-2")
	at := time.Now()
	s.apply(denyClientYAML, "AuthorizationPolicy no-client: DENY the identity of client")
	ended := c.wait(patience)
	s.check(ended && c.code() != 0, "the connection is closed %s after `apply` was typed", time.Since(at).Round(time.Millisecond))
	line := ""
	s.until(patience, func() (bool, string) {
		line = s.newLine(mark, "ztunnel@node-2", `/sa/client"`, "error=")
		return line != "", "ztunnel's log: " + field(line, "error")
	})
	s.check(strings.Contains(line, "no-client"), "and the log names the policy")
	s.must("delete", "authorizationpolicy", "no-client")
	s.check(s.until(patience, func() (bool, string) { return s.works("client"), "" }), "without the policy it may call again")
}

func (s *story) rotate() {
	s.chapter("Certificates are renewed at half of their life, under load")
	load := s.calling("client", "http://echo/")
	defer load.stop()
	served := func(n int) bool {
		return s.until(patience, func() (bool, string) { return load.lines() >= n, "" })
	}
	s.check(served(20), "calls run one after the other")
	first := s.serial("node-1", "client")
	s.line("   the certificate of client has the serial number %s", first)
	last := ""
	ok := s.until(patience, func() (bool, string) {
		last = s.serial("node-1", "client")
		return first != "" && last != "" && last != first, ""
	})
	s.check(ok, "it was renewed: now %s", last)
	served(load.lines() + 20)
	load.stop()
	all, failed := load.calls()
	s.check(failed == 0 && all > 0, "%d calls were made meanwhile, each over a connection of its own; %d failed", all, failed)
}

func (s *story) survive() {
	s.chapter("ztunnel is killed and comes back")
	s.must("kill", "ztunnel@node-1", "-s", "KILL")
	at := time.Now()
	wire := s.sniff("node-1", "eth0")
	ok := s.until(patience, func() (bool, string) { return s.worksWithin("client", "5"), "" })
	took := time.Since(at).Round(10 * time.Millisecond)
	seen := wire.stop()
	s.check(ok, "traffic of the node's pods resumes after %s, without a restart of any pod", took)
	s.check(seen.Marker == 0, "meanwhile nothing went out in plain text (%d packets with the text)", seen.Marker)
}

func (s *story) metrics() {
	s.chapter("Metrics, under the names that dashboards have")
	s.line("$ ambit-lab exec node-2 -- curl http://127.0.0.1:15020/metrics | grep istio_tcp_connections_opened_total")
	var found string
	ok := s.until(patience, func() (bool, string) {
		for line := range strings.SplitSeq(s.quiet("exec", "node-2", "--", "curl", "-sS", "http://127.0.0.1:15020/metrics").out, "\n") {
			if strings.HasPrefix(line, "istio_tcp_connections_opened_total{") && strings.Contains(line, `connection_security_policy="mutual_tls"`) &&
				strings.Contains(line, "sa/client") && strings.Contains(line, `reporter="destination"`) {
				found = line
				return true, short(line)
			}
		}
		return false, ""
	})
	s.check(ok && !strings.HasSuffix(found, " 0"), "the connections are counted, with both identities and mutual_tls")
}

func (s *story) leave() {
	s.chapter("And out of the mesh again")
	s.must("delete", "peerauthentication", "default")
	s.must("delete", "authorizationpolicy", "echo-callers")
	s.must("label", "ns", "default", "istio.io/dataplane-mode-")
	s.must("wait", "--timeout", "120s")
	ok := s.until(patience, func() (bool, string) {
		wire := s.sniff("node-1", "eth0")
		r := s.quiet("exec", "client", "--", "curl", "-sS", "--max-time", "5", "-d", marker, "http://echo/")
		return wire.stop().Marker > 0 && r.code == 0, ""
	})
	s.check(ok, "the same pods talk in plain text as before")
}
