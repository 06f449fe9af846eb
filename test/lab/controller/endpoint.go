package controller

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
	"github.com/ambit-mesh/ambit/test/lab/fabric"
)

// endpoints writes the EndpointSlices of Services with a selector.
func (c *Controller) endpoints() error {
	var errs []error
	eachService(c.Store, "", func(s *corev1.Service, want map[string]*discoveryv1.EndpointSlice) {
		for _, e := range cluster.List[*discoveryv1.EndpointSlice](c.Store, s.Namespace) {
			if metav1.IsControlledBy(e, s) && want[e.Name] == nil {
				errs = append(errs, c.Store.Delete(cluster.KeyOf(e)))
			}
		}
		for _, e := range want {
			errs = append(errs, c.Store.Put(e))
		}
	})
	return errors.Join(errs...)
}

// Behind names the Services of a namespace ("" is all) that have no address yet, or
// EndpointSlices that are not those of the pods as they are.
func Behind(store *cluster.Store, namespace string) (out []string) {
	for _, s := range cluster.List[*corev1.Service](store, namespace) {
		if s.Spec.Type != corev1.ServiceTypeExternalName && len(s.Spec.ClusterIPs) == 0 {
			out = append(out, fmt.Sprintf("service %s/%s: has no address yet", s.Namespace, s.Name))
		}
	}
	eachService(store, namespace, func(s *corev1.Service, want map[string]*discoveryv1.EndpointSlice) {
		for _, e := range cluster.List[*discoveryv1.EndpointSlice](store, s.Namespace) {
			if !metav1.IsControlledBy(e, s) {
				continue
			}
			if w := want[e.Name]; w != nil && reflect.DeepEqual(e.Endpoints, w.Endpoints) {
				delete(want, e.Name)
			} else {
				want[e.Name] = e
			}
		}
		if len(want) > 0 {
			out = append(out, fmt.Sprintf("service %s/%s: its endpoints are not those of the pods yet", s.Namespace, s.Name))
		}
	})
	return out
}

// eachService calls f with each Service that has a selector, and the EndpointSlices
// that it ought to have, by name.
func eachService(store *cluster.Store, namespace string, f func(s *corev1.Service, want map[string]*discoveryv1.EndpointSlice)) {
	pods := map[string][]*corev1.Pod{}
	for _, p := range cluster.List[*corev1.Pod](store, namespace) {
		if len(p.Status.PodIPs) > 0 && p.Status.Phase != corev1.PodFailed && p.Status.Phase != corev1.PodSucceeded {
			pods[p.Namespace] = append(pods[p.Namespace], p)
		}
	}
	for _, s := range cluster.List[*corev1.Service](store, namespace) {
		if len(s.Spec.Selector) == 0 || len(s.Spec.IPFamilies) == 0 {
			continue
		}
		want := map[string]*discoveryv1.EndpointSlice{}
		for _, f := range s.Spec.IPFamilies {
			for _, p := range pods[s.Namespace] {
				if contains(p.Labels, s.Spec.Selector) {
					addEndpoint(want, s, p, f)
				}
			}
		}
		f(s, want)
	}
}

// addEndpoint puts a pod into the slice of its family and ports: a named target
// port may differ between the pods of one service.
func addEndpoint(slicesByName map[string]*discoveryv1.EndpointSlice, s *corev1.Service, p *corev1.Pod, f corev1.IPFamily) {
	addr := ""
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil && a.Is6() == (f == corev1.IPv6Protocol) {
			addr = ip.IP
		}
	}
	if addr == "" {
		return
	}
	var ports []discoveryv1.EndpointPort
	var shape strings.Builder
	for _, sp := range s.Spec.Ports {
		target, ok := targetPort(sp, p)
		if !ok {
			continue
		}
		name, proto := sp.Name, cmp.Or(sp.Protocol, corev1.ProtocolTCP)
		ports = append(ports, discoveryv1.EndpointPort{Name: &name, Protocol: &proto, Port: &target, AppProtocol: sp.AppProtocol})
		fmt.Fprintf(&shape, "%s=%d ", sp.Name, target)
	}
	key := s.Name + "-" + strings.ToLower(string(f)) + "-" + short(shape.String())[:5]
	e := slicesByName[key]
	if e == nil {
		labels := map[string]string{discoveryv1.LabelServiceName: s.Name, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io"}
		if s.Spec.ClusterIP == corev1.ClusterIPNone {
			labels["service.kubernetes.io/headless"] = ""
		}
		e = &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: s.Namespace, Name: key, Labels: labels, OwnerReferences: ownerRef(s)},
			AddressType: discoveryv1.AddressType(f), Ports: ports,
		}
		slicesByName[key] = e
	}
	terminating := p.DeletionTimestamp != nil
	serving := Ready(p)
	ready := serving && !terminating || s.Spec.PublishNotReadyAddresses
	ep := discoveryv1.Endpoint{
		Addresses:  []string{addr},
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID},
	}
	if p.Spec.NodeName != "" {
		node := p.Spec.NodeName
		ep.NodeName = &node
	}
	if p.Spec.Hostname != "" && p.Spec.Subdomain == s.Name {
		host := p.Spec.Hostname
		ep.Hostname = &host
	}
	e.Endpoints = append(e.Endpoints, ep)
}

func targetPort(sp corev1.ServicePort, p *corev1.Pod) (int32, bool) {
	if sp.TargetPort.StrVal == "" {
		return cmp.Or(sp.TargetPort.IntVal, sp.Port), true
	}
	for _, c := range p.Spec.Containers {
		for _, cp := range c.Ports {
			if cp.Name == sp.TargetPort.StrVal && cmp.Or(cp.Protocol, corev1.ProtocolTCP) == cmp.Or(sp.Protocol, corev1.ProtocolTCP) {
				return cp.ContainerPort, true
			}
		}
	}
	return 0, false
}

// VIPs lists what the nodes translate: each port of each service address with its
// ready backends.
func VIPs(store *cluster.Store) []fabric.VIP {
	backends := map[string][]netip.AddrPort{} // ns/service/port name/proto/family
	key := func(ns, service, port string, proto corev1.Protocol, six bool) string {
		return fmt.Sprint(ns, "/", service, "/", port, "/", proto, "/", six)
	}
	for _, e := range cluster.List[*discoveryv1.EndpointSlice](store, "") {
		for _, p := range e.Ports {
			if p.Port == nil {
				continue
			}
			name, proto := "", corev1.ProtocolTCP
			if p.Name != nil {
				name = *p.Name
			}
			if p.Protocol != nil {
				proto = *p.Protocol
			}
			k := key(e.Namespace, e.Labels[discoveryv1.LabelServiceName], name, proto, e.AddressType == discoveryv1.AddressTypeIPv6)
			for _, ep := range e.Endpoints {
				if ep.Conditions.Ready != nil && !*ep.Conditions.Ready {
					continue
				}
				for _, addr := range ep.Addresses {
					if a, err := netip.ParseAddr(addr); err == nil {
						backends[k] = append(backends[k], netip.AddrPortFrom(a, uint16(*p.Port)))
					}
				}
			}
		}
	}
	var vips []fabric.VIP
	for _, s := range cluster.List[*corev1.Service](store, "") {
		for _, ip := range s.Spec.ClusterIPs {
			a, err := netip.ParseAddr(ip)
			if err != nil || a == DNSAddr { // "None"; and the DNS answers on every node itself
				continue
			}
			for _, p := range s.Spec.Ports {
				proto := cmp.Or(p.Protocol, corev1.ProtocolTCP)
				if proto == corev1.ProtocolSCTP {
					continue
				}
				b := backends[key(s.Namespace, s.Name, p.Name, proto, a.Is6())]
				slices.SortFunc(b, netip.AddrPort.Compare)
				vips = append(vips, fabric.VIP{Addr: a, Proto: strings.ToLower(string(proto)), Port: uint16(p.Port), Backends: b})
			}
		}
	}
	return vips
}
