package app

import (
	"net/netip"
	"strings"

	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

// On demand (XDS_ON_DEMAND) the process subscribes to no address until a
// connection needs it; policies are subscribed to as ever.

func (c *Config) onDemandType() string {
	if c.OnDemand {
		return api.AddressType
	}
	return ""
}

// knows reports whether a key means something here: a workload's uid,
// network/address, or namespace/hostname.
func (n *node) knows(key string) bool {
	m := n.store.View().Mesh
	if m.Workload(key) != nil {
		return true
	}
	first, rest, ok := strings.Cut(key, "/")
	if !ok {
		return false
	}
	if a, err := netip.ParseAddr(rest); err == nil {
		return m.WorkloadByAddr(first, a) != nil || m.ServiceByVIP(first, a, "") != nil
	}
	return m.Service(mesh.Hostname{Namespace: first, Name: rest}) != nil
}

// selfKey is by what a workload of this proxy's is asked for: a pod by the uid
// that control planes make of its name, a dedicated proxy's by its address.
func (n *node) selfKey(p handoff.Pod) string {
	if n.cfg.Mode == dedicated {
		return n.cfg.Network + "/" + n.cfg.InstanceIP
	}
	return n.cfg.ClusterID + "//Pod/" + p.Namespace + "/" + p.Name
}
