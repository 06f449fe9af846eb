package derive

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/golden"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/dir"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

// TestScripts runs testdata/*.txtar. Commands:
//
//	put FILE [SECTION]   FILE of the source now says SECTION (default: FILE)
//	remove FILE          FILE is gone
//	step NAME            everything since the last step is one change; what it
//	                     makes is compared with want/NAME
//
// A step prints how much was computed, every problem, each condition that is new
// or different, and every resource that would be sent.
func TestScripts(t *testing.T) {
	golden.Run(t, "testdata/*.txtar", func(t *testing.T, a *golden.Archive) {
		table, e := dir.NewTable(), New(Config{})
		seen := map[Condition]bool{}
		for _, c := range a.Commands {
			switch {
			case c[0] == "put" && len(c) == 2:
				table.Put(c[1], a.File(c[1]))
			case c[0] == "put" && len(c) == 3:
				table.Put(c[1], a.File(c[2]))
			case c[0] == "remove" && len(c) == 2:
				table.Remove(c[1])
			case c[0] == "step" && len(c) == 2:
				change := table.Change()
				a.Want(c[1], render(e, change, e.Apply(change), seen))
			default:
				t.Fatalf("unknown command %q", c)
			}
		}
		sameAsFromScratch(t, e)
	})
}

func render(e *Engine, c dir.Change, r Result, seen map[Condition]bool) string {
	var b strings.Builder
	n := e.computed
	fmt.Fprintf(&b, "computed %d pods, %d services, %d slices, %d authorizations, %d peer authentications", n.Pods, n.Services, n.Slices, n.Policies, n.Peers)
	if n.Gateways > 0 {
		fmt.Fprintf(&b, ", %d gateways", n.Gateways)
	}
	if n.Telemetries > 0 {
		fmt.Fprintf(&b, ", %d telemetries", n.Telemetries)
	}
	if n.Entries+n.Workloads > 0 {
		fmt.Fprintf(&b, ", %d service entries, %d workload entries", n.Entries, n.Workloads)
	}
	b.WriteByte('\n')
	for _, p := range c.Problems {
		fmt.Fprintf(&b, "problem %s\n", p)
	}
	for _, k := range slices.Sorted(keysOf(c.Unenforced)) {
		fmt.Fprintf(&b, "unenforced %s %d\n", k, c.Unenforced[k])
	}
	for _, s := range r.Status {
		if !seen[s] {
			seen[s] = true
			fmt.Fprintf(&b, "status %s %s %s: %s\n", dir.Key{Kind: s.Kind, Namespace: s.Namespace, Name: s.Name}, s.Type+"="+s.Status, s.Reason, s.Message)
		}
	}
	for _, n := range r.Removes {
		fmt.Fprintf(&b, "remove %s %s\n", shortType(n.Type), n.Name)
	}
	for _, u := range r.Upserts {
		fmt.Fprintf(&b, "send %s %s", shortType(u.Type), u.Name)
		if len(u.Aliases) > 0 {
			fmt.Fprintf(&b, " also %s", strings.Join(u.Aliases, " "))
		}
		b.WriteByte('\n')
		for line := range strings.Lines(golden.Proto(u.Message)) {
			b.WriteString("  " + line)
		}
	}
	return b.String()
}

func keysOf[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func shortType(url string) string { return url[strings.LastIndexByte(url, '.')+1:] }

// sameAsFromScratch proves that the increments led where one big step would have.
func sameAsFromScratch(t *testing.T, e *Engine) {
	t.Helper()
	fresh := New(e.cfg)
	fresh.Apply(dir.Change{Upserts: e.objects()})
	for _, typ := range []string{api.AddressType, api.AuthorizationType} {
		got, want := e.Resources(typ), fresh.Resources(typ)
		if !slices.EqualFunc(got, want, func(a, b Resource) bool { return a.Name == b.Name && string(a.Bytes) == string(b.Bytes) }) {
			t.Errorf("%s: incremental result differs from a fresh one:\n%v\n%v", typ, names(got), names(want))
		}
	}
	for _, r := range e.Resources(api.AddressType) {
		if err := decodable(r.Message.(*workload.Address)); err != nil {
			t.Errorf("a proxy refuses %s: %v", r.Name, err)
		}
	}
	if !slices.Equal(e.Status(), fresh.Status()) {
		t.Errorf("status differs from a fresh one:\n%v\n%v", e.Status(), fresh.Status())
	}
}

// decodable reports why a proxy would refuse a resource.
func decodable(a *workload.Address) error {
	if w := a.GetWorkload(); w != nil {
		_, err := mesh.DecodeWorkload(w)
		return err
	}
	_, err := mesh.DecodeService(a.GetService())
	return err
}

func names(rs []Resource) (out []string) {
	for _, r := range rs {
		out = append(out, r.Name)
	}
	return out
}

// objects lists the engine's inputs as objects.
func (e *Engine) objects() []*dir.Object {
	var out []*dir.Object
	add := func(kind string, k nn, v any) {
		o := &dir.Object{Namespace: k.ns, Name: k.name, Value: v}
		o.GVK.Kind = kind
		out = append(out, o)
	}
	for name, v := range e.namespaces {
		add("Namespace", nn{"", name}, v)
	}
	for name, v := range e.nodes {
		add("Node", nn{"", name}, v)
	}
	for k, v := range e.pods {
		add("Pod", k, v)
	}
	for k, v := range e.services {
		add("Service", k, v)
	}
	for k, v := range e.slices {
		add("EndpointSlice", k, v)
	}
	for k, v := range e.policies {
		add("AuthorizationPolicy", k, v)
	}
	for k, v := range e.peers {
		add("PeerAuthentication", k, v)
	}
	for k, v := range e.entries.services {
		add("ServiceEntry", k, v)
	}
	for k, v := range e.entries.workloads {
		add("WorkloadEntry", k, v)
	}
	for k, v := range e.meshes {
		add("MeshConfig", k, v)
	}
	for k, v := range e.gw.all {
		add("Gateway", k, v)
	}
	for name, v := range e.gw.classes {
		add("GatewayClass", nn{"", name}, v)
	}
	for k, v := range e.tel.all {
		add("Telemetry", k, v)
	}
	return out
}
