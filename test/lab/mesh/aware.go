package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
	"github.com/ambit-mesh/ambit/test/lab/controller"
)

// adminPort is where a node proxy tells what it knows (GET /config_dump).
const adminPort = 15000

// Unaware says which node proxies do not yet know a running pod of the
// namespace ("" is all) as it is: in the mesh or not, ready or not. Until a client's
// proxy does, its calls to a PERMISSIVE pod are plain TCP, and calls of a service
// find no endpoint.
func (m *Mesh) Unaware(ctx context.Context, namespace string) []string {
	want := map[string]known{} // by "namespace/name"
	for _, p := range cluster.List[*corev1.Pod](m.Store, namespace) {
		if p.Status.Phase != corev1.PodRunning || p.DeletionTimestamp != nil || p.Spec.HostNetwork || p.Status.PodIP == "" {
			continue
		}
		k := known{"TCP", "Unhealthy"}
		if p.Annotations[Redirection] == "enabled" {
			k.protocol = "HBONE"
		}
		if controller.Ready(p) {
			k.status = "Healthy"
		}
		want[p.Namespace+"/"+p.Name] = k
	}
	var out []string
	for _, c := range m.components {
		if !strings.HasPrefix(c.Name, "ztunnel@") {
			continue
		}
		have, err := c.workloads(ctx)
		if err != nil {
			out = append(out, fmt.Sprintf("%s does not tell what it knows: %v", c.Name, err))
			continue
		}
		for pod, k := range want {
			if have[pod] != k {
				out = append(out, fmt.Sprintf("%s does not know pod %s as %s %s yet", c.Name, pod, k.status, k.protocol))
			}
		}
	}
	return out
}

// known is what a node proxy knows of a pod.
type known struct{ protocol, status string }

// workloads asks a node proxy for each pod that it knows.
func (c *Component) workloads(ctx context.Context) (map[string]known, error) {
	body, err := c.get(ctx, c.address(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), adminPort), c.onSide()), "/config_dump")
	if err != nil {
		return nil, err
	}
	var dump struct {
		Workloads []struct{ UID, Namespace, Name, Protocol, Status string }
	}
	if err := json.Unmarshal(body, &dump); err != nil {
		return nil, fmt.Errorf("read /config_dump: %w", err)
	}
	have := map[string]known{}
	for _, w := range dump.Workloads {
		if strings.Contains(w.UID, "//Pod/") {
			have[w.Namespace+"/"+w.Name] = known{w.Protocol, w.Status}
		}
	}
	return have, nil
}
