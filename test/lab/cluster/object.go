// Package cluster is the lab's API server: the objects of a small cluster in
// memory, applied as `kubectl apply` would, and a directory with one YAML file per
// object that the mesh's processes watch.
//
// A Store may be used from any goroutine. Objects handed out are copies; what
// changes goes through Put, Update or Delete, which publish the file and wake the
// watchers.
package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	yaml "go.yaml.in/yaml/v3"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Object is a Kubernetes object: one of the lab's typed kinds or a *Raw.
type Object interface{ metav1.Object }

// Key names an object in the store.
type Key struct{ Kind, Namespace, Name string }

// String returns "kind ns/name".
func (k Key) String() string {
	if k.Namespace == "" {
		return k.Kind + " " + k.Name
	}
	return k.Kind + " " + k.Namespace + "/" + k.Name
}

// Kind describes one kind the lab gives a meaning to.
type Kind struct {
	Name       string
	APIVersion string
	Aliases    []string // what `get` accepts besides the name
	Cluster    bool     // not in a namespace
	Published  bool     // read by the mesh, so it has a file
	make       func() Object
}

// Kinds are those the lab knows. Any other kind with an apiVersion of Istio or
// the Gateway API is kept as it is and published.
var Kinds = []Kind{
	{"Namespace", "v1", []string{"ns"}, true, true, func() Object { return &corev1.Namespace{} }},
	{"Node", "v1", []string{"no"}, true, true, func() Object { return &corev1.Node{} }},
	{"Pod", "v1", []string{"po"}, false, true, func() Object { return &corev1.Pod{} }},
	{"Service", "v1", []string{"svc"}, false, true, func() Object { return &corev1.Service{} }},
	{"ServiceAccount", "v1", []string{"sa"}, false, true, func() Object { return &corev1.ServiceAccount{} }},
	{"ConfigMap", "v1", []string{"cm"}, false, true, func() Object { return &corev1.ConfigMap{} }},
	{"Secret", "v1", nil, false, false, func() Object { return &corev1.Secret{} }},
	{"EndpointSlice", "discovery.k8s.io/v1", nil, false, true, func() Object { return &discoveryv1.EndpointSlice{} }},
	{"Deployment", "apps/v1", []string{"deploy"}, false, false, func() Object { return &appsv1.Deployment{} }},
	{"ReplicaSet", "apps/v1", []string{"rs"}, false, false, func() Object { return &appsv1.ReplicaSet{} }},
	{"StatefulSet", "apps/v1", []string{"sts"}, false, false, func() Object { return &appsv1.StatefulSet{} }},
	{"DaemonSet", "apps/v1", []string{"ds"}, false, false, func() Object { return &appsv1.DaemonSet{} }},
	{"Job", "batch/v1", nil, false, false, func() Object { return &batchv1.Job{} }},
}

// rawAliases are the usual short names of kinds that are only passed on.
var rawAliases = map[string]string{"pa": "PeerAuthentication", "ap": "AuthorizationPolicy", "vs": "VirtualService", "dr": "DestinationRule",
	"se": "ServiceEntry", "we": "WorkloadEntry", "gw": "Gateway", "ra": "RequestAuthentication"}

func kindNamed(name string) (Kind, bool) {
	for _, k := range Kinds {
		if k.Name == name {
			return k, true
		}
	}
	return Kind{}, false
}

// KindFor resolves what a user types (po, pods, Pod) to a kind's name.
func (s *Store) KindFor(word string) (string, bool) {
	w := strings.ToLower(word)
	same := func(name string) bool {
		l := strings.ToLower(name)
		return w == l || w == l+"s" || w == l+"es" || w == strings.TrimSuffix(l, "y")+"ies"
	}
	for _, k := range Kinds {
		if same(k.Name) {
			return k.Name, true
		}
		for _, a := range k.Aliases {
			if w == a {
				return k.Name, true
			}
		}
	}
	if k, ok := rawAliases[w]; ok {
		return k, true
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for key := range s.objects {
		if same(key.Kind) {
			return key.Kind, true
		}
	}
	return "", false
}

// Raw is an object of a kind that the lab only passes on.
type Raw struct {
	metav1.TypeMeta
	metav1.ObjectMeta
	Fields map[string]any // the whole object but metadata
}

// MarshalJSON puts the object together again.
func (r *Raw) MarshalJSON() ([]byte, error) {
	all := map[string]any{}
	for k, v := range r.Fields {
		all[k] = v
	}
	all["metadata"] = r.ObjectMeta
	return json.Marshal(all)
}

// UnmarshalJSON takes any object apart.
func (r *Raw) UnmarshalJSON(b []byte) error {
	var head struct {
		metav1.TypeMeta `json:",inline"`
		Metadata        metav1.ObjectMeta `json:"metadata"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return err
	}
	if err := json.Unmarshal(b, &r.Fields); err != nil {
		return err
	}
	delete(r.Fields, "metadata")
	r.TypeMeta, r.ObjectMeta = head.TypeMeta, head.Metadata
	return nil
}

// KindOf returns an object's kind.
func KindOf(o Object) string {
	if r, ok := o.(*Raw); ok {
		return r.Kind
	}
	for _, k := range Kinds {
		if fmt.Sprintf("%T", k.make()) == fmt.Sprintf("%T", o) {
			return k.Name
		}
	}
	return ""
}

// KeyOf returns an object's key.
func KeyOf(o Object) Key { return Key{KindOf(o), o.GetNamespace(), o.GetName()} }

// Decode reads the objects of a YAML stream, lists included. Known kinds are read
// strictly: a field that does not exist is an error, as with kubectl. What could
// be read is returned beside the joined errors of the rest.
func Decode(r io.Reader, name string) ([]Object, error) {
	var objects []Object
	var errs []error
	dec := yaml.NewDecoder(r)
	for n := 1; ; n++ {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return objects, errors.Join(errs...)
		}
		if err != nil {
			return objects, errors.Join(append(errs, fmt.Errorf("%s: %w", name, err))...)
		}
		got, err := decodeDocument(&doc)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: document %d: %w", name, n, err))
		}
		objects = append(objects, got...)
	}
}

func decodeDocument(doc *yaml.Node) ([]Object, error) {
	var v any
	if err := doc.Decode(&v); err != nil {
		return nil, err
	}
	v = withStringKeys(v)
	m, ok := v.(map[string]any)
	if v == nil {
		return nil, nil // an empty document between two separators
	}
	if !ok {
		return nil, fmt.Errorf("line %d: want an object with apiVersion and kind", doc.Line)
	}
	if items, ok := m["items"].([]any); ok && strings.HasSuffix(fmt.Sprint(m["kind"]), "List") {
		var objects []Object
		var errs []error
		for _, item := range items {
			o, err := decodeValue(item)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			objects = append(objects, o)
		}
		return objects, errors.Join(errs...)
	}
	o, err := decodeValue(m)
	if err != nil {
		return nil, err
	}
	return []Object{o}, nil
}

// withStringKeys writes keys such as the 8080 of portLevelMtls as JSON can.
func withStringKeys(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			v[k] = withStringKeys(x)
		}
	case map[any]any:
		m := make(map[string]any, len(v))
		for k, x := range v {
			m[fmt.Sprint(k)] = withStringKeys(x)
		}
		return m
	case []any:
		for i, x := range v {
			v[i] = withStringKeys(x)
		}
	}
	return v
}

func decodeValue(v any) (Object, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return decodeJSON(b, true)
}

func decodeJSON(b []byte, strict bool) (Object, error) {
	var head struct {
		metav1.TypeMeta `json:",inline"`
		Metadata        metav1.ObjectMeta `json:"metadata"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("read apiVersion, kind and metadata: %w", err)
	}
	if head.Kind == "" || head.Metadata.Name == "" {
		return nil, fmt.Errorf("object without kind or metadata.name: %.80s", b)
	}
	var o Object = &Raw{}
	group, _, _ := strings.Cut(head.APIVersion, "/")
	if k, ok := kindNamed(head.Kind); ok && k.APIVersion == head.APIVersion {
		o = k.make()
	} else if ok {
		return nil, fmt.Errorf("%s %s: apiVersion %q, want %q", head.Kind, head.Metadata.Name, head.APIVersion, k.APIVersion)
	} else if !strings.HasSuffix(group, "istio.io") && !strings.HasSuffix(group, "gateway.networking.k8s.io") {
		return nil, fmt.Errorf("%s %s: the lab does not know %s %s; it knows %s and the kinds of Istio and the Gateway API",
			head.Kind, head.Metadata.Name, head.APIVersion, head.Kind, kindNames())
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	if strict {
		dec.DisallowUnknownFields()
	}
	if err := dec.Decode(o); err != nil {
		return nil, fmt.Errorf("%s %s/%s: %w", head.Kind, head.Metadata.Namespace, head.Metadata.Name, err)
	}
	return o, nil
}

func kindNames() string {
	var names []string
	for _, k := range Kinds {
		names = append(names, k.Name)
	}
	return strings.Join(names, ", ")
}

// Tree turns an object into plain maps, without the fields that are empty, as
// YAML is written and shown.
func Tree(o Object) (map[string]any, error) {
	b, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	var m map[string]any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := dec.Decode(&m); err != nil {
		return nil, err
	}
	if k, ok := kindNamed(KindOf(o)); ok {
		m["apiVersion"], m["kind"] = k.APIVersion, k.Name
	}
	if meta, ok := m["metadata"].(map[string]any); ok && meta["creationTimestamp"] == nil {
		delete(meta, "creationTimestamp")
	}
	if status, ok := m["status"].(map[string]any); ok && len(status) == 0 {
		delete(m, "status")
	}
	plain, _ := plainNumbers(m).(map[string]any)
	return plain, nil
}

// plainNumbers replaces json.Number, which YAML would write as text.
func plainNumbers(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			if v[k] == nil {
				delete(v, k)
				continue
			}
			v[k] = plainNumbers(v[k])
		}
	case []any:
		for i := range v {
			v[i] = plainNumbers(v[i])
		}
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		f, _ := v.Float64() // a number that JSON has just accepted
		return f
	}
	return v
}

// YAML writes an object as kubectl would.
func YAML(o Object) ([]byte, error) {
	m, err := Tree(o)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(m); err != nil {
		return nil, err
	}
	return b.Bytes(), enc.Close()
}

func clone(o Object) Object {
	b, err := json.Marshal(o)
	if err != nil {
		panic("BUG: object does not encode: " + err.Error())
	}
	var c Object = &Raw{}
	if k, ok := kindNamed(KindOf(o)); ok {
		c = k.make()
	}
	if err := json.Unmarshal(b, c); err != nil {
		panic("BUG: object does not decode: " + err.Error())
	}
	return c
}
