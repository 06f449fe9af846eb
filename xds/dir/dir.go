// Package dir reads the objects of a cluster from directories of YAML and keeps
// watching them: the embedded source of configuration for the lab, for tests and
// for machines without Kubernetes.
//
//	files ─ scan ─▶ documents ─ strict decode ─▶ objects ─ diff ─▶ Change ─▶ the caller
//
// Decoding is as strict as `kubectl apply --validate=strict`. An object that does
// not decode keeps its last good version in force and is named in a Problem; its
// neighbours are unaffected and nothing is fatal. Objects are immutable.
// Watch calls back on one goroutine.
package dir

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Object is one decoded object. Value is a pointer to the Go type of its kind:
// *corev1.Pod, *corev1.Service, *discoveryv1.EndpointSlice, *corev1.Namespace,
// *corev1.Node, *corev1.ServiceAccount, *crd.PeerAuthentication,
// *crd.AuthorizationPolicy, *crd.Telemetry, *crd.Gateway, *crd.GatewayClass, or *crd.Mesh for the key `mesh` of a ConfigMap named
// `istio` (whose kind is crd.MeshConfigKind).
type Object struct {
	GVK       schema.GroupVersionKind
	Namespace string // "" for cluster-scoped kinds
	Name      string
	File      string
	Line      int // where the object starts in File, 1-based
	Value     any
}

// Key returns the object's key.
func (o *Object) Key() Key { return Key{Kind: o.GVK.Kind, Namespace: o.Namespace, Name: o.Name} }

// Key names an object.
type Key struct{ Kind, Namespace, Name string }

// String returns "kind namespace/name", without what is empty.
func (k Key) String() string {
	switch {
	case k.Name == "":
		return k.Kind
	case k.Namespace == "":
		return k.Kind + " " + k.Name
	}
	return k.Kind + " " + k.Namespace + "/" + k.Name
}

// Change is what happened since the previous one. Problems and Unenforced
// describe the whole current state, not the difference.
type Change struct {
	Upserts  []*Object
	Deletes  []Key
	Problems []Problem
	// Unenforced counts what this build accepts but does not enforce: objects by
	// kind, and keys of the mesh configuration as MeshConfig.<key>.
	Unenforced map[string]int
}

// Problem is something in a file that is not in force, and why.
type Problem struct {
	File                  string
	Line                  int
	Kind, Namespace, Name string // "" when the document could not be read that far
	Path                  string // field path, may be empty
	Message               string
	Hint                  string // nearest valid name or what to do, may be empty
}

// String returns "file:line kind ns/name path: problem, nearest valid name".
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	if p.Kind != "" || p.Name != "" {
		b.WriteByte(' ')
		b.WriteString(Key{p.Kind, p.Namespace, p.Name}.String())
	}
	if p.Path != "" {
		b.WriteByte(' ')
		b.WriteString(p.Path)
	}
	b.WriteString(": ")
	b.WriteString(p.Message)
	if p.Hint != "" {
		b.WriteString(", ")
		b.WriteString(p.Hint)
	}
	return b.String()
}
