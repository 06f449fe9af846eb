package agent

import (
	"net/netip"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
)

// Labels and annotations, all but the last Istio's.
const (
	labelMode        = "istio.io/dataplane-mode"
	annotationBypass = "ambient.istio.io/bypass-inbound-capture"
	annotationStatus = "sidecar.istio.io/status"
	// annotationNetNS is the pod's namespace path where no container runtime
	// can be asked.
	annotationNetNS = "ambit.dev/netns"
	// annotationMirror is on the pod that stands for a static one: the UID by which
	// kubelet and the runtime know it.
	annotationMirror = "kubernetes.io/config.mirror"

	modeAmbient = "ambient"
	modeNone    = "none"
)

// podOf describes a pod and decides whether it is to be in the mesh.
func podOf(p *corev1.Pod, ns *corev1.Namespace, excluded []string) Pod {
	pod := Pod{
		UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.Spec.ServiceAccountName,
	}
	if pod.ServiceAccount == "" {
		pod.ServiceAccount = "default" // what the API server fills in
	}
	if !p.Spec.HostNetwork {
		pod.NetNS = p.Annotations[annotationNetNS]
	}
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			pod.Addrs = append(pod.Addrs, a.Unmap())
		}
	}
	if a, err := netip.ParseAddr(p.Status.PodIP); err == nil && len(pod.Addrs) == 0 {
		pod.Addrs = append(pod.Addrs, a.Unmap())
	}
	// A value that is no boolean changes nothing.
	pod.BypassInbound, _ = strconv.ParseBool(p.Annotations[annotationBypass])
	pod.annotate(p, ns)
	pod.Enrolled, pod.Why = enrolment(p, ns, excluded)
	own := p.Labels[labelMode] == modeAmbient || p.Labels[labelMode] == modeNone
	pod.Undecided = ns == nil && !own && !slices.Contains(excluded, p.Namespace)
	pod.RuntimeUID = p.Annotations[annotationMirror]
	return pod
}

// enrolment is Istio's rule: the pod's label, or its namespace's if the pod does
// not opt out; some pods never. One without an address waits for it (attachedLocked).
func enrolment(p *corev1.Pod, ns *corev1.Namespace, excluded []string) (bool, string) {
	nsMode := ""
	if ns != nil {
		nsMode = ns.Labels[labelMode]
	}
	podMode := p.Labels[labelMode]
	_, sidecar := p.Annotations[annotationStatus]
	switch {
	case podMode == modeNone:
		return false, "the pod's label " + labelMode + "=none"
	case podMode != modeAmbient && nsMode != modeAmbient:
		return false, "neither the pod nor its namespace has the label " + labelMode + "=ambient"
	case slices.Contains(excluded, p.Namespace):
		return false, "the namespace is excluded"
	case p.Spec.HostNetwork:
		return false, "the pod uses the node's network"
	case sidecar:
		return false, "the pod has a sidecar"
	case p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed:
		return false, "the pod has ended"
	case podMode == modeAmbient:
		return true, "the pod's label " + labelMode + "=ambient"
	default:
		return true, "the namespace's label " + labelMode + "=ambient"
	}
}
