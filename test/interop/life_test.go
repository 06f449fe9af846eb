//go:build interop

package interop

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// loads starts a load in each direction.
func loads(t *testing.T, l *lab) map[string]*background {
	t.Helper()
	all := map[string]*background{}
	for _, r := range routes {
		all[r.name] = l.begin(t, r.client(), "load", "-n", "4", r.server())
	}
	return all
}

// unharmed stops a load and wants that nothing failed.
func unharmed(t *testing.T, b *background) string {
	t.Helper()
	s := b.load(t)
	if s.Failed > 0 || s.Broken > 0 || s.Calls == 0 || s.Asked == 0 {
		t.Errorf("%+v", s)
	}
	return ""
}

// harmed stops a load that loses a proxy on its way; it has to go on afterwards.
func harmed(t *testing.T, l *lab, r route, b *background) string {
	t.Helper()
	s := b.load(t)
	if s.LongestMS > 15_000 || s.Calls == 0 || s.Asked == 0 || s.Errors["timeout"] > 0 {
		t.Errorf("%+v", s)
	}
	l.call(t, r.client(), "many", "-n", "20", r.server())
	return fmt.Sprintf("pause %.1f s", float64(s.LongestMS)/1000)
}

// serial is the serial number of the certificate of an identity on a node.
func (l *lab) serial(t *testing.T, node, sa string) string {
	t.Helper()
	var dump struct {
		Certificates []struct {
			Identity  string
			CertChain []struct{ SerialNumber string }
		}
	}
	if err := json.Unmarshal([]byte(l.get(t, node, "http://localhost:15000/config_dump")), &dump); err != nil {
		t.Fatal(err)
	}
	for _, c := range dump.Certificates {
		if c.Identity == "spiffe://cluster.local/ns/default/sa/"+sa && len(c.CertChain) > 0 {
			return c.CertChain[0].SerialNumber
		}
	}
	return ""
}

func TestRotation(t *testing.T) {
	l := up(t, "--secret-ttl", "1m") // the shortest that ambitd gives
	world(t, l)
	before := map[string]string{}
	for _, n := range allNodes {
		before[n] = l.serial(t, n, "server")
	}
	running := loads(t, l)
	for _, n := range allNodes {
		until(t, 90*time.Second, "a new certificate on "+n, func() (bool, string) {
			time.Sleep(500 * time.Millisecond)
			now := l.serial(t, n, "server")
			return now != "" && before[n] != "" && now != before[n], now
		})
	}
	time.Sleep(35 * time.Second) // tunnels outlive the certificates they began with
	each(t, "certificates renewed under load, nothing failed", func(t *testing.T, r route) string { return unharmed(t, running[r.name]) })
}

func TestLife(t *testing.T) {
	l := up(t)
	world(t, l)
	pods(t, l)
	agent(t, l)
	controlPlane(t, l)
	drains(t, l)
	deaths(t, l)
	rollouts(t, l)
}

// rollouts replaces our proxy beside the running one. The other proxy's readiness
// port is fixed, so two of it do not fit the one namespace of a lab's node.
func rollouts(t *testing.T, l *lab) {
	each(t, "rolling update of our proxy at the server: no call fails", func(t *testing.T, r route) string {
		b := l.begin(t, r.client(), "load", "-n", "0", r.server())
		l.must(t, "restart", "ztunnel@"+r.to, "--rolling")
		time.Sleep(7 * time.Second) // the old one's streams have five
		if s := b.load(t); s.Failed > 0 || s.Calls < 20 {
			t.Errorf("%+v", s)
		}
		return ""
	}, "ours→ours", "theirs→ours")
	each(t, "rolling update of our proxy at the client: no call fails", func(t *testing.T, r route) string {
		b := l.begin(t, r.client(), "load", "-n", "0", r.server())
		l.must(t, "restart", "ztunnel@"+r.from, "--rolling")
		time.Sleep(7 * time.Second)
		if s := b.load(t); s.Failed > 0 || s.Calls < 20 {
			t.Errorf("%+v", s)
		}
		return ""
	}, "ours→ours", "ours→theirs")
	each(t, "a pod that ends in order: no call of its Service fails", func(t *testing.T, r route) string {
		name, yaml := "pair-"+r.to, ""
		for _, n := range []string{r.to, "node-4"} {
			yaml += serverYAML("pair-"+r.to+"-"+n, n, "pair-"+r.to)
		}
		if r.to == "node-4" {
			yaml += serverYAML("pair-"+r.to+"-node-1", "node-1", "pair-"+r.to)
		}
		l.apply(t, yaml+strings.Replace(serviceOf(name, ""), "{app: server}", "{app: pair-"+r.to+"}", 1))
		l.must(t, "wait", "--timeout", "30s")
		until(t, patience, "both answer", func() (bool, string) {
			res := l.traffic(r.client(), "who", "-n", "50", name)
			return strings.Contains(res.out, name+"-"+r.to) && strings.Count(res.out, `":`) >= 2, res.out + res.err
		})
		b := l.begin(t, r.client(), "load", "-n", "0", name)
		l.must(t, "delete", "pod", name+"-"+r.to)
		time.Sleep(2 * time.Second)
		s := b.load(t)
		l.remove(yaml)
		l.must(t, "delete", "service", name)
		if s.Calls < 20 || s.Failed > 0 {
			t.Errorf("%+v", s)
		}
		return ""
	})
}

// pods come and go on every node while others are called.
func pods(t *testing.T, l *lab) {
	running := loads(t, l)
	each(t, "ZDS: pods added and deleted, others unharmed", func(t *testing.T, r route) string {
		counted := func() string {
			for line := range strings.SplitSeq(l.get(t, r.to, "http://localhost:15020/metrics"), "\n") {
				if v, ok := strings.CutPrefix(line, "workload_manager_active_proxy_count "); ok {
					return strings.TrimSuffix(v, ".0")
				}
			}
			return "none"
		}
		want := counted()
		for round := range 3 {
			name := fmt.Sprintf("guest-%d-%s", round, r.to)
			yaml := serverYAML(name, r.to, "guest")
			l.apply(t, yaml)
			l.must(t, "wait", "--timeout", "30s")
			l.call(t, r.client(), "echo", l.address(t, name, 4))
			l.must(t, "delete", "pod", name)
		}
		until(t, patience, "the number of pods as before", func() (bool, string) { now := counted(); return now == want, now + ", want " + want })
		return ""
	})
	each(t, "ZDS: nothing failed meanwhile", func(t *testing.T, r route) string { return unharmed(t, running[r.name]) })
	each(t, "out of the mesh and in again", func(t *testing.T, r route) string {
		name := "moving-" + r.to
		l.apply(t, serverYAML(name, r.to, "guest"))
		l.must(t, "wait", "--timeout", "30s")
		ip := l.address(t, name, 4)
		for _, mode := range []string{"none", "ambient"} {
			l.must(t, "label", "pod", name, "istio.io/dataplane-mode="+mode)
			until(t, patience, "mode "+mode, func() (bool, string) {
				mark := l.logged("ztunnel@" + r.to)
				res := l.traffic(r.client(), "echo", ip)
				if res.code != 0 {
					return false, res.err
				}
				tunnelled := len(l.lines(mark, "ztunnel@"+r.to, "connection complete", name, `direction="inbound"`)) > 0
				return tunnelled == (mode == "ambient"), fmt.Sprintf("tunnelled=%v", tunnelled)
			})
		}
		l.must(t, "delete", "pod", name)
		return ""
	})
}

// agent restarts ambit-node: the proxy keeps its pods.
func agent(t *testing.T, l *lab) {
	running := loads(t, l)
	for _, n := range allNodes {
		l.must(t, "restart", "ambit-node@"+n)
	}
	each(t, "ZDS: our agent restarted, the proxy keeps its pods", func(t *testing.T, r route) string {
		until(t, 30*time.Second, "the proxy is ready", func() (bool, string) {
			r := l.do("", "exec", r.to, "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:15021/healthz/ready")
			return r.out == "200", r.out + r.err
		})
		name := "after-" + r.to
		l.apply(t, serverYAML(name, r.to, "guest"))
		l.must(t, "wait", "--timeout", "30s")
		l.call(t, r.client(), "echo", l.address(t, name, 4))
		l.must(t, "delete", "pod", name)
		return unharmed(t, running[r.name])
	})
}

// controlPlane takes ambitd away and brings it back.
func controlPlane(t *testing.T, l *lab) {
	running := loads(t, l)
	l.must(t, "restart", "ambitd")
	l.must(t, "kill", "ambitd", "-s", "KILL")
	yaml := policyYAML("default", "late", "", rule("DENY", `from: [{source: {principals: ["*/sa/stranger"]}}]`))
	if r := l.do(yaml, "apply", "-f", "-"); r.code != 0 { // ambitd cannot say what it thinks of it: it is away
		t.Fatal(r.err)
	}
	each(t, "xDS: ambitd restarted, changes arrive", func(t *testing.T, r route) string {
		until(t, 40*time.Second, "the policy of meanwhile", func() (bool, string) {
			res := l.traffic("stranger-"+r.from, "echo", l.address(t, r.server(), 4))
			return res.code != 0, "let in"
		})
		return unharmed(t, running[r.name])
	})
	l.remove(yaml)
	each(t, "xDS: removals arrive", func(t *testing.T, r route) string {
		until(t, 40*time.Second, "without the policy", func() (bool, string) {
			res := l.traffic("stranger-"+r.from, "echo", l.address(t, r.server(), 4))
			return res.code == 0, "denied"
		})
		return ""
	})
}

// drains ends a server's proxy as a rollout does, with a connection open.
func drains(t *testing.T, l *lab) {
	each(t, "SIGTERM of the server's proxy: streams live on, calls pass afterwards", func(t *testing.T, r route) string {
		c := "ztunnel@" + r.to
		held := l.begin(t, r.client(), "hold", r.server())
		b := l.begin(t, r.client(), "load", "-n", "2", r.server())
		l.must(t, "kill", c, "-s", "TERM")
		if held.ended(2 * time.Second) {
			t.Errorf("an open stream ended at once: %s", held.last())
		}
		l.awaitReady(t, c)
		if !held.ended(20 * time.Second) {
			t.Errorf("a stream of the old process is still there: %s", held.stop())
		}
		until(t, 30*time.Second, "calls pass", func() (bool, string) {
			res := l.traffic(r.client(), "echo", r.server())
			return res.code == 0, res.err
		})
		time.Sleep(time.Second) // the load goes on too
		return harmed(t, l, r, b)
	})
	each(t, "SIGTERM of the client's proxy: streams live on, calls pass afterwards", func(t *testing.T, r route) string {
		c := "ztunnel@" + r.from
		held := l.begin(t, r.client(), "hold", r.server())
		l.must(t, "kill", c, "-s", "TERM")
		if held.ended(2 * time.Second) {
			t.Errorf("an open stream ended at once: %s", held.last())
		}
		l.awaitReady(t, c)
		until(t, 30*time.Second, "calls pass", func() (bool, string) {
			res := l.traffic(r.client(), "echo", r.server())
			return res.code == 0, res.err
		})
		return ""
	})
}

// awaitReady waits until another process of a component is ready.
func (l *lab) awaitReady(t *testing.T, component string) {
	t.Helper()
	restarts := func() (n int, ready bool) {
		var s struct {
			Components []struct {
				Name     string
				Ready    bool
				Restarts int
			}
		}
		if err := json.Unmarshal([]byte(l.must(t, "status", "-o", "json")), &s); err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(s.Components, func(c struct {
			Name     string
			Ready    bool
			Restarts int
		}) bool {
			return c.Name == component
		})
		return s.Components[i].Restarts, s.Components[i].Ready
	}
	l.began[component]++
	want := l.began[component]
	until(t, 60*time.Second, component+" is back", func() (bool, string) {
		n, ready := restarts()
		return n >= want && ready, fmt.Sprintf("restarts %d, want %d, ready %v", n, want, ready)
	})
}

// deaths kills a proxy under load.
func deaths(t *testing.T, l *lab) {
	for _, kill := range []struct {
		what string
		node func(route) string
	}{
		{"SIGKILL of the server's proxy under load: no hang, traffic resumes", func(r route) string { return r.to }},
		{"SIGKILL of the client's proxy under load: traffic resumes", func(r route) string { return r.from }},
	} {
		each(t, kill.what, func(t *testing.T, r route) string {
			c := "ztunnel@" + kill.node(r)
			b := l.begin(t, r.client(), "load", "-n", "4", r.server())
			time.Sleep(time.Second)
			l.must(t, "kill", c, "-s", "KILL")
			l.awaitReady(t, c)
			until(t, 30*time.Second, "calls pass", func() (bool, string) {
				res := l.traffic(r.client(), "echo", r.server())
				return res.code == 0, res.err
			})
			time.Sleep(time.Second)
			return harmed(t, l, r, b)
		})
	}
}
