package derive

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
)

const (
	redirectionAnnotation  = "ambient.istio.io/redirection" // written when a pod's traffic is captured
	tunnelLabel            = "networking.istio.io/tunnel"   // the pod itself speaks HBONE
	localityLabel          = "istio-locality"
	workloadNameLabel      = "service.istio.io/workload-name"
	canonicalNameLabel     = "service.istio.io/canonical-name"
	canonicalRevisionLabel = "service.istio.io/canonical-revision"
	podTemplateHashLabel   = "pod-template-hash"
)

// terminal pods have released their address.
func terminal(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func podAddrs(p *corev1.Pod) []netip.Addr {
	var ips []string
	for _, ip := range p.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	if len(ips) == 0 {
		ips = []string{p.Status.PodIP}
	}
	return parseAddrs(ips)
}

func serviceAccountOf(p *corev1.Pod) string {
	if p.Spec.ServiceAccountName == "" {
		return "default"
	}
	return p.Spec.ServiceAccountName
}

func (e *Engine) podUID(k nn) string { return e.cfg.ClusterID + "//Pod/" + k.ns + "/" + k.name }

// workload builds the resource of one pod, nil when it is not served, and says
// what of it is not in force.
func (e *Engine) workload(k nn) (*workload.Workload, []Condition) {
	p := e.pods[k]
	if p == nil {
		return nil, nil
	}
	src := source{"Pod", k}
	b := e.bind(bound{source: src, meta: &p.ObjectMeta, traffic: trafficWorkload})
	conditions := append(b.conditions, extensionConditions(src, p.Annotations)...)
	addrs := podAddrs(p)
	if terminal(p) || len(addrs) == 0 {
		return nil, conditions
	}
	w := &workload.Workload{
		Uid: e.podUID(k), Name: k.name, Namespace: k.ns,
		Network:               e.podNetwork(p),
		TrustDomain:           unless(e.set.trustDomain, defaultTrustDomain),
		ServiceAccount:        unless(serviceAccountOf(p), "default"),
		ClusterId:             unless(e.cfg.ClusterID, defaultCluster),
		Node:                  p.Spec.NodeName,
		Status:                health(p),
		Locality:              e.podLocality(p),
		Services:              e.podServices(k, p),
		AuthorizationPolicies: e.podPolicies(k, p),
		Waypoint:              b.waypoint,
		ApplicationTunnel:     e.applicationTunnel(k, p),
	}
	w.NetworkGateway = e.networkGateway(w.Network)
	for _, a := range addrs {
		w.Addresses = append(w.Addresses, a.AsSlice())
	}
	if p.Spec.HostNetwork {
		w.NetworkMode = workload.NetworkMode_HOST_NETWORK
	}
	if p.Labels[tunnelLabel] == "http" {
		w.TunnelProtocol, w.NativeTunnel = workload.TunnelProtocol_HBONE, true
	} else if p.Annotations[redirectionAnnotation] == "enabled" {
		w.TunnelProtocol = workload.TunnelProtocol_HBONE
	}
	w.WorkloadName, w.WorkloadType = owner(p)
	w.CanonicalName = firstLabel(p.Labels, w.WorkloadName, canonicalNameLabel, "app.kubernetes.io/name", "app")
	w.CanonicalRevision = firstLabel(p.Labels, "latest", canonicalRevisionLabel, "app.kubernetes.io/version", "version")
	extend(w, e.extension(k, p, w))
	return w, conditions
}

// unless leaves out what the reader assumes anyway (facts: decode defaults).
func unless(s, assumed string) string {
	if s == assumed {
		return ""
	}
	return s
}

func firstLabel(labels map[string]string, fallback string, keys ...string) string {
	for _, k := range keys {
		if v := labels[k]; v != "" {
			return v
		}
	}
	return fallback
}

func (e *Engine) podNetwork(p *corev1.Pod) string {
	return cmp.Or(networkOf(p), e.set.network)
}

func health(p *corev1.Pod) workload.WorkloadStatus {
	if p.DeletionTimestamp == nil {
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return workload.WorkloadStatus_HEALTHY
			}
		}
	}
	return workload.WorkloadStatus_UNHEALTHY
}

// podLocality is the pod's own label "region.zone.subzone", else its node's.
func (e *Engine) podLocality(p *corev1.Pod) *workload.Locality {
	l := localityOf(e.nodes[p.Spec.NodeName])
	if v := p.Labels[localityLabel]; v != "" {
		parts := append(strings.SplitN(strings.ReplaceAll(v, "/", "."), ".", 3), "", "")
		l = locality{parts[0], parts[1], parts[2]}
	}
	if l == (locality{}) {
		return nil
	}
	return &workload.Locality{Region: l.region, Zone: l.zone, Subzone: l.subzone}
}

// A CronJob's jobs are named <cronjob>-<minutes since 1970>.
var cronJobName = regexp.MustCompile(`^(.+)-\d{8,10}$`)

// owner finds the thing users deployed from what created the pod.
func owner(p *corev1.Pod) (string, workload.WorkloadType) {
	name, typ := p.Name, workload.WorkloadType_POD
	if ref := metav1.GetControllerOfNoCopy(p); ref != nil {
		name = ref.Name
		switch ref.Kind {
		case "Deployment":
			typ = workload.WorkloadType_DEPLOYMENT
		case "ReplicaSet":
			if hash := p.Labels[podTemplateHashLabel]; hash != "" {
				if trimmed, ok := strings.CutSuffix(ref.Name, "-"+hash); ok {
					name, typ = trimmed, workload.WorkloadType_DEPLOYMENT
				}
			}
		case "Job":
			typ = workload.WorkloadType_JOB
			if m := cronJobName.FindStringSubmatch(ref.Name); m != nil {
				name, typ = m[1], workload.WorkloadType_CRONJOB
			}
		case "CronJob":
			typ = workload.WorkloadType_CRONJOB
		}
	}
	if v := p.Labels[workloadNameLabel]; v != "" {
		name = v
	}
	return name, typ
}

// podServices maps each service that selects the pod to its ports here.
func (e *Engine) podServices(k nn, p *corev1.Pod) map[string]*workload.PortList {
	var out map[string]*workload.PortList
	add := func(svc nn) {
		s := e.services[svc]
		if s == nil || !inMesh(s) {
			return
		}
		if out == nil {
			out = map[string]*workload.PortList{}
		}
		out[e.serviceKey(svc)] = podPorts(servicePorts(s), p)
	}
	e.serviceSelectors.choosing(k.ns, p.Labels, add)
	for _, slice := range slices.SortedFunc(maps.Keys(e.slicesTo[k]), nn.compare) {
		s := e.slices[slice]
		key, _ := sliceService(s)
		svc := e.services[key]
		if svc == nil || len(svc.Spec.Selector) > 0 || !inMesh(svc) || !listsReady(s, k, svc) {
			continue
		}
		if out == nil {
			out = map[string]*workload.PortList{}
		}
		// Two slices, one per address family, say the same; the first one counts.
		if name := e.serviceKey(key); out[name] == nil {
			out[name] = slicePorts(s, servicePorts(svc))
		}
	}
	return e.entryServices(k.ns, p.Labels, nil, out)
}

// slicePods yields the pods that are endpoints of a slice. A service without a
// selector (leader election, for one) chooses its pods this way.
func slicePods(s *discoveryv1.EndpointSlice) iter.Seq[nn] {
	return func(yield func(nn) bool) {
		for i := range s.Endpoints {
			ref := s.Endpoints[i].TargetRef
			if ref != nil && ref.Kind == "Pod" && (ref.Namespace == "" || ref.Namespace == s.Namespace) && !yield(nn{s.Namespace, ref.Name}) {
				return
			}
		}
	}
}

// listsReady reports whether a slice has the pod as an endpoint to be used.
func listsReady(s *discoveryv1.EndpointSlice, pod nn, svc *corev1.Service) bool {
	return slices.ContainsFunc(s.Endpoints, func(ep discoveryv1.Endpoint) bool {
		ready := ep.Conditions.Ready == nil || *ep.Conditions.Ready || svc.Spec.PublishNotReadyAddresses
		return ready && ep.TargetRef != nil && ep.TargetRef.Kind == "Pod" && ep.TargetRef.Name == pod.name
	})
}

// podPorts resolves target ports in the pod. A named port the pod does not have
// is left out: the service does not reach this pod there.
func podPorts(ports []servicePort, p *corev1.Pod) *workload.PortList {
	pl := &workload.PortList{}
	for _, sp := range ports {
		target := sp.target
		if sp.named != "" {
			if target = namedPort(p, sp.named); target == 0 {
				continue
			}
		}
		pl.Ports = append(pl.Ports, &workload.Port{ServicePort: sp.port, TargetPort: target, AppProtocol: sp.app})
	}
	return pl
}

func namedPort(p *corev1.Pod, name string) uint32 {
	find := func(c *corev1.Container) uint32 {
		for _, port := range c.Ports {
			if port.Name == name && (port.Protocol == "" || port.Protocol == corev1.ProtocolTCP) && validPort(port.ContainerPort) {
				return uint32(port.ContainerPort)
			}
		}
		return 0
	}
	for i := range p.Spec.Containers {
		if port := find(&p.Spec.Containers[i]); port != 0 {
			return port
		}
	}
	for i := range p.Spec.InitContainers { // restartable ones are native sidecars and serve
		c := &p.Spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			if port := find(c); port != 0 {
				return port
			}
		}
	}
	return 0
}

// sliceService is the service an EndpointSlice belongs to.
func sliceService(s *discoveryv1.EndpointSlice) (nn, bool) {
	name := s.Labels[discoveryv1.LabelServiceName]
	return nn{s.Namespace, name}, name != ""
}

// sliceWorkloads builds the endpoints of a slice that are not pods: addresses
// outside the cluster, or the API server. Pods are known with more detail.
func (e *Engine) sliceWorkloads(k nn) []*workload.Workload {
	s := e.slices[k]
	if s == nil || s.AddressType == discoveryv1.AddressTypeFQDN {
		return nil
	}
	svcKey, ok := sliceService(s)
	svc := e.services[svcKey]
	if !ok || svc == nil || !inMesh(svc) {
		return nil
	}
	ports := slicePorts(s, servicePorts(svc))
	var out []*workload.Workload
	seen := set[netip.Addr]{}
	for _, ep := range s.Endpoints {
		if ep.TargetRef != nil && ep.TargetRef.Kind == "Pod" {
			continue
		}
		addrs := parseAddrs(ep.Addresses)
		if len(addrs) == 0 {
			continue
		}
		a := addrs[0] // more are defined to be fungible, and nobody writes them
		if _, dup := seen[a]; dup {
			continue
		}
		seen[a] = struct{}{}
		w := &workload.Workload{
			Uid:  e.cfg.ClusterID + "/discovery.k8s.io/EndpointSlice/" + k.ns + "/" + k.name + "/" + a.String(),
			Name: k.name, Namespace: k.ns,
			Addresses:   [][]byte{a.AsSlice()},
			Network:     e.set.network,
			TrustDomain: unless(e.set.trustDomain, defaultTrustDomain),
			ClusterId:   unless(e.cfg.ClusterID, defaultCluster),
			Services:    map[string]*workload.PortList{e.serviceKey(svcKey): ports},
		}
		if ep.NodeName != nil {
			w.Node = *ep.NodeName
		}
		if ep.Conditions.Ready != nil && !*ep.Conditions.Ready { // unknown counts as ready
			w.Status = workload.WorkloadStatus_UNHEALTHY
		}
		if isHeadless(svc) {
			extend(w, &ambit.WorkloadExtension{DnsNames: e.appendName(nil, hostnameOf(ep), svcKey)})
		}
		out = append(out, w)
	}
	return out
}

// slicePorts pairs ports by name, as the API defines it.
func slicePorts(s *discoveryv1.EndpointSlice, ports []servicePort) *workload.PortList {
	pl := &workload.PortList{}
	for _, sp := range ports {
		i := slices.IndexFunc(s.Ports, func(p discoveryv1.EndpointPort) bool {
			name := ""
			if p.Name != nil {
				name = *p.Name
			}
			return name == sp.name && p.Port != nil && validPort(*p.Port) && (p.Protocol == nil || *p.Protocol == corev1.ProtocolTCP)
		})
		if i >= 0 {
			pl.Ports = append(pl.Ports, &workload.Port{ServicePort: sp.port, TargetPort: uint32(*s.Ports[i].Port), AppProtocol: sp.app})
		}
	}
	return pl
}
