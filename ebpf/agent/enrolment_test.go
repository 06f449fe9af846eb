package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/ambit-mesh/ambit/xds/dir"
)

func TestEnrolment(t *testing.T) {
	for _, tc := range []struct {
		name    string
		nsLabel string
		change  func(*corev1.Pod)
		want    bool
		why     string
	}{
		{"nothing said", "", nil, false, "neither"},
		{"namespace", "ambient", nil, true, "namespace's label"},
		{"pod", "", func(p *corev1.Pod) { p.Labels[labelMode] = "ambient" }, true, "pod's label"},
		{"pod opts out", "ambient", func(p *corev1.Pod) { p.Labels[labelMode] = "none" }, false, "pod's label"},
		{"pod opts in where the namespace says none", "none", func(p *corev1.Pod) { p.Labels[labelMode] = "ambient" }, true, "pod's label"},
		{"pod's unknown value leaves it to the namespace", "ambient", func(p *corev1.Pod) { p.Labels[labelMode] = "sidecar" }, true, "namespace's label"},
		{"host network", "ambient", func(p *corev1.Pod) { p.Spec.HostNetwork = true }, false, "node's network"},
		{"sidecar", "ambient", func(p *corev1.Pod) { p.Annotations[annotationStatus] = "{}" }, false, "sidecar"},
		{"excluded", "ambient", func(p *corev1.Pod) { p.Namespace = "kube-system" }, false, "excluded"},
		{"succeeded", "ambient", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, false, "ended"},
		{"failed", "ambient", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, false, "ended"},
	} {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Name: "web", Namespace: "shop", UID: "u",
				Labels: map[string]string{}, Annotations: map[string]string{annotationNetNS: "/run/netns/x"},
			},
			Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}}},
		}
		if tc.change != nil {
			tc.change(pod)
		}
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{labelMode: tc.nsLabel}}}
		got := podOf(pod, ns, []string{"kube-system"})
		if got.Enrolled != tc.want || !strings.Contains(got.Why, tc.why) {
			t.Errorf("%s: enrolled %t (%s), want %t (%s)", tc.name, got.Enrolled, got.Why, tc.want, tc.why)
		}
		if pod.Spec.HostNetwork && got.NetNS != "" {
			t.Errorf("%s: the node's namespace %q could be entered", tc.name, got.NetNS)
		}
	}
	for _, tc := range []struct {
		label     string
		enrolled  bool
		undecided bool
	}{{"ambient", true, false}, {"none", false, false}, {"", false, true}} {
		got := podOf(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Labels: map[string]string{labelMode: tc.label}, Annotations: map[string]string{annotationMirror: "static"},
		}}, nil, nil)
		if got.Enrolled != tc.enrolled || got.Undecided != tc.undecided || got.ServiceAccount != "default" || got.RuntimeUID != "static" {
			t.Errorf("static pod labelled %q in an unknown namespace: %+v", tc.label, got)
		}
	}
}

func TestAddressesAndAnnotations(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{annotationBypass: "true"}},
		Status:     corev1.PodStatus{PodIP: "::ffff:10.0.0.1"},
	}
	got := podOf(pod, nil, nil)
	if !got.BypassInbound || !slices.Equal(got.Addrs, []netip.Addr{netip.MustParseAddr("10.0.0.1")}) {
		t.Errorf("%+v", got)
	}
	pod.Annotations[annotationBypass] = "perhaps"
	if podOf(pod, nil, nil).BypassInbound {
		t.Error("a value that is no boolean bypassed the proxy")
	}
}

func TestDirSourceFollowsItsNode(t *testing.T) {
	s := NewDirSource(DirConfig{Node: "n1"})
	pod := func(name, uid, node string) *dir.Object {
		v := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", UID: types.UID(uid)},
			Spec:       corev1.PodSpec{NodeName: node},
			Status:     corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}},
		}
		return &dir.Object{GVK: corev1.SchemeGroupVersion.WithKind("Pod"), Namespace: "shop", Name: name, Value: v}
	}
	names := func() string {
		var all []string
		for _, p := range s.list() {
			n := p.Name
			if p.Enrolled {
				n += "+"
			}
			all = append(all, n)
		}
		return strings.Join(all, " ")
	}
	if s.apply(dir.Change{Upserts: []*dir.Object{pod("far", "1", "n2")}}) {
		t.Error("another node's pod matters")
	}
	if !s.apply(dir.Change{Upserts: []*dir.Object{pod("b", "2", "n1"), pod("a", "3", "n1"), pod("twin", "2", "n1"), pod("bad", "../x", "n1")}}) {
		t.Error("this node's pods do not matter")
	}
	if got := names(); got != "a b" {
		t.Errorf("pods %q, want a, and b of the two that share a uid", got)
	}
	s.apply(dir.Change{Deletes: []dir.Key{{Kind: "Pod", Namespace: "shop", Name: "twin"}}})
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{labelMode: "ambient"}}}
	s.apply(dir.Change{Upserts: []*dir.Object{{GVK: corev1.SchemeGroupVersion.WithKind("Namespace"), Name: "shop", Value: ns}}})
	if got := names(); got != "a+ b+" {
		t.Errorf("after labelling the namespace: %q", got)
	}
	if !s.apply(dir.Change{Upserts: []*dir.Object{pod("a", "3", "n2")}}) || names() != "b+" {
		t.Errorf("after a moved to another node: %q", names())
	}
	s.apply(dir.Change{Deletes: []dir.Key{{Kind: "Namespace", Name: "shop"}}})
	if got := names(); got != "b" {
		t.Errorf("after the namespace went: %q", got)
	}
}
