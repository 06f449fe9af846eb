package main

import (
	"encoding/json"
	"strings"
	"time"
)

// captured tells how a program's connection gets to the proxy without the program
// knowing, and shows that none takes another way.
func (s *story) captured() {
	s.chapter("How a connection gets to the proxy, though the program asked for somebody else")
	out := s.shows("exec", "node-1", "--", "ambit-node", "status")
	programs := strings.Contains(out, "captured with ebpf")
	s.check(strings.Contains(out, "captured with ") && strings.Contains(out, "client-"), "the node's agent says by what means it captures connections, why by these, and of which pods")
	rules := s.shows("exec", "client", "--", "nft", "list", "ruleset")
	if programs {
		s.check(strings.TrimSpace(rules) == "", "not by firewall rules: the pod has none, and no connection tracking has to hold with them")
		s.hooks(s.shows("programs", "node-1"))
	} else {
		s.check(strings.Contains(rules, "redirect to :15001"), "by firewall rules in the pod's own network namespace: what leaves is redirected to the proxy's port there")
	}
	s.starts()
}

func (s *story) hooks(table string) {
	at := func(where, hook string) bool {
		for line := range strings.Lines(table) {
			if strings.HasPrefix(line, where) && strings.Contains(line, hook) {
				return true
			}
		}
		return false
	}
	s.check(at("cgroup node-1/pods ", "connect4"), "but by small programs that the kernel runs. connect4 and connect6: each connect() of a pod's process is led to ztunnel's socket in the pod")
	s.check(at("cgroup node-1/pods ", "getpeername4"), "getpeername4 and its like tell the process what it expects: the address that it asked for")
	s.check(at("pod default/client-", "sk_lookup"), "sk_lookup: what arrives at a pod is handed to ztunnel, with the addresses that it came with")
	s.check(at("pod default/client-", "tcx/egress") && at("pod default/client-", "tcx/ingress"), "tcx: both ends of the pod's cable let no connection begin that got past the others")
	s.check(at("cgroup node-1/pods/ambit-system_ztunnel-node-1", "getsockopt"), "and ztunnel is known by its cgroup alone, which no other process can fake as it can a mark on packets")
}

// starts makes a pod's first call, which needs a tunnel of its own, and looks at
// every interface of the lab meanwhile.
func (s *story) starts() {
	all := s.background("capture", "-o", "json")
	s.line("$ ambit-lab capture      (every connection that begins, on every interface of the lab; and meanwhile:)")
	for deadline := time.Now().Add(patience); all.lines() == 0 && time.Now().Before(deadline) && !all.wait(10*time.Millisecond); {
	}
	s.run("exec", "stranger", "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "30", "http://echo/hello")
	all.stop()
	var seen struct {
		Watched int
		Starts  []struct {
			Src, Dst string
			Port     int
		}
	}
	_ = json.Unmarshal([]byte(all.last()), &seen) // nothing watched fails the check
	from, to := s.addresses("stranger"), s.addresses("echo")
	tunnels, others := 0, 0
	for _, b := range seen.Starts {
		switch {
		case !from[b.Src]:
		case b.Port == 15008 && to[b.Dst]:
			tunnels++
		default:
			others++
		}
	}
	s.check(tunnels > 0 && others == 0, "in %d network namespaces, on every interface but loopback: what stranger began was seen %d times and was a tunnel to echo's port 15008; it began %d others", seen.Watched, tunnels, others)
}

// addresses are those of the pods of an app.
func (s *story) addresses(app string) map[string]bool {
	var list struct {
		Items []struct {
			Status struct{ PodIPs []struct{ IP string } }
		}
	}
	_ = json.Unmarshal([]byte(s.quiet("get", "pods", "-l", "app="+app, "-o", "json").out), &list) // no address fails the check
	out := map[string]bool{}
	for _, p := range list.Items {
		for _, ip := range p.Status.PodIPs {
			out[ip.IP] = true
		}
	}
	return out
}

// shows runs a command and shows all its lines.
func (s *story) shows(args ...string) string {
	s.line("$ ambit-lab %s", shown(args))
	r := s.quiet(args...)
	const most = 14
	lines := strings.Split(strings.TrimRight(r.out+r.err, "\n"), "\n")
	if r.out+r.err == "" {
		lines = []string{"(nothing)"}
	}
	for i, l := range lines {
		if i == most {
			s.line("   ... and %d lines more", len(lines)-most)
			break
		}
		s.line("   %s", short(l))
	}
	return r.out
}
