package derive

import "cmp"

// nn is a namespace and a name.
type nn struct{ ns, name string }

func (n nn) String() string { return n.ns + "/" + n.name }

func (n nn) compare(o nn) int { return cmp.Or(cmp.Compare(n.ns, o.ns), cmp.Compare(n.name, o.name)) }

// label is one key and value.
type label struct{ key, value string }

type set[K comparable] map[K]struct{}

// multi maps a key to a set; empty sets disappear.
type multi[K, V comparable] map[K]set[V]

func (m multi[K, V]) add(k K, v V) {
	s := m[k]
	if s == nil {
		s = set[V]{}
		m[k] = s
	}
	s[v] = struct{}{}
}

func (m multi[K, V]) remove(k K, v V) {
	if s := m[k]; s != nil {
		delete(s, v)
		if len(s) == 0 {
			delete(m, k)
		}
	}
}

// labelIndex finds pods by a selector without looking at every pod.
type labelIndex map[string]*nsLabels // namespace →

type nsLabels struct {
	all     map[string]map[string]string // pod name → its labels
	byLabel multi[label, string]         // → pod names
}

func (x labelIndex) put(pod nn, labels map[string]string) {
	x.remove(pod)
	n := x[pod.ns]
	if n == nil {
		n = &nsLabels{all: map[string]map[string]string{}, byLabel: multi[label, string]{}}
		x[pod.ns] = n
	}
	n.all[pod.name] = labels
	for k, v := range labels {
		n.byLabel.add(label{k, v}, pod.name)
	}
}

func (x labelIndex) remove(pod nn) {
	n := x[pod.ns]
	if n == nil {
		return
	}
	for k, v := range n.all[pod.name] {
		n.byLabel.remove(label{k, v}, pod.name)
	}
	delete(n.all, pod.name)
	if len(n.all) == 0 {
		delete(x, pod.ns)
	}
}

// selected calls f for every pod of the namespace that has all labels.
func (x labelIndex) selected(ns string, labels map[string]string, f func(nn)) {
	n := x[ns]
	if n == nil {
		return
	}
	if len(labels) == 0 {
		for name := range n.all {
			f(nn{ns, name})
		}
		return
	}
	var rarest set[string]
	first := true
	for k, v := range labels {
		if s := n.byLabel[label{k, v}]; first || len(s) < len(rarest) {
			rarest, first = s, false
		}
	}
	for name := range rarest {
		if matches(labels, n.all[name]) {
			f(nn{ns, name})
		}
	}
}

// selectorIndex finds the selectors that choose a pod, without looking at every
// selector: each is filed under one of its labels.
type selectorIndex struct {
	filed  map[nn]map[string]string // object → its selector
	byFile multi[fileKey, nn]
}

type fileKey struct {
	ns string
	label
}

func newSelectorIndex() *selectorIndex {
	return &selectorIndex{filed: map[nn]map[string]string{}, byFile: multi[fileKey, nn]{}}
}

// fileUnder picks one label, always the same for the same selector.
func fileUnder(selector map[string]string) label {
	var best label
	for k, v := range selector {
		if best.key == "" || k < best.key {
			best = label{k, v}
		}
	}
	return best
}

// put files an object's selector, which must not be empty.
func (x *selectorIndex) put(object nn, selector map[string]string) {
	x.remove(object)
	x.filed[object] = selector
	x.byFile.add(fileKey{object.ns, fileUnder(selector)}, object)
}

func (x *selectorIndex) remove(object nn) {
	selector, ok := x.filed[object]
	if !ok {
		return
	}
	delete(x.filed, object)
	x.byFile.remove(fileKey{object.ns, fileUnder(selector)}, object)
}

// choosing calls f for every object of namespace ns whose selector chooses a pod
// with these labels.
func (x *selectorIndex) choosing(ns string, labels map[string]string, f func(nn)) {
	for k, v := range labels {
		for object := range x.byFile[fileKey{ns, label{k, v}}] {
			if matches(x.filed[object], labels) {
				f(object)
			}
		}
	}
}

func matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
