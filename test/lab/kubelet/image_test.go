package kubelet

import (
	"errors"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestImagesOfGuidesAreKnown(t *testing.T) {
	tests := []struct {
		name string
		in   corev1.Container
		want []string
	}{
		{"bookinfo with registry and tag", corev1.Container{Image: "docker.io/istio/examples-bookinfo-reviews-v3:1.20.2"}, []string{"ambit-sample", "reviews", "--version", "v3"}},
		{"digest", corev1.Container{Image: "examples-bookinfo-ratings-v1@sha256:0123"}, []string{"ambit-sample", "ratings", "--version", "v1"}},
		{"sleep", corev1.Container{Image: "curlimages/curl", Command: []string{"/bin/sleep", "infinity"}}, []string{"/bin/sleep", "infinity"}},
		{"curl alone", corev1.Container{Image: "curlimages/curl:8.1"}, []string{"ambit-sample", "pause"}},
		{"httpbin with a server that is not here", corev1.Container{Image: "docker.io/kong/httpbin", Command: []string{"gunicorn"}, Args: []string{"-b", "0.0.0.0:80"}}, []string{"ambit-sample", "echo"}},
		{"tcp-echo", corev1.Container{Image: "docker.io/istio/tcp-echo-server:1.3", Args: []string{"9000,9001", "hello"}}, []string{"ambit-sample", "tcp-echo", "9000,9001", "hello"}},
		{"registry with a port", corev1.Container{Image: "localhost:5000/ambit-sample", Args: []string{"echo"}}, []string{"ambit-sample", "echo"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := command(&tt.in)
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("%q, error %v; want %q", got, err, tt.want)
			}
		})
	}
	_, err := command(&corev1.Container{Image: "nginx"})
	if _, ok := errors.AsType[*UnknownImageError](err); !ok || !strings.Contains(err.Error(), "examples-bookinfo-productpage-v1") {
		t.Errorf("an unknown image: %v", err)
	}
}

func TestExpand(t *testing.T) {
	vars := map[string]string{"A": "one"}
	tests := []struct{ name, in, want string }{
		{"variable", "x-$(A)-y", "x-one-y"},
		{"unknown stays", "$(B)", "$(B)"},
		{"twice", "$(A)$(A)", "oneone"},
		{"open", "$(A", "$(A"},
		{"shell's own", "$A", "$A"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := expand(tt.in, vars); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}
