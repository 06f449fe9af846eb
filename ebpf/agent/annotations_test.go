package agent

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestAnnotations(t *testing.T) {
	for _, tc := range []struct {
		name      string
		pod, ns   map[string]string
		want      Pod
		notes     []string
		namespace bool // is not known
	}{
		{name: "none"},
		{name: "namespace unknown", namespace: true},
		{name: "of the pod", pod: map[string]string{annotationOnEnrol: "reset", annotationExcludeOutbound: "443, 80-81", annotationExcludeInbound: "9090"},
			want: Pod{OnEnrol: OnEnrol{Reset: true}, ExcludeOutbound: "80-81,443", ExcludeInbound: "9090"}},
		{name: "of the namespace", ns: map[string]string{annotationOnEnrol: "drain=90s", annotationExcludeOutbound: "443"},
			want: Pod{OnEnrol: OnEnrol{Reset: true, After: 90 * time.Second}, ExcludeOutbound: "443"}},
		{name: "the pod's count first", pod: map[string]string{annotationOnEnrol: "keep", annotationExcludeOutbound: ""},
			ns: map[string]string{annotationOnEnrol: "reset", annotationExcludeOutbound: "443"}},
		{name: "accelerated", pod: map[string]string{annotationAccelerate: "true"}, want: Pod{Accelerate: true}},
		{name: "accelerated but for one", pod: map[string]string{annotationAccelerate: "false"}, ns: map[string]string{annotationAccelerate: "true"}},
		{name: "accelerated perhaps", ns: map[string]string{annotationAccelerate: "yes"}, notes: []string{
			`namespace shop: annotation ambit.dev/accelerate="yes": want true or false; until it is corrected the pod is not accelerated`,
		}},
		{name: "slips", pod: map[string]string{annotationOnEnrol: "drain=soon", annotationExcludeInbound: "http"}, ns: map[string]string{annotationExcludeOutbound: "15008"},
			notes: []string{
				`pod shop/web: annotation ambit.dev/on-enrol="drain=soon": "soon" is no duration: want drain=90s, drain=10m; until it is corrected keep is in force`,
				`namespace shop: annotation ambit.dev/exclude-outbound-ports="15008": "15008" contains the proxy's port 15008: leave it out; until it is corrected no port is excluded`,
				`pod shop/web: annotation ambit.dev/exclude-inbound-ports="http": "http" is no port and no range of ports (1-65535); until it is corrected no port is excluded`,
			}},
		{name: "no word of ours", pod: map[string]string{annotationOnEnrol: "Reset"}, notes: []string{`want keep, reset or drain=DURATION (drain=90s)`}},
		{name: "no time", pod: map[string]string{annotationOnEnrol: "drain=-1s"}, notes: []string{`"-1s" is no duration`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", Annotations: tc.pod}}
			ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Annotations: tc.ns}}
			if tc.namespace {
				ns = nil
			}
			got := podOf(p, ns, nil)
			if got.Accelerate != tc.want.Accelerate || got.OnEnrol != tc.want.OnEnrol || got.ExcludeInbound != tc.want.ExcludeInbound || got.ExcludeOutbound != tc.want.ExcludeOutbound {
				t.Errorf("pod is %+v, want %+v", got, tc.want)
			}
			if len(tc.notes) == 0 && got.Notes != "" {
				t.Errorf("notes are %q", got.Notes)
			}
			for _, n := range tc.notes {
				if !strings.Contains(got.Notes, n) {
					t.Errorf("notes are %q, want %q", got.Notes, n)
				}
			}
		})
	}
}

func TestOnEnrolIsPrintedAsItIsRead(t *testing.T) {
	for _, o := range []OnEnrol{{}, {Reset: true}, {Reset: true, After: 90 * time.Second}} {
		if got, err := parseOnEnrol(o.String()); err != nil || got != o {
			t.Errorf("%v became %v, %v", o, got, err)
		}
	}
}
