package agent

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestWantsDNS(t *testing.T) {
	for _, tc := range []struct {
		annotation string
		byDefault  bool
		want       bool
	}{
		{"", true, true}, {"", false, false},
		{"false", true, false}, {"true", false, true},
		{"perhaps", true, true}, {"perhaps", false, false},
	} {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{annotationDNS: tc.annotation}}}
		if got := wantsDNS(p, tc.byDefault); got != tc.want {
			t.Errorf("annotation %q, default %t: %t, want %t", tc.annotation, tc.byDefault, got, tc.want)
		}
	}
}

func TestBoundTo(t *testing.T) {
	const table = "  sl  local_address rem_address   st tx_queue\n" +
		" 1234: 0100007F:3ACD 00000000:0000 07 00000000:00000000\n" +
		" 1235: 0100007F:0035 3ACD0000:3ACE 07 00000000:00000000\n" +
		" 1236: 00000000:0044 00000000:0000 07 00000000:00000000\n" +
		" 1237: 00000000000000000000000000000000:0045 00000000000000000000000000000000:0000 07 00000000:00000000\n"
	for port, want := range map[uint16]struct{ any, all bool }{15053: {any: true}, 53: {any: true}, 15054: {}, 68: {true, true}, 69: {true, true}} {
		for toAll, want := range map[bool]bool{false: want.any, true: want.all} {
			if got, err := boundTo(strings.NewReader(table), port, toAll); got != want || err != nil {
				t.Errorf("port %d, all addresses %t: %t, %v, want %t", port, toAll, got, err, want)
			}
		}
	}
}
