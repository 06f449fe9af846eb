package dir

import (
	"reflect"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/ambit-mesh/ambit/xds/crd"
)

// use says what becomes of the objects of a kind.
type use int

const (
	enforced   use = iota // reported as Upserts
	irrelevant            // accepted silently: the mesh does not need it
	unenforced            // accepted and counted: a later build enforces it
)

// kindInfo is one kind that users may put into a directory.
type kindInfo struct {
	group    string
	versions []string
	kind     string
	cluster  bool         // not in a namespace
	typ      reflect.Type // nil: only apiVersion, kind and metadata are checked
	use      use
}

// name is what the kind is called in Change.Unenforced; two kinds are called Gateway.
func (k *kindInfo) name() string {
	if k.kind == "Gateway" {
		return k.kind + "." + k.group
	}
	return k.kind
}

func typed[T any](group, version, kind string, u use) kindInfo {
	return kindInfo{group: group, versions: []string{version}, kind: kind, typ: reflect.TypeFor[T](), use: u}
}

func atCluster(k kindInfo) kindInfo { k.cluster = true; return k }

func names(group string, versions []string, u use, kinds ...string) []kindInfo {
	var out []kindInfo
	for _, kind := range kinds {
		out = append(out, kindInfo{group: group, versions: versions, kind: kind, use: u})
	}
	return out
}

func clusterNames(group string, versions []string, u use, kinds ...string) []kindInfo {
	out := names(group, versions, u, kinds...)
	for i := range out {
		out[i].cluster = true
	}
	return out
}

var (
	v1            = []string{"v1"}
	istioVersions = []string{"v1", "v1beta1", "v1alpha3"}

	gatewayVersions = []string{"v1", "v1beta1"}
)

// kinds is every kind that is known, with the newest version first.
var kinds = slices.Concat(
	[]kindInfo{
		atCluster(typed[corev1.Namespace]("", "v1", "Namespace", enforced)),
		atCluster(typed[corev1.Node]("", "v1", "Node", enforced)),
		typed[corev1.Pod]("", "v1", "Pod", enforced),
		typed[corev1.Service]("", "v1", "Service", enforced),
		typed[corev1.ServiceAccount]("", "v1", "ServiceAccount", enforced),
		typed[discoveryv1.EndpointSlice]("discovery.k8s.io", "v1", "EndpointSlice", enforced),
		{group: crd.SecurityGroup, versions: []string{"v1", "v1beta1"}, kind: "PeerAuthentication", typ: reflect.TypeFor[crd.PeerAuthentication](), use: enforced},
		{group: crd.SecurityGroup, versions: []string{"v1", "v1beta1"}, kind: "AuthorizationPolicy", typ: reflect.TypeFor[crd.AuthorizationPolicy](), use: enforced},
		{group: crd.NetworkingGroup, versions: istioVersions, kind: "ServiceEntry", typ: reflect.TypeFor[crd.ServiceEntry](), use: enforced},
		{group: crd.NetworkingGroup, versions: istioVersions, kind: "WorkloadEntry", typ: reflect.TypeFor[crd.WorkloadEntry](), use: enforced},
		// Machines register themselves with a control plane that offers it; ours does not.
		{group: crd.NetworkingGroup, versions: istioVersions, kind: "WorkloadGroup", typ: reflect.TypeFor[crd.WorkloadGroup](), use: unenforced},

		{group: crd.TelemetryGroup, versions: []string{"v1", "v1alpha1"}, kind: "Telemetry", typ: reflect.TypeFor[crd.Telemetry](), use: enforced},
		{group: crd.GatewayGroup, versions: gatewayVersions, kind: "Gateway", typ: reflect.TypeFor[crd.Gateway](), use: enforced},
		atCluster(kindInfo{group: crd.GatewayGroup, versions: gatewayVersions, kind: "GatewayClass", typ: reflect.TypeFor[crd.GatewayClass](), use: enforced}),

		typed[corev1.ConfigMap]("", "v1", "ConfigMap", irrelevant), // but for the mesh configuration, see document.go
		typed[corev1.Secret]("", "v1", "Secret", irrelevant),
		typed[corev1.ReplicationController]("", "v1", "ReplicationController", irrelevant),
		typed[corev1.PersistentVolumeClaim]("", "v1", "PersistentVolumeClaim", irrelevant),
		typed[corev1.LimitRange]("", "v1", "LimitRange", irrelevant),
		typed[corev1.ResourceQuota]("", "v1", "ResourceQuota", irrelevant),
		typed[corev1.Event]("", "v1", "Event", irrelevant),
		atCluster(typed[corev1.PersistentVolume]("", "v1", "PersistentVolume", irrelevant)),
		typed[appsv1.Deployment]("apps", "v1", "Deployment", irrelevant),
		typed[appsv1.StatefulSet]("apps", "v1", "StatefulSet", irrelevant),
		typed[appsv1.DaemonSet]("apps", "v1", "DaemonSet", irrelevant),
		typed[appsv1.ReplicaSet]("apps", "v1", "ReplicaSet", irrelevant),
		typed[appsv1.ControllerRevision]("apps", "v1", "ControllerRevision", irrelevant),
		typed[batchv1.Job]("batch", "v1", "Job", irrelevant),
		typed[batchv1.CronJob]("batch", "v1", "CronJob", irrelevant),
	},
	names("", v1, irrelevant, "Endpoints"), // deprecated, but still in people's files
	names("rbac.authorization.k8s.io", v1, irrelevant, "Role", "RoleBinding"),
	clusterNames("rbac.authorization.k8s.io", v1, irrelevant, "ClusterRole", "ClusterRoleBinding"),
	names("networking.k8s.io", v1, irrelevant, "NetworkPolicy", "Ingress"),
	clusterNames("networking.k8s.io", v1, irrelevant, "IngressClass", "IPAddress", "ServiceCIDR"),
	names("autoscaling", []string{"v2", "v1"}, irrelevant, "HorizontalPodAutoscaler"),
	names("policy", v1, irrelevant, "PodDisruptionBudget"),
	names("coordination.k8s.io", v1, irrelevant, "Lease"),
	names("events.k8s.io", v1, irrelevant, "Event"),
	clusterNames("storage.k8s.io", v1, irrelevant, "StorageClass", "CSIDriver"),
	clusterNames("scheduling.k8s.io", v1, irrelevant, "PriorityClass"),
	clusterNames("node.k8s.io", v1, irrelevant, "RuntimeClass"),
	clusterNames("apiextensions.k8s.io", v1, irrelevant, "CustomResourceDefinition"),
	clusterNames("admissionregistration.k8s.io", v1, irrelevant, "ValidatingWebhookConfiguration", "MutatingWebhookConfiguration", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"),
	clusterNames("apiregistration.k8s.io", v1, irrelevant, "APIService"),
	names("monitoring.coreos.com", v1, irrelevant, "ServiceMonitor", "PodMonitor", "PrometheusRule"),

	names(crd.NetworkingGroup, istioVersions, unenforced, "VirtualService", "DestinationRule", "Gateway", "Sidecar", "EnvoyFilter", "ProxyConfig"),
	names(crd.SecurityGroup, []string{"v1", "v1beta1"}, unenforced, "RequestAuthentication"),
	names("extensions.istio.io", []string{"v1alpha1"}, unenforced, "WasmPlugin", "TrafficExtension"),
	names(crd.GatewayGroup, []string{"v1", "v1beta1", "v1alpha2", "v1alpha3"}, unenforced, "HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute", "UDPRoute", "ReferenceGrant", "BackendTLSPolicy", "ListenerSet"),
	names("gateway.networking.x-k8s.io", []string{"v1alpha1"}, unenforced, "XBackendTrafficPolicy", "XListenerSet", "XMesh"),
	names("inference.networking.k8s.io", v1, unenforced, "InferencePool"),
)

// findKind returns the kind, or what the user may have meant.
func findKind(gvk schema.GroupVersionKind) (k *kindInfo, problem, hint string) {
	var sameKind *kindInfo
	var all []string
	for i := range kinds {
		k := &kinds[i]
		all = append(all, k.kind)
		if k.kind != gvk.Kind {
			continue
		}
		if k.group == gvk.Group {
			if slices.Contains(k.versions, gvk.Version) {
				return k, "", ""
			}
			sameKind = k
		} else if sameKind == nil {
			sameKind = k
		}
	}
	apiVersion := gvk.GroupVersion().String()
	if sameKind != nil {
		want := schema.GroupVersion{Group: sameKind.group, Version: sameKind.versions[0]}
		return nil, "unknown apiVersion \"" + apiVersion + "\" of kind " + gvk.Kind, "did you mean \"" + want.String() + "\"?"
	}
	return nil, "unknown kind \"" + gvk.Kind + "\" in \"" + apiVersion + "\"", didYouMean(gvk.Kind, all)
}

// kubeEnums are the closed sets of values that Go types of Kubernetes leave open
// and the API server checks.
var kubeEnums = map[reflect.Type][]string{
	reflect.TypeFor[corev1.Protocol]():                     {"TCP", "UDP", "SCTP"},
	reflect.TypeFor[corev1.ServiceType]():                  {"ClusterIP", "NodePort", "LoadBalancer", "ExternalName"},
	reflect.TypeFor[corev1.ServiceAffinity]():              {"None", "ClientIP"},
	reflect.TypeFor[corev1.ServiceInternalTrafficPolicy](): {"Cluster", "Local"},
	reflect.TypeFor[corev1.ServiceExternalTrafficPolicy](): {"Cluster", "Local"},
	reflect.TypeFor[corev1.IPFamily]():                     {"IPv4", "IPv6"},
	reflect.TypeFor[corev1.IPFamilyPolicy]():               {"SingleStack", "PreferDualStack", "RequireDualStack"},
	reflect.TypeFor[corev1.PodPhase]():                     {"Pending", "Running", "Succeeded", "Failed", "Unknown"},
	reflect.TypeFor[corev1.RestartPolicy]():                {"Always", "OnFailure", "Never"},
	reflect.TypeFor[corev1.DNSPolicy]():                    {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
	reflect.TypeFor[corev1.ConditionStatus]():              {"True", "False", "Unknown"},
	reflect.TypeFor[corev1.PullPolicy]():                   {"Always", "IfNotPresent", "Never"},
	reflect.TypeFor[corev1.URIScheme]():                    {"HTTP", "HTTPS"},
	reflect.TypeFor[corev1.NamespacePhase]():               {"Active", "Terminating"},
	reflect.TypeFor[corev1.TaintEffect]():                  {"NoSchedule", "PreferNoSchedule", "NoExecute"},
	reflect.TypeFor[corev1.TolerationOperator]():           {"Exists", "Equal", "Lt", "Gt"},
	reflect.TypeFor[corev1.TerminationMessagePolicy]():     {"File", "FallbackToLogsOnError"},
	reflect.TypeFor[corev1.MountPropagationMode]():         {"None", "HostToContainer", "Bidirectional"},
	reflect.TypeFor[corev1.NodeSelectorOperator]():         {"In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"},
	reflect.TypeFor[discoveryv1.AddressType]():             {"IPv4", "IPv6", "FQDN"},
}
