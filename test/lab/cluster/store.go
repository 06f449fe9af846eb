package cluster

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// SpecHash is the annotation with the hash of the pod spec a user applied.
const SpecHash = "lab.ambit.dev/applied-spec"

// Store holds the objects.
type Store struct {
	dir string // published files; "" publishes nothing

	mu       sync.RWMutex
	objects  map[Key]Object             // guarded by mu; values are never changed in place
	applied  map[Key]appliedKeys        // guarded by mu
	watchers map[chan struct{}]struct{} // guarded by mu
	version  int64                      // guarded by mu
}

// appliedKeys are the labels and annotations of the last apply, so that the next
// one can remove those it no longer names and keep those set by other means.
type appliedKeys struct{ labels, annotations map[string]string }

// New returns a store that publishes into dir.
func New(dir string) (*Store, error) {
	if dir != "" {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make cluster directory: %w", err)
		}
	}
	return &Store{dir: dir, objects: map[Key]Object{}, applied: map[Key]appliedKeys{}, watchers: map[chan struct{}]struct{}{}}, nil
}

// Watch returns a channel that holds a value whenever something changed since the
// last receive. The function ends it.
func (s *Store) Watch() (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	c <- struct{}{}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers[c] = struct{}{}
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, c)
	}
}

func (s *Store) wakeLocked() {
	for c := range s.watchers {
		select {
		case c <- struct{}{}:
		default: // it is told already
		}
	}
}

// Get returns a copy of an object.
func (s *Store) Get(k Key) (Object, bool) {
	s.mu.RLock()
	o, ok := s.objects[k]
	s.mu.RUnlock()
	if !ok {
		return nil, false
	}
	return clone(o), true
}

// List returns copies of the objects of a kind, sorted, of one namespace or all.
func (s *Store) List(kind, namespace string) []Object {
	s.mu.RLock()
	var found []Object
	for k, o := range s.objects {
		if k.Kind == kind && (namespace == "" || k.Namespace == namespace) {
			found = append(found, o)
		}
	}
	s.mu.RUnlock()
	slices.SortFunc(found, func(a, b Object) int {
		return strings.Compare(a.GetNamespace()+"/"+a.GetName(), b.GetNamespace()+"/"+b.GetName())
	})
	for i := range found {
		found[i] = clone(found[i])
	}
	return found
}

// List is Store.List with the Go type of the kind.
func List[T Object](s *Store, namespace string) []T {
	var zero T
	var out []T
	for _, o := range s.List(KindOf(zero), namespace) {
		if t, ok := o.(T); ok {
			out = append(out, t)
		}
	}
	return out
}

// Get is Store.Get with the Go type of the kind.
func Get[T Object](s *Store, namespace, name string) (T, bool) {
	var zero T
	o, ok := s.Get(Key{KindOf(zero), namespace, name})
	t, same := o.(T)
	return t, ok && same
}

// Update changes an object that exists; change returns false to leave it alone.
func Update[T Object](s *Store, namespace, name string, change func(T) bool) error {
	var zero T
	k := Key{KindOf(zero), namespace, name}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := s.objects[k]
	if !ok {
		return fmt.Errorf("%s not found", k)
	}
	t, ok := clone(old).(T)
	if !ok {
		return fmt.Errorf("%s has another type", k)
	}
	if !change(t) {
		return nil
	}
	return s.putLocked(k, t)
}

// Put stores an object as it is, filling in what an API server would.
func (s *Store) Put(o Object) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := clone(o)
	k := KeyOf(c)
	if old, ok := s.objects[k]; ok {
		c.SetUID(old.GetUID())
		c.SetCreationTimestamp(old.GetCreationTimestamp())
	}
	return s.putLocked(k, c)
}

func (s *Store) putLocked(k Key, o Object) error {
	if k.Kind == "" || k.Name == "" {
		return fmt.Errorf("object without kind or name: %s", k)
	}
	if o.GetUID() == "" {
		o.SetUID(newUID())
		o.SetCreationTimestamp(metav1.NewTime(time.Now().UTC().Truncate(time.Second)))
	}
	if old, ok := s.objects[k]; ok {
		o.SetResourceVersion(old.GetResourceVersion())
		if same(old, o) {
			return nil
		}
	}
	s.version++
	o.SetResourceVersion(fmt.Sprint(s.version))
	s.objects[k] = o
	s.wakeLocked()
	return s.publishLocked(k, o)
}

func same(a, b Object) bool {
	x, errA := json.Marshal(a)
	y, errB := json.Marshal(b)
	return errA == nil && errB == nil && bytes.Equal(x, y)
}

// Delete removes an object. Pods are marked for deletion instead; their kubelet
// calls Forget when the processes have ended.
func (s *Store) Delete(k Key) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[k]
	if !ok {
		return fmt.Errorf("%s not found", k)
	}
	if k.Kind == "Pod" {
		if o.GetDeletionTimestamp() != nil {
			return nil
		}
		c := clone(o)
		now := metav1.NewTime(time.Now().UTC().Truncate(time.Second))
		c.SetDeletionTimestamp(&now)
		return s.putLocked(k, c)
	}
	return s.forgetLocked(k)
}

// Forget removes an object at once.
func (s *Store) Forget(k Key) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.forgetLocked(k)
}

func (s *Store) forgetLocked(k Key) error {
	if _, ok := s.objects[k]; !ok {
		return nil
	}
	delete(s.objects, k)
	delete(s.applied, k)
	s.wakeLocked()
	if s.dir == "" {
		return nil
	}
	if err := os.Remove(s.file(k)); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("withdraw %s: %w", k, err)
	}
	return nil
}

// File is the published file of an object.
func (s *Store) File(k Key) string { return s.file(k) }

func (s *Store) file(k Key) string {
	ns := k.Namespace
	if ns == "" {
		ns = "_cluster"
	}
	return filepath.Join(s.dir, ns+"."+strings.ToLower(k.Kind)+"."+k.Name+".yaml")
}

// publishLocked replaces the object's file in one step, so that a watcher never
// reads half of it.
func (s *Store) publishLocked(k Key, o Object) error {
	if kind, known := kindNamed(k.Kind); s.dir == "" || known && !kind.Published {
		return nil
	}
	b, err := YAML(o)
	if err != nil {
		return fmt.Errorf("encode %s: %w", k, err)
	}
	path := s.file(k)
	// A name without the .yaml suffix is not read as configuration.
	temp := filepath.Join(s.dir, "."+filepath.Base(path)+".part")
	if err := os.WriteFile(temp, b, 0o644); err != nil {
		return fmt.Errorf("publish %s: %w", k, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("publish %s: %w", k, err)
	}
	return nil
}

// Outcome is what an apply did.
type Outcome string

// The outcomes, in kubectl's words.
const (
	Created    Outcome = "created"
	Configured Outcome = "configured"
	Unchanged  Outcome = "unchanged"
)

// Apply merges what a user declares into the store: the declared spec replaces the
// old one, status and what controllers allocated stay, labels and annotations set
// by other means stay. A namespace that does not exist is made.
func (s *Store) Apply(o Object) (Outcome, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o = clone(o)
	k := s.scopeLocked(o)
	declared := appliedKeys{maps.Clone(o.GetLabels()), maps.Clone(o.GetAnnotations())}
	old, exists := s.objects[k]
	if exists {
		last := s.applied[k]
		o.SetLabels(merge(old.GetLabels(), last.labels, declared.labels))
		o.SetAnnotations(merge(old.GetAnnotations(), last.annotations, declared.annotations))
		o.SetUID(old.GetUID())
		o.SetCreationTimestamp(old.GetCreationTimestamp())
		o.SetOwnerReferences(old.GetOwnerReferences())
		carryOver(old, o)
	}
	before := s.version
	if err := s.putLocked(k, o); err != nil {
		return "", err
	}
	s.applied[k] = declared
	switch {
	case !exists:
		return Created, nil
	case s.version == before:
		return Unchanged, nil
	}
	return Configured, nil
}

// scopeLocked gives the object its namespace and makes that namespace.
func (s *Store) scopeLocked(o Object) Key {
	kind, known := kindNamed(KindOf(o))
	if known && kind.Cluster || KindOf(o) == "GatewayClass" {
		o.SetNamespace("")
		return KeyOf(o)
	}
	if o.GetNamespace() == "" {
		o.SetNamespace("default")
	}
	ns := Key{"Namespace", "", o.GetNamespace()}
	if _, ok := s.objects[ns]; !ok {
		n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns.Name, Labels: map[string]string{"kubernetes.io/metadata.name": ns.Name}}}
		_ = s.putLocked(ns, n) // the object's own publication reports the same fault
	}
	return KeyOf(o)
}

// merge is kubectl's three-way merge of a string map.
func merge(live, last, declared map[string]string) map[string]string {
	out := maps.Clone(live)
	if out == nil {
		out = map[string]string{}
	}
	for k := range last {
		if _, still := declared[k]; !still {
			delete(out, k)
		}
	}
	maps.Copy(out, declared)
	if len(out) == 0 {
		return nil
	}
	return out
}

// carryOver keeps what the cluster, not the user, wrote.
func carryOver(old, o Object) {
	switch o := o.(type) {
	case *corev1.Pod:
		if old, ok := old.(*corev1.Pod); ok {
			o.Status = old.Status
			o.DeletionTimestamp = old.DeletionTimestamp
			o.Spec = old.Spec // a running pod's spec does not change; the caller recreates it
		}
	case *corev1.Service:
		if old, ok := old.(*corev1.Service); ok && o.Spec.ClusterIP == "" {
			o.Spec.ClusterIP, o.Spec.ClusterIPs, o.Spec.IPFamilies = old.Spec.ClusterIP, old.Spec.ClusterIPs, old.Spec.IPFamilies
			if o.Spec.IPFamilyPolicy == nil {
				o.Spec.IPFamilyPolicy = old.Spec.IPFamilyPolicy
			}
			o.Status = old.Status
		}
	}
}

// Mark sets or, with a nil value, removes labels or annotations.
func (s *Store) Mark(k Key, annotations bool, set map[string]*string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, ok := s.objects[k]
	if !ok {
		return fmt.Errorf("%s not found", k)
	}
	o := clone(old)
	m := o.GetLabels()
	if annotations {
		m = o.GetAnnotations()
	}
	if m == nil {
		m = map[string]string{}
	}
	for key, v := range set {
		if v == nil {
			delete(m, key)
		} else {
			m[key] = *v
		}
	}
	if annotations {
		o.SetAnnotations(m)
	} else {
		o.SetLabels(m)
	}
	return s.putLocked(k, o)
}

func newUID() types.UID {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return types.UID(h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:])
}

// All returns the keys of all objects.
func (s *Store) All() []Key {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Collect(maps.Keys(s.objects))
}
