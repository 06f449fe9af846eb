package app

import (
	"github.com/ambit-mesh/ambit/ebpf/handoff"
	"github.com/ambit-mesh/ambit/xds/api"
)

// On demand (XDS_ON_DEMAND) the process subscribes to no address until a
// connection needs it; policies are subscribed to as ever.

func (c *Config) onDemandType() string {
	if c.OnDemand {
		return api.AddressType
	}
	return ""
}

// knows reports whether a key means something here.
func (n *node) knows(key string) bool { return n.store.View().Mesh.Has(key) }

// selfKey is by what a workload of this proxy's is asked for: a pod by the uid
// that control planes make of its name, a dedicated proxy's by its address.
func (n *node) selfKey(p handoff.Pod) string {
	if n.cfg.Mode == dedicated {
		return n.cfg.Network + "/" + n.cfg.InstanceIP
	}
	return n.cfg.ClusterID + "//Pod/" + p.Namespace + "/" + p.Name
}
