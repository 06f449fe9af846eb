package store

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
)

// Change is what differs between two views: workloads as they came, and the others by name. A nil Old was added, a nil New was
// removed.
type Change struct {
	Workloads []WorkloadChange
	Services  []ServiceChange
	Policies  []PolicyChange
}

// WorkloadChange is a changed workload.
type WorkloadChange struct {
	UID      string
	Old, New *mesh.Workload
}

// ServiceChange is a changed service.
type ServiceChange struct {
	Host     mesh.Hostname
	Old, New *mesh.Service
}

// PolicyChange is a changed policy.
type PolicyChange struct {
	Key      string
	Old, New *policy.Policy
}

// Affects reports whether the policy counts, or counted, for a workload of
// namespace ns that names refs.
func (c PolicyChange) Affects(ns string, refs []string) bool {
	return c.Old != nil && c.Old.AppliesTo(ns, refs) || c.New != nil && c.New.AppliesTo(ns, refs)
}

// AffectsPolicy reports whether a decision for the destination workload could
// be another one now: a policy that counts for it changed, or the workload
// itself.
func (c *Change) AffectsPolicy(dst *mesh.Workload) bool {
	for _, w := range c.Workloads {
		if w.UID == dst.UID {
			return true
		}
	}
	for _, p := range c.Policies {
		if p.Affects(dst.Namespace, dst.Policies) {
			return true
		}
	}
	return false
}

// register exports the numbers of resources in force and held back.
func (s *Store) register(reg prometheus.Registerer) {
	if reg == nil {
		return
	}
	for kind, count := range map[string]func(*View) int{
		"workload": func(v *View) int { return v.Mesh.Workloads() },
		"service":  func(v *View) int { return v.Mesh.Services() },
		"policy":   func(v *View) int { return v.Policies.Len() },
	} {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ambit_ztunnel_xds_resources", Help: "Resources in force.",
			ConstLabels: prometheus.Labels{"type": kind},
		}, func() float64 { return float64(count(s.View())) }))
	}
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "ambit_ztunnel_xds_held_back", Help: "Workloads whose new version waits for a policy that it names.",
	}, func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(len(s.held))
	}))
}
