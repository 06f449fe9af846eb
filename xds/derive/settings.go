package derive

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/ambit-mesh/ambit/xds/crd"
)

const (
	// Names that Istio uses, so that its objects work unchanged.
	istioNamespace     = "istio-system"
	networkLabel       = "topology.istio.io/network"
	defaultTrustDomain = "cluster.local"
	defaultCluster     = "Kubernetes"
)

func (c Config) withDefaults() Config {
	set := func(s *string, def string) {
		if *s == "" {
			*s = def
		}
	}
	set(&c.ClusterID, defaultCluster)
	set(&c.TrustDomain, defaultTrustDomain)
	set(&c.SystemNamespace, "ambit-system")
	set(&c.ClusterDomain, "cluster.local")
	return c
}

// settings is what holds for the whole mesh. A change recomputes everything.
type settings struct {
	trustDomain string
	// trustDomains is the trust domain and its aliases.
	trustDomains []string
	// roots are the namespaces whose policies without a selector are mesh-wide;
	// the first one holds what the control plane adds itself.
	roots    []string
	network  string
	sameNode crd.SameNode // "": by the workload's PeerAuthentication
}

func (s *settings) isRoot(ns string) bool { return slices.Contains(s.roots, ns) }

func (s *settings) equal(o *settings) bool {
	return s.trustDomain == o.trustDomain && s.network == o.network && s.sameNode == o.sameNode &&
		slices.Equal(s.trustDomains, o.trustDomains) && slices.Equal(s.roots, o.roots)
}

// settle computes the settings from the configuration, the mesh configuration
// (found in the root namespace) and labels of the root namespaces.
func settle(cfg Config, meshes map[nn]*crd.Mesh, namespaces map[string]*corev1.Namespace) settings {
	s := settings{trustDomain: cfg.TrustDomain, roots: []string{cfg.SystemNamespace, istioNamespace}, network: cfg.Network, sameNode: cfg.SameNode}
	if cfg.RootNamespace != "" {
		s.roots = []string{cfg.RootNamespace}
	}
	var mesh *crd.MeshConfig
	for _, ns := range slices.Concat(s.roots, []string{cfg.SystemNamespace, istioNamespace}) {
		if m := meshes[nn{ns, "istio"}]; m != nil {
			mesh = &m.Config
			break
		}
	}
	if mesh != nil {
		if mesh.TrustDomain != "" {
			s.trustDomain = mesh.TrustDomain
		}
		s.trustDomains = mesh.TrustDomainAliases
		s.sameNode = cmp.Or(mesh.SameNode, s.sameNode)
		if mesh.RootNamespace != "" && cfg.RootNamespace == "" {
			s.roots = []string{mesh.RootNamespace}
		}
	}
	s.trustDomains = distinct(append([]string{s.trustDomain}, s.trustDomains...))
	s.roots = distinct(s.roots)
	for _, ns := range s.roots {
		if n := namespaces[ns]; n != nil && n.Labels[networkLabel] != "" {
			s.network = n.Labels[networkLabel]
			break
		}
	}
	return s
}

// distinct keeps the first of equal values, in order.
func distinct(values []string) []string {
	var out []string
	for _, v := range values {
		if !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	return out
}

// localityOf reads a node's place from its well-known labels.
func localityOf(n *corev1.Node) locality {
	if n == nil {
		return locality{}
	}
	pick := func(keys ...string) string {
		for _, k := range keys {
			if v := n.Labels[k]; v != "" {
				return v
			}
		}
		return ""
	}
	return locality{
		region:  pick(corev1.LabelTopologyRegion, corev1.LabelFailureDomainBetaRegion),
		zone:    pick(corev1.LabelTopologyZone, corev1.LabelFailureDomainBetaZone),
		subzone: pick("topology.istio.io/subzone"),
	}
}

type locality struct{ region, zone, subzone string }
