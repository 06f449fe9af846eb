package outbound

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

func TestFromBaggage(t *testing.T) {
	peer := id("b")
	proven := func(w mesh.Workload) *mesh.Workload {
		w.Name, w.Identity, w.Namespace, w.ServiceAccount, w.TrustDomain = w.WorkloadName, peer, "default", "b", "cluster.local"
		return &w
	}
	for _, c := range []struct {
		name  string
		lines []string
		want  *mesh.Workload
	}{
		{"nothing", nil, nil},
		{"nothing known", []string{"a=b,k8s.planet.name=x,=,k8s.name=y,job.name=z,k8s.job=z"}, nil},
		{"all", []string{"k8s.cluster.name=c,k8s.namespace.name=default,k8s.job.name=j,service.name=s,service.version=v,cloud.region=r,cloud.availability_zone=z"},
			proven(mesh.Workload{WorkloadName: "j", Traits: &mesh.Traits{ClusterID: "c", WorkloadType: workload.WorkloadType_JOB, CanonicalName: "s", CanonicalRevision: "v", Locality: mesh.Locality{Region: "r", Zone: "z"}}})},
		{"lines, spaces, properties", []string{" service.name = s ;p=1", "service.version=v"}, proven(mesh.Workload{Traits: &mesh.Traits{CanonicalName: "s", CanonicalRevision: "v"}})},
		{"another's namespace", []string{"k8s.namespace.name=kube-system"}, proven(mesh.Workload{Traits: &mesh.Traits{}})},
		{"escapes, and what only looks like one", []string{"service.name=a%2Cb,service.version=100%"}, proven(mesh.Workload{Traits: &mesh.Traits{CanonicalName: "a,b", CanonicalRevision: "100%"}})},
		{"control characters", []string{"service.name=a%0Ab"}, proven(mesh.Workload{Traits: &mesh.Traits{CanonicalName: "ab"}})},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := FromBaggage(c.lines, peer)
			if d := cmp.Diff(c.want, got, cmp.Comparer(func(a, b identity.ID) bool { return a == b })); d != "" {
				t.Error(d)
			}
		})
	}
}

// FuzzFromBaggage: whatever a peer says, what is taken over is bounded and
// printable, and says itself again.
func FuzzFromBaggage(f *testing.F) {
	for _, s := range []string{"", "service.name=a", "k8s.deployment.name=a,b", "service.name=%", "service.name=%C3%28;x", "cloud.region=\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		w := FromBaggage([]string{line}, identity.ID{})
		if w == nil {
			return
		}
		for _, v := range []string{w.ClusterID, w.Namespace, w.WorkloadName, w.CanonicalName, w.CanonicalRevision, w.Locality.Region, w.Locality.Zone} {
			if len(v) > maxBaggageValue {
				t.Fatalf("%d bytes", len(v))
			}
			for _, r := range v {
				if r < ' ' || r == 0x7f {
					t.Fatalf("%q", v)
				}
			}
		}
		again := FromBaggage([]string{Baggage(w)}, identity.ID{})
		if again != nil && (again.ClusterID != w.ClusterID || again.CanonicalName != w.CanonicalName || again.Locality != w.Locality) {
			t.Fatalf("%+v became %+v", w, again)
		}
	})
}
