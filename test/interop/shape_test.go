//go:build interop

package interop

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestShape compares what both proxies show: dumps, metrics, access logs. What
// theirs has, ours must have, with the same words; ours may have more.
func TestShape(t *testing.T) {
	l := up(t)
	world(t, l)
	shapes(t, l)
	dumps(t, l)
	// Of several services with one pod, each proxy names the one it likes best for
	// calls that name none; from here on there is one.
	l.remove(manyServices())
	l.must(t, "delete", "service", "all")
	metrics(t, l)
	logs(t, l)
}

// shapes applies objects that use as much of the model as they can.
func shapes(t *testing.T, l *lab) {
	t.Helper()
	l.apply(t, manyServices()+
		policyYAML("default", "shape", "selector: {matchLabels: {app: nobody}}",
			`action: ALLOW, rules: [{from: [{source: {principals: ["*", "cluster.local/ns/a/sa/b", "x/*", "*/sa/c"], notNamespaces: [d, "e*"], ipBlocks: ["10.0.0.0/8", "fd00::/8", "1.2.3.4"]}}], `+
				`to: [{operation: {ports: ["80", "443"], notPorts: ["81"]}}], when: [{key: destination.ip, values: ["10.1.0.0/16"]}, {key: source.namespace, notValues: [z]}]}, {from: [{source: {serviceAccounts: ["f/g"], notServiceAccounts: ["h/i"]}}]}]`)+
		policyYAML("default", "shape-nothing", "selector: {matchLabels: {app: nobody}}", "")+
		policyYAML("ambit-system", "shape-mesh", "", rule("DENY", `from: [{source: {notPrincipals: ["*"]}}], to: [{operation: {ports: ["9"]}}]`))+
		policyYAML("other", "shape-namespace", "", rule("DENY", `from: [{source: {namespaces: ["nobody"]}}]`))+
		peerAuthentication(selectServer+"\n  mtls: {mode: PERMISSIVE}\n  portLevelMtls: {\"7098\": {mode: STRICT}}"))
	time.Sleep(2 * time.Second) // both have it by now; what follows retries too
}

func manyServices() string {
	return serviceOf("near", "trafficDistribution: PreferClose") + serviceOf("here", "internalTrafficPolicy: Local") + serviceOf("all-of-them", "publishNotReadyAddresses: true")
}

// tree is any JSON.
type tree = map[string]any

func (l *lab) dump(t *testing.T, node string) tree {
	t.Helper()
	var d tree
	if err := json.Unmarshal([]byte(l.get(t, node, "http://localhost:15000/config_dump")), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// keyed makes a map of a dump's list.
func keyed(v any, keys ...string) map[string]tree {
	m := map[string]tree{}
	list, _ := v.([]any) // a missing list differs below
	for _, e := range list {
		o, _ := e.(tree) // as above
		var k []string
		for _, key := range keys {
			k = append(k, fmt.Sprint(o[key]))
		}
		m[strings.Join(k, "/")] = o
	}
	return m
}

// sorted is JSON with the order of lists that have none taken out.
func sorted(v any) string {
	if list, ok := v.([]any); ok {
		var s []string
		for _, e := range list {
			s = append(s, sorted(e))
		}
		slices.Sort(s)
		return "[" + strings.Join(s, ",") + "]"
	}
	if o, ok := v.(tree); ok {
		var s []string
		for _, k := range slices.Sorted(maps.Keys(o)) {
			s = append(s, k+":"+sorted(o[k]))
		}
		return "{" + strings.Join(s, ",") + "}"
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// lacks says what is in theirs and not, or otherwise, in ours.
func lacks(ours, theirs map[string]tree) (d []string) {
	for _, k := range slices.Sorted(maps.Keys(theirs)) {
		if ours[k] == nil {
			d = append(d, k+" is missing")
			continue
		}
		for _, key := range slices.Sorted(maps.Keys(theirs[k])) {
			o, ok := ours[k][key]
			if !ok {
				d = append(d, fmt.Sprintf("%s lacks %s: %s", k, key, sorted(theirs[k][key])))
			} else if a, b := sorted(o), sorted(theirs[k][key]); a != b {
				d = append(d, fmt.Sprintf("%s %s: ours %s, theirs %s", k, key, a, b))
			}
		}
	}
	for _, k := range slices.Sorted(maps.Keys(ours)) {
		if theirs[k] == nil {
			d = append(d, k+" is only ours")
		}
	}
	return d
}

func dumps(t *testing.T, l *lab) {
	compare := func(name string, of func(d tree) map[string]tree) {
		t.Run("config_dump: "+name, func(t *testing.T) {
			defer func() {
				results.set("config_dump: "+name, "ours→ours", "-")
				results.set("config_dump: "+name, "theirs→theirs", "-")
			}()
			var d []string
			for deadline := time.Now().Add(patience); ; {
				if d = lacks(of(l.dump(t, "node-1")), of(l.dump(t, "node-2"))); len(d) == 0 || time.Now().After(deadline) {
					break
				}
			}
			for _, line := range d {
				t.Error(line)
			}
			results.set("config_dump: "+name, "ours→theirs", map[bool]string{true: "same", false: fmt.Sprintf("FAIL: %d differences", len(d))}[len(d) == 0])
		})
	}
	compare("workloads, every key and value", func(d tree) map[string]tree { return keyed(d["workloads"], "uid") })
	compare("services, every key and value", func(d tree) map[string]tree { return keyed(d["services"], "namespace", "hostname") })
	compare("policies, every key and value", func(d tree) map[string]tree { return keyed(d["policies"], "namespace", "name") })
	compare("certificates, keys", func(d tree) map[string]tree {
		m := map[string]tree{}
		for k, c := range keyed(d["certificates"], "identity") {
			if !strings.Contains(k, "/sa/server") { // on every node
				continue
			}
			m[k] = tree{"state": c["state"], "keys": keysOf(c)}
			for _, list := range []string{"certChain", "rootCerts"} {
				for _, one := range c[list].([]any) { // both have both
					m[k][list] = keysOf(one.(tree))
				}
			}
		}
		return m
	})
	compare("top level and pods, keys", func(d tree) map[string]tree {
		m := map[string]tree{"": {}}
		for k := range d {
			if k != "generation" { // ours
				m[""][k] = true
			}
		}
		for _, p := range d["workloadState"].(tree) {
			m["pod"] = tree{"keys": keysOf(p.(tree)), "info": keysOf(p.(tree)["info"].(tree))}
		}
		return m
	})
	each(t, "config_dump: a live connection at both ends", func(t *testing.T, r route) string {
		b := l.begin(t, r.client(), "hold", r.server())
		defer b.stop()
		for node, side := range map[string]string{r.from: "outbound", r.to: "inbound"} {
			var missing []string
			until(t, patience, side+" connection on "+node, func() (bool, string) {
				for _, p := range l.dump(t, node)["workloadState"].(tree) {
					conns, _ := p.(tree)["connections"].(tree)
					for _, c := range conns[side].([]any) {
						missing = missing[:0]
						for _, k := range []string{"src", "originalDst", "actualDst", "protocol"} {
							if _, ok := c.(tree)[k]; !ok {
								missing = append(missing, k)
							}
						}
						if c.(tree)["protocol"] == "HBONE" {
							return true, ""
						}
					}
				}
				return false, "none"
			})
			if len(missing) > 0 {
				t.Errorf("%s: no %v", side, missing)
			}
		}
		return ""
	})
}

func keysOf(o tree) []any {
	var keys []any
	for k := range o {
		keys = append(keys, k)
	}
	return keys
}

// series reads a metrics page: name → set of label lists, with what differs by
// node taken out.
func series(page string) (labels map[string]map[string]bool, types map[string]string) {
	labels, types = map[string]map[string]bool{}, map[string]string{}
	pair := regexp.MustCompile(`([a-z_]+)="((?:[^"\\]|\\.)*)"`)
	for line := range strings.SplitSeq(page, "\n") {
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			types[strings.TrimSuffix(name, "_total")] = kind
			continue
		}
		if line == "" || line[0] == '#' {
			continue
		}
		name, rest, _ := strings.Cut(line, " ")
		if i := strings.IndexByte(line, '{'); i >= 0 && i < strings.IndexByte(line, ' ') {
			name, rest = line[:i], line[i:]
		}
		var set []string
		if strings.HasPrefix(rest, "{") {
			for _, m := range pair.FindAllStringSubmatch(rest[:strings.LastIndexByte(rest, '}')], -1) {
				set = append(set, m[1]+"="+plain(m[2]))
			}
		}
		slices.Sort(set)
		if labels[name] == nil {
			labels[name] = map[string]bool{}
		}
		labels[name][strings.Join(set, ",")] = true
	}
	return labels, types
}

var numbered = regexp.MustCompile(`(node|zone)-\d`)

// plain takes out what differs by node.
func plain(s string) string { return numbered.ReplaceAllString(s, "$1-N") }

// names keeps the labels' names.
func names(sets map[string]bool) []string {
	out := map[string]bool{}
	for s := range sets {
		var n []string
		for p := range strings.SplitSeq(s, ",") {
			k, _, _ := strings.Cut(p, "=")
			n = append(n, k)
		}
		out[strings.Join(n, ",")] = true
	}
	return slices.Sorted(maps.Keys(out))
}

func metrics(t *testing.T, l *lab) {
	// The same calls from and to each kind, so that the same series exist.
	deny := policyYAML("default", "deny", selectServer, rule("DENY", `from: [{source: {principals: ["*/sa/stranger"]}}]`))
	l.apply(t, deny)
	defer l.remove(deny)
	for _, from := range []string{"node-1", "node-2"} {
		until(t, patience, "stranger is denied", func() (bool, string) { // by both
			return l.traffic("stranger-"+from, "echo", "server-node-3").code != 0 && l.traffic("stranger-"+from, "echo", "server-node-4").code != 0, ""
		})
		for _, to := range []string{"server-node-3", "server-node-4"} {
			l.call(t, "client-"+from, "echo", to)
			l.traffic("client-"+from, "nobody", to)
			l.call(t, "client-"+from, "echo", l.address(t, to, 4))
			l.call(t, "outside/outsider-"+from, "echo", to+".default")
		}
	}
	name := "metrics: names, types and labels of theirs"
	t.Run(name, func(t *testing.T) {
		var bad []string
		for _, pair := range [][2]string{{"node-1", "node-2"}, {"node-4", "node-3"}} {
			ours, oursTypes := series(l.get(t, pair[0], "http://localhost:15020/metrics"))
			theirs, theirTypes := series(l.get(t, pair[1], "http://localhost:15020/metrics"))
			for _, n := range slices.Sorted(maps.Keys(theirs)) {
				if strings.HasPrefix(n, "tokio_") {
					continue // their runtime's own
				}
				if ours[n] == nil {
					bad = append(bad, n+" is missing")
				} else if a, b := names(ours[n]), names(theirs[n]); !slices.Equal(a, b) {
					bad = append(bad, fmt.Sprintf("%s: ours has the labels %v, theirs %v", n, a, b))
				}
				base := strings.TrimSuffix(n, "_total")
				if oursTypes[base] != theirTypes[base] && ours[n] != nil {
					bad = append(bad, fmt.Sprintf("%s: ours is a %s, theirs a %s", n, oursTypes[base], theirTypes[base]))
				}
			}
		}
		slices.Sort(bad)
		for _, b := range slices.Compact(bad) {
			t.Error(b)
		}
		results.set(name, "ours→theirs", map[bool]string{true: "same", false: "FAIL"}[len(bad) == 0])
	})
	name = "metrics: values of labels, same calls"
	t.Run(name, func(t *testing.T) {
		var bad []string
		for side, pair := range map[string][2]string{"source": {"node-1", "node-2"}, "destination": {"node-4", "node-3"}} {
			ours, _ := series(l.get(t, pair[0], "http://localhost:15020/metrics"))
			theirs, _ := series(l.get(t, pair[1], "http://localhost:15020/metrics"))
			for _, n := range []string{"istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total"} {
				want := "reporter=" + side
				theirs[n] = denied(theirs[n])
				for s := range theirs[n] {
					if strings.Contains(s, want) && strings.Contains(s, "server-node-N") && !ours[n][s] {
						bad = append(bad, side+" "+n+" only theirs: "+s)
					}
				}
				for s := range ours[n] {
					if strings.Contains(s, want) && strings.Contains(s, "server-node-N") && !theirs[n][s] {
						bad = append(bad, side+" "+n+" only ours:   "+s)
					}
				}
			}
		}
		slices.Sort(bad)
		for _, b := range bad {
			t.Error(b)
		}
		results.set(name, "ours→theirs", map[bool]string{true: "same", false: "FAIL"}[len(bad) == 0])
	})
}

// denied gives a stranger's refused calls our flag: at the source, the reference
// counts a 401 as any other CONNECT that failed.
func denied(sets map[string]bool) map[string]bool {
	out := map[string]bool{}
	for s := range sets {
		if strings.Contains(s, "reporter=source") && strings.Contains(s, "/sa/stranger") {
			s = strings.ReplaceAll(s, "response_flags=CONNECT", "response_flags=DENY")
		}
		out[s] = true
	}
	return out
}

// entry is a line of the access log as key → value, in order.
type entry struct {
	level, scope, message string
	keys                  []string
	values                map[string]string
}

var keyValue = regexp.MustCompile(`([a-z_.]+)=("(?:[^"\\]|\\.)*"|\S+)`)

func parseEntry(line string) entry {
	e := entry{values: map[string]string{}}
	parts := strings.SplitN(line, "\t", 5)
	for len(parts) < 5 {
		parts = append(parts, "")
	}
	e.level, e.scope, e.message = parts[1], parts[2], parts[3]
	for _, m := range keyValue.FindAllStringSubmatch(parts[4], -1) {
		e.keys = append(e.keys, m[1])
		e.values[m[1]] = m[2]
	}
	return e
}

func logs(t *testing.T, l *lab) {
	deny := policyYAML("default", "deny", selectServer, rule("DENY", `from: [{source: {principals: ["*/sa/stranger"]}}]`))
	l.apply(t, deny)
	defer l.remove(deny)
	until(t, patience, "stranger is denied", func() (bool, string) {
		return l.traffic("stranger-node-1", "echo", "server-node-2").code != 0 && l.traffic("stranger-node-2", "echo", "server-node-1").code != 0, ""
	})
	calls := []struct{ name, pod, direction string }{
		{"a call by service, source", "client", "outbound"}, {"a call by service, destination", "client", "inbound"},
		{"a denied call, source", "stranger", "outbound"}, {"a denied call, destination", "stranger", "inbound"},
		{"a plain call, destination", "outside/outsider", "inbound"},
	}
	extra := map[string]bool{}
	for _, c := range calls {
		name := "access log: " + c.name
		t.Run(name, func(t *testing.T) {
			find := func(from, to, logger string) entry {
				mark := l.logged("ztunnel@" + logger)
				if c.pod == "stranger" {
					mark = 0 // ours sums repeated refusals up: the first one has its line
				}
				l.traffic(c.pod+"-"+from, "echo", "server-"+to+".default")
				words := []string{"\taccess\t", `direction="` + c.direction + `"`, ":7001", "src.addr=" + l.address(t, c.pod+"-"+from, 4) + ":", "server-" + to}
				lines := l.lines(mark, "ztunnel@"+logger, words...)
				if len(lines) == 0 {
					t.Errorf("no line of %s with %v", logger, words)
					return entry{}
				}
				t.Logf("%s: %s", logger, lines[0])
				return parseEntry(lines[0])
			}
			var ours, theirs entry
			if c.direction == "outbound" {
				ours, theirs = find("node-1", "node-3", "node-1"), find("node-2", "node-3", "node-2")
			} else {
				ours, theirs = find("node-1", "node-4", "node-4"), find("node-1", "node-3", "node-3")
			}
			if ours.level != theirs.level || ours.scope != theirs.scope || ours.message != theirs.message {
				t.Errorf("ours begins %s %s %q, theirs %s %s %q", ours.level, ours.scope, ours.message, theirs.level, theirs.scope, theirs.message)
			}
			common := slices.DeleteFunc(slices.Clone(ours.keys), func(k string) bool { return !slices.Contains(theirs.keys, k) })
			if !slices.Equal(common, theirs.keys) {
				t.Errorf("keys of ours  %v\nkeys of theirs %v", ours.keys, theirs.keys)
			}
			for _, k := range ours.keys {
				if !slices.Contains(theirs.keys, k) {
					extra[k] = true
				}
			}
			for _, k := range theirs.keys {
				free := strings.HasSuffix(k, ".addr") || k == "dst.hbone_addr" || k == "duration" || k == "error"
				if a, b := plain(ours.values[k]), plain(theirs.values[k]); a != b && !free {
					t.Errorf("%s: ours %s, theirs %s", k, a, b)
				}
			}
			results.set(name, "ours→theirs", map[bool]string{true: "same", false: "FAIL"}[!t.Failed()])
		})
	}
	results.remark("keys that only our access log has: %s", strings.Join(slices.Sorted(maps.Keys(extra)), " "))
}
