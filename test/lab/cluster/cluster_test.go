package cluster

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func decode(t *testing.T, text string) []Object {
	t.Helper()
	all, err := Decode(strings.NewReader(text), "test")
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func apply(t *testing.T, s *Store, text string) Outcome {
	t.Helper()
	var last Outcome
	for _, o := range decode(t, text) {
		out, err := s.Apply(o)
		if err != nil {
			t.Fatal(err)
		}
		last = out
	}
	return last
}

func TestApplyMergesAsKubectlDoes(t *testing.T) {
	s, err := New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	const text = "apiVersion: v1\nkind: Service\nmetadata: {name: web, labels: {a: one, b: two}}\nspec: {ports: [{port: 80}]}\n"
	if got := apply(t, s, text); got != Created {
		t.Errorf("first apply: %s", got)
	}
	yes := "yes"
	k := Key{"Service", "default", "web"}
	if err := s.Mark(k, false, map[string]*string{"by-hand": &yes}); err != nil {
		t.Fatal(err)
	}
	if err := Update(s, "default", "web", func(v *corev1.Service) bool {
		v.Spec.ClusterIP, v.Spec.ClusterIPs = "10.96.1.1", []string{"10.96.1.1"}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if got := apply(t, s, text); got != Unchanged {
		t.Errorf("the same again: %s", got)
	}
	if got := apply(t, s, strings.Replace(text, ", b: two", "", 1)); got != Configured {
		t.Errorf("another text: %s", got)
	}
	v, _ := Get[*corev1.Service](s, "default", "web")
	if v.Spec.ClusterIP != "10.96.1.1" {
		t.Errorf("the allocated address is lost: %q", v.Spec.ClusterIP)
	}
	if l := v.Labels; l["a"] != "one" || l["by-hand"] != "yes" || l["b"] != "" {
		t.Errorf("labels are %v", l)
	}
}

func TestFilesFollowTheStore(t *testing.T) {
	s, err := New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	apply(t, s, "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}, port: 4294967296}\n")
	k := Key{"PeerAuthentication", "shop", "default"}
	b, err := os.ReadFile(s.File(k))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"mode: STRICT", "apiVersion: security.istio.io/v1", "port: 4294967296", "uid:"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%q is missing in:\n%s", want, b)
		}
	}
	if _, err := os.Stat(s.File(Key{"Namespace", "", "shop"})); err != nil {
		t.Errorf("the namespace was not made: %v", err)
	}
	if err := s.Delete(k); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.File(k)); !os.IsNotExist(err) {
		t.Errorf("the file stays: %v", err)
	}
}

func TestDecodeIsStrict(t *testing.T) {
	tests := []struct{ name, in, want string }{
		{"unknown field", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {selektor: {}}", `unknown field "selektor"`},
		{"wrong version", "apiVersion: v2\nkind: Service\nmetadata: {name: a}", `want "v1"`},
		{"unknown kind", "apiVersion: example.com/v1\nkind: Thing\nmetadata: {name: a}", "does not know"},
		{"no name", "apiVersion: v1\nkind: Service", "without kind or metadata.name"},
		{"no object", "just text", "want an object"},
		{"broken", "a: [", "did not find"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Decode(strings.NewReader(tt.in), "in"); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q in it", err, tt.want)
			}
		})
	}
	if n := len(decode(t, "---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n- {apiVersion: v1, kind: Pod, metadata: {name: b}}\n---\n")); n != 2 {
		t.Errorf("%d objects in a list of two", n)
	}
}

// Numbers are keys in what people write most for ports.
func TestNumbersAsKeys(t *testing.T) {
	const in = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: default}\nspec:\n  portLevelMtls:\n    8080: {mode: STRICT}\n"
	all, err := Decode(strings.NewReader(in), "in")
	if err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	if b, err := json.Marshal(all[0]); err != nil || !strings.Contains(string(b), `"8080":{"mode":"STRICT"}`) {
		t.Errorf("%s %v", b, err)
	}
}
