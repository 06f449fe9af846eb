package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
)

// adminPort is where a node proxy tells what it knows (GET /config_dump).
const adminPort = 15000

// Unaware says which node proxies do not yet know a running pod of the
// namespace ("" is all) as it is: in the mesh or not. Until a client's proxy
// does, its calls to a PERMISSIVE pod are plain TCP.
func (m *Mesh) Unaware(ctx context.Context, namespace string) []string {
	want := map[string]string{} // "namespace/name" → protocol
	for _, p := range cluster.List[*corev1.Pod](m.Store, namespace) {
		if p.Status.Phase != corev1.PodRunning || p.DeletionTimestamp != nil || p.Spec.HostNetwork || p.Status.PodIP == "" {
			continue
		}
		want[p.Namespace+"/"+p.Name] = "TCP"
		if p.Annotations[Redirection] == "enabled" {
			want[p.Namespace+"/"+p.Name] = "HBONE"
		}
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
		for pod, protocol := range want {
			if have[pod] != protocol {
				out = append(out, fmt.Sprintf("%s does not know pod %s as %s yet", c.Name, pod, protocol))
			}
		}
	}
	return out
}

// workloads asks a node proxy for the protocol of each pod that it knows.
func (c *Component) workloads(ctx context.Context) (map[string]string, error) {
	body, err := c.get(ctx, c.address(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), adminPort), c.onSide()), "/config_dump")
	if err != nil {
		return nil, err
	}
	var dump struct {
		Workloads []struct{ UID, Namespace, Name, Protocol string }
	}
	if err := json.Unmarshal(body, &dump); err != nil {
		return nil, fmt.Errorf("read /config_dump: %w", err)
	}
	have := map[string]string{}
	for _, w := range dump.Workloads {
		if strings.Contains(w.UID, "//Pod/") {
			have[w.Namespace+"/"+w.Name] = w.Protocol
		}
	}
	return have, nil
}
