//go:build interop

package interop

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// callers are the pods of a client's node: an identity, its service account in
// the same and in another namespace, and one without a certificate.
var callers = []string{"default/client", "default/stranger", "other/client", "outside/outsider"}

// probes are what each caller tries at each server.
var probes = []string{"7001", "7009"}

// verdict says whether a policy lets a caller in.
type verdict func(caller, port string, family int) bool

// policies are applied one after the other; proxies differ only if their verdicts
// do, as all get the same from ambitd.
func policies(l *lab, t *testing.T) []struct {
	name   string
	specs  []string
	allows verdict
} {
	var clients, clients6 []string
	for _, n := range []string{"node-1", "node-2"} {
		ips := l.addresses(t, "client-"+n)
		clients = append(clients, ips[4])
		if ips[6] != "" {
			clients6 = append(clients6, ips[6])
		}
	}
	quoted := func(ips []string) string { return "[\"" + strings.Join(ips, "\", \"") + "\"]" }
	principal := func(c string) string { return strings.Replace(c, "/", "/sa/", 1) }
	meshed := func(c string) bool { return c != "outside/outsider" }
	one := func(spec string) []string { return []string{spec} }
	return []struct {
		name   string
		specs  []string
		allows verdict
	}{
		{"no policy", nil, func(string, string, int) bool { return true }},
		{"ALLOW nothing", one(""), func(string, string, int) bool { return false }},
		{"ALLOW all", one("rules: [{}]"), func(string, string, int) bool { return true }},
		{"ALLOW a principal", one(rule("ALLOW", `from: [{source: {principals: ["cluster.local/ns/default/sa/client"]}}]`)),
			func(c, _ string, _ int) bool { return c == "default/client" }},
		{"ALLOW principals by suffix", one(rule("ALLOW", `from: [{source: {principals: ["*/sa/client"]}}]`)),
			func(c, _ string, _ int) bool { return meshed(c) && strings.HasSuffix(principal(c), "/sa/client") }},
		{"ALLOW principals by prefix", one(rule("ALLOW", `from: [{source: {principals: ["cluster.local/ns/default/*"]}}]`)),
			func(c, _ string, _ int) bool { return strings.HasPrefix(c, "default/") }},
		{"ALLOW anybody with a certificate", one(rule("ALLOW", `from: [{source: {principals: ["*"]}}]`)),
			func(c, _ string, _ int) bool { return meshed(c) }},
		{"ALLOW a namespace", one(rule("ALLOW", `from: [{source: {namespaces: [other]}}]`)),
			func(c, _ string, _ int) bool { return c == "other/client" }},
		{"ALLOW notNamespaces", one(rule("ALLOW", `from: [{source: {notNamespaces: [other]}}]`)),
			func(c, _ string, _ int) bool { return c != "other/client" }},
		{"ALLOW a service account", one(rule("ALLOW", `from: [{source: {serviceAccounts: ["default/stranger"]}}]`)),
			func(c, _ string, _ int) bool { return c == "default/stranger" }},
		{"ALLOW a port", one(rule("ALLOW", `to: [{operation: {ports: ["7009"]}}]`)),
			func(_, port string, _ int) bool { return port == "7009" }},
		{"ALLOW from and to", one(rule("ALLOW", `from: [{source: {namespaces: [default]}}], to: [{operation: {ports: ["7001"]}}]`)),
			func(c, port string, _ int) bool { return strings.HasPrefix(c, "default/") && port == "7001" }},
		{"ALLOW two rules", one(`action: ALLOW, rules: [{from: [{source: {namespaces: [other]}}]}, {to: [{operation: {ports: ["7009"]}}]}]`),
			func(c, port string, _ int) bool { return c == "other/client" || port == "7009" }},
		{"ALLOW an IPv4 block", one(rule("ALLOW", `from: [{source: {ipBlocks: `+quoted(clients)+`}}]`)),
			func(c, _ string, f int) bool { return c == "default/client" && f == 4 }},
		{"ALLOW an IPv6 block", one(rule("ALLOW", `from: [{source: {ipBlocks: `+quoted(clients6)+`}}]`)),
			func(c, _ string, f int) bool { return c == "default/client" && f == 6 }},
		{"ALLOW notIpBlocks", one(rule("ALLOW", `from: [{source: {notIpBlocks: ["10.244.0.0/16"]}}]`)),
			func(_, _ string, f int) bool { return f == 6 }},
		{"ALLOW when source.namespace", one(rule("ALLOW", `when: [{key: source.namespace, values: [other]}]`)),
			func(c, _ string, _ int) bool { return c == "other/client" }},
		{"ALLOW when destination.port notValues", one(rule("ALLOW", `when: [{key: destination.port, notValues: ["7009"]}]`)),
			func(_, port string, _ int) bool { return port != "7009" }},
		{"DENY a principal", one(rule("DENY", `from: [{source: {principals: ["cluster.local/ns/default/sa/stranger"]}}]`)),
			func(c, _ string, _ int) bool { return c != "default/stranger" }},
		{"DENY notPrincipals", one(rule("DENY", `from: [{source: {notPrincipals: ["cluster.local/ns/default/sa/client"]}}]`)),
			func(c, _ string, _ int) bool { return c == "default/client" }},
		{"DENY a port to a namespace", one(rule("DENY", `from: [{source: {namespaces: [other]}}], to: [{operation: {ports: ["7009"]}}]`)),
			func(c, port string, _ int) bool { return c != "other/client" || port != "7009" }},
		{"DENY all but one port", one(rule("DENY", `to: [{operation: {notPorts: ["7001"]}}]`)),
			func(_, port string, _ int) bool { return port == "7001" }},
		{"DENY beats ALLOW", []string{rule("ALLOW", `from: [{source: {namespaces: [default]}}]`), rule("DENY", `from: [{source: {principals: ["*/sa/stranger"]}}]`)},
			func(c, _ string, _ int) bool { return c == "default/client" }},
	}
}

func rule(action, body string) string { return fmt.Sprintf("action: %s, rules: [{%s}]", action, body) }

// selectServer is the part of a spec that makes a policy about the servers only.
const selectServer = "selector: {matchLabels: {app: server}}"

// policyYAML is one AuthorizationPolicy per spec, each the inside of a flow
// mapping. An empty part of it is left out.
func policyYAML(namespace, name, selector string, specs ...string) string {
	var b strings.Builder
	for i, s := range specs {
		parts := slices.DeleteFunc([]string{selector, s}, func(p string) bool { return p == "" })
		fmt.Fprintf(&b, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: %s-%d, namespace: %s}\nspec: {%s}\n",
			name, i, namespace, strings.Join(parts, ", "))
	}
	return b.String()
}

// verdicts asks for all that callers get at a route's server: "caller port family"
// → allowed.
func (l *lab) verdicts(r route, ips map[int]string) map[string]string {
	var mu sync.Mutex
	got := map[string]string{}
	var all sync.WaitGroup
	for _, c := range callers {
		var addrs []string
		keys := map[string]string{}
		for f, ip := range ips {
			for _, p := range probes {
				a := net.JoinHostPort(ip, p)
				addrs = append(addrs, a)
				keys[a] = fmt.Sprintf("%s IPv%d :%s", c, f, p)
			}
		}
		all.Go(func() {
			var m map[string]string
			res := l.traffic(c+"-"+r.from, append([]string{"probe"}, addrs...)...)
			_ = json.Unmarshal([]byte(res.out), &m) // what is missing differs from any verdict
			mu.Lock()
			defer mu.Unlock()
			for a, k := range keys {
				got[k] = m[a]
			}
		})
	}
	all.Wait()
	return got
}

// differences compares with what a verdict says.
func differences(got map[string]string, ips map[int]string, allows verdict) string {
	var d []string
	for _, c := range callers {
		for f := range ips {
			for _, p := range probes {
				k := fmt.Sprintf("%s IPv%d :%s", c, f, p)
				if want := allows(c, p, f); want != (got[k] == "ok") || got[k] == "timeout" || got[k] == "" {
					d = append(d, fmt.Sprintf("%s is %q, want allowed=%v", k, got[k], want))
				}
			}
		}
	}
	slices.Sort(d)
	return strings.Join(d, "; ")
}

func TestPolicies(t *testing.T) {
	l := up(t)
	world(t, l)
	ips := map[string]map[int]string{}
	for _, n := range allNodes {
		ips[n] = l.addresses(t, "server-"+n)
	}
	holds := func(t *testing.T, r route, allows verdict) {
		t.Helper()
		until(t, patience, "the verdicts", func() (bool, string) {
			d := differences(l.verdicts(r, ips[r.to]), ips[r.to], allows)
			return d == "", d
		})
		if d := differences(l.verdicts(r, ips[r.to]), ips[r.to], allows); d != "" {
			t.Errorf("later: %s", d)
		}
	}
	for _, p := range policies(l, t) {
		yaml := policyYAML("default", "probe", selectServer, p.specs...)
		if yaml != "" {
			l.apply(t, yaml)
		}
		each(t, "policy: "+p.name, func(t *testing.T, r route) string { holds(t, r, p.allows); return "" })
		if yaml != "" {
			l.remove(yaml)
		}
	}
	noStranger := rule("DENY", `from: [{source: {principals: ["*/sa/stranger"]}}]`)
	scopes := []struct{ name, yaml string }{
		{"namespace-wide", policyYAML("default", "probe", "", noStranger)},
		{"mesh-wide", policyYAML("ambit-system", "probe", "", noStranger)},
	}
	for _, s := range scopes {
		l.apply(t, s.yaml)
		each(t, "policy: "+s.name, func(t *testing.T, r route) string {
			holds(t, r, func(c, _ string, _ int) bool { return c != "default/stranger" })
			return ""
		})
		l.remove(s.yaml)
	}
	modes := []struct {
		name, yaml string
		allows     verdict
	}{
		{"STRICT refuses plain text", peerAuthentication("mtls: {mode: STRICT}"), func(c, _ string, _ int) bool { return c != "outside/outsider" }},
		{"STRICT but for one port", peerAuthentication(selectServer + "\n  mtls: {mode: STRICT}\n  portLevelMtls: {\"7009\": {mode: PERMISSIVE}}"),
			func(c, p string, _ int) bool { return c != "outside/outsider" || p == "7009" }},
		{"PERMISSIVE but for one port", peerAuthentication(selectServer + "\n  mtls: {mode: PERMISSIVE}\n  portLevelMtls: {\"7009\": {mode: STRICT}}"),
			func(c, p string, _ int) bool { return c != "outside/outsider" || p != "7009" }},
	}
	for _, m := range modes {
		l.apply(t, m.yaml)
		each(t, "policy: "+m.name, func(t *testing.T, r route) string { holds(t, r, m.allows); return "" })
		l.remove(m.yaml)
	}
	each(t, "and without any policy again", func(t *testing.T, r route) string {
		holds(t, r, func(string, string, int) bool { return true })
		return ""
	})
	denials(t, l)
	cuts(t, l)
}

func peerAuthentication(spec string) string {
	return "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: default}\nspec:\n  " + spec + "\n"
}

// denials looks at what both ends log.
func denials(t *testing.T, l *lab) {
	yaml := policyYAML("default", "named", selectServer, rule("DENY", `from: [{source: {principals: ["*/sa/stranger"]}}]`))
	l.apply(t, yaml)
	defer l.remove(yaml)
	each(t, "a denial: 401 at the source, the policy at the destination", func(t *testing.T, r route) string {
		ip := l.address(t, r.server(), 4)
		until(t, patience, "stranger is denied", func() (bool, string) {
			here, there := l.logged("ztunnel@"+r.from), l.logged("ztunnel@"+r.to)
			res := l.traffic("stranger-"+r.from, "echo", ip)
			if res.code == 0 {
				return false, "let in"
			}
			if len(l.lines(there, "ztunnel@"+r.to, "default/named-0", "sa/stranger")) == 0 {
				return false, "the destination does not name the policy"
			}
			lines := l.lines(here, "ztunnel@"+r.from, "401", "error=")
			return len(lines) > 0, "the source does not show 401"
		})
		return ""
	})
}

// cuts looks at connections that run when a policy comes.
func cuts(t *testing.T, l *lab) {
	tests := []struct {
		name     string
		selector string
		keeps    []string // directions in which the other proxy keeps the connection, by its own rules
	}{
		{"a namespace's new DENY cuts live connections", "", nil},
		{"a selected pod's new DENY cuts live connections", selectServer, []string{"ours→theirs", "theirs→theirs"}},
	}
	for _, tt := range tests {
		yaml := policyYAML("default", "cut", tt.selector, rule("DENY", `from: [{source: {principals: ["*/sa/client"]}}]`))
		held := map[string]*background{}
		for _, r := range routes {
			held[r.name] = l.begin(t, r.client(), "hold", l.address(t, r.server(), 4))
		}
		l.apply(t, yaml)
		each(t, tt.name, func(t *testing.T, r route) string {
			b := held[r.name]
			if slices.Contains(tt.keeps, r.name) {
				if b.ended(3 * time.Second) {
					return ""
				}
				return "kept (reference: only pushes of the policy itself count)"
			}
			if !b.ended(patience) {
				t.Errorf("still open: %s", b.last())
			}
			return ""
		})
		for _, b := range held {
			b.stop()
		}
		l.remove(yaml)
		each(t, tt.name+", and not afterwards", func(t *testing.T, r route) string {
			until(t, patience, "calls pass again", func() (bool, string) {
				res := l.traffic(r.client(), "echo", r.server())
				return res.code == 0, res.err
			})
			return ""
		})
	}
	// A policy that does not concern a connection leaves it alone.
	held := map[string]*background{}
	for _, r := range routes {
		held[r.name] = l.begin(t, r.client(), "hold", l.address(t, r.server(), 4))
	}
	yaml := policyYAML("default", "cut", "", rule("DENY", `from: [{source: {principals: ["*/sa/stranger"]}}]`))
	l.apply(t, yaml)
	each(t, "a policy about others leaves connections alone", func(t *testing.T, r route) string {
		if b := held[r.name]; b.ended(2 * time.Second) {
			t.Errorf("ended: %s", b.last())
		}
		return ""
	})
	l.remove(yaml)
	for name := range maps.Keys(held) {
		if last := held[name].stop(); !strings.HasPrefix(last, "held") {
			t.Errorf("%s: %s", name, last)
		}
	}
}
