package attach

import (
	"strings"
	"testing"
)

// FuzzFacts: no file makes a pod start that the file does not clear.
func FuzzFacts(f *testing.F) {
	f.Add([]byte(`{"layout":1,"node":"n","excludedNamespaces":["kube-system"],"namespaces":{"shop":{"inMesh":true}},"pods":{"u":true}}`))
	f.Add([]byte(`{"layout":1,"namespaces":{"shop":{"inMesh":false,"mixed":true}}}`))
	f.Add([]byte(`{"layout":9}`))
	f.Add([]byte(`{"layout":1,"namespaces":{"shop":{}},"pods":{"u":false}} x`))
	f.Fuzz(func(t *testing.T, data []byte) {
		facts, err := parseFacts(data)
		pass, why := facts.Decide("shop", "u")
		if pass && err != nil {
			t.Errorf("a pod starts by a file that cannot be read: %s", why)
		}
		if pass && facts.Pods["u"] && !strings.Contains(why, "excluded") {
			t.Errorf("a pod of the mesh starts: %s", why)
		}
	})
}
