package app

import (
	"log/slog"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/delta"
	"github.com/ambit-mesh/ambit/xds/derive"
	"github.com/ambit-mesh/ambit/xds/dir"
)

// A proxy on demand that asks for a service, by name or by address, gets its
// endpoints with it.
func TestAServiceComesWithItsEndpoints(t *testing.T) {
	labels := map[string]string{"app": "a"}
	svc := &dir.Object{Namespace: "n", Name: "s", Value: &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "s"},
		Spec:       corev1.ServiceSpec{Selector: labels, ClusterIP: "10.9.0.1", Ports: []corev1.ServicePort{{Port: 80}}},
	}}
	svc.GVK.Kind = "Service"
	p := &dir.Object{Namespace: "n", Name: "p", Value: &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "p", Labels: labels},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1"},
	}}
	p.GVK.Kind = "Pod"
	store := delta.NewStore(api.AuthorizationType, api.AddressType)
	pipe := newPipeline(derive.New(derive.Config{}), store, slog.New(slog.DiscardHandler), func() {})
	pipe.apply(dir.Change{Upserts: []*dir.Object{svc, p}})
	for _, name := range []string{"n/s.n.svc.cluster.local", "/10.9.0.1"} {
		stream := store.NewStream(delta.Limits{})
		if _, err := stream.Request(&discovery.DeltaDiscoveryRequest{TypeUrl: api.AddressType, ResourceNamesSubscribe: []string{name}}); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Next()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range resp.Resources {
			got = append(got, r.Name)
		}
		if slices.Sort(got); !slices.Equal(got, []string{"Kubernetes//Pod/n/p", "n/s.n.svc.cluster.local"}) {
			t.Errorf("%s: got %v", name, got)
		}
	}
}
