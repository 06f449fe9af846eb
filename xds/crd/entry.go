package crd

import (
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NetworkingGroup is the group of ServiceEntry, WorkloadEntry and WorkloadGroup.
const NetworkingGroup = "networking.istio.io"

// ServiceEntry adds services to the mesh that Kubernetes does not know.
type ServiceEntry struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   ServiceEntrySpec `json:"spec,omitempty"`
	Status Status           `json:"status,omitempty"`
}

// ServiceEntrySpec is networking.istio.io ServiceEntry.
type ServiceEntrySpec struct {
	Hosts            []string             `json:"hosts,omitempty"`
	Addresses        []string             `json:"addresses,omitempty"`
	Ports            []*EntryPort         `json:"ports,omitempty"`
	Location         Location             `json:"location,omitempty"`
	Resolution       Resolution           `json:"resolution,omitempty"`
	Endpoints        []*WorkloadEntrySpec `json:"endpoints,omitempty"`
	WorkloadSelector *WorkloadSelector    `json:"workloadSelector,omitempty"`
	ExportTo         []string             `json:"exportTo,omitempty"`
	SubjectAltNames  []string             `json:"subjectAltNames,omitempty"`
}

// EntryPort is a port of a ServiceEntry.
type EntryPort struct {
	Number     uint32 `json:"number,omitempty"`
	Name       string `json:"name,omitempty"`
	Protocol   string `json:"protocol,omitempty"`   // any case; empty is found out per connection
	TargetPort uint32 `json:"targetPort,omitempty"` // 0 is Number
}

// WorkloadSelector chooses pods and WorkloadEntries of the object's namespace.
type WorkloadSelector struct {
	Labels map[string]string `json:"labels,omitempty"`
}

// Chosen returns the labels a workload must carry; none chooses nothing.
func (s *WorkloadSelector) Chosen() map[string]string {
	if s == nil {
		return nil
	}
	return s.Labels
}

// Location says whether the service is part of the mesh. Node proxies need not
// know: whether an endpoint is reached through a tunnel is the endpoint's say.
type Location string

// Locations of ServiceEntry; empty is MESH_EXTERNAL.
const (
	LocationExternal Location = "MESH_EXTERNAL"
	LocationInternal Location = "MESH_INTERNAL"
)

// Values implements Enum.
func (Location) Values() []string {
	return []string{string(LocationExternal), string(LocationInternal)}
}

// Resolution is how a client finds the endpoints of a ServiceEntry.
type Resolution string

// Resolutions of ServiceEntry; empty is NONE.
const (
	ResolutionNone       Resolution = "NONE"            // the address that the client asked for
	ResolutionStatic     Resolution = "STATIC"          // the addresses of the endpoints
	ResolutionDNS        Resolution = "DNS"             // the host names of the endpoints
	ResolutionRoundRobin Resolution = "DNS_ROUND_ROBIN" // as DNS, at most one endpoint
	ResolutionDynamic    Resolution = "DYNAMIC_DNS"     // the host name of each request, at a waypoint
)

// Values implements Enum.
func (Resolution) Values() []string {
	return []string{string(ResolutionNone), string(ResolutionStatic), string(ResolutionDNS), string(ResolutionRoundRobin), string(ResolutionDynamic)}
}

// ByName reports whether host names of endpoints are resolved.
func (r Resolution) ByName() bool { return r == ResolutionDNS || r == ResolutionRoundRobin }

// EffectiveResolution is the resolution with its default.
func (s *ServiceEntrySpec) EffectiveResolution() Resolution {
	if s.Resolution == "" {
		return ResolutionNone
	}
	return s.Resolution
}

// HostNames lists the hosts as they are compared: lower case, without a final dot.
func (s *ServiceEntrySpec) HostNames() []string {
	out := make([]string, len(s.Hosts))
	for i, h := range s.Hosts {
		out[i] = HostName(h)
	}
	return out
}

// HostName spells a host name as it is compared.
func HostName(h string) string { return strings.ToLower(strings.TrimSuffix(h, ".")) }

// Wildcard reports whether a host stands for many.
func Wildcard(host string) bool { return strings.HasPrefix(host, "*") }

// WorkloadEntry is a workload that is no pod, such as a virtual machine.
type WorkloadEntry struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   WorkloadEntrySpec `json:"spec,omitempty"`
	Status Status            `json:"status,omitempty"`
}

// WorkloadEntrySpec is networking.istio.io WorkloadEntry, and an endpoint of a
// ServiceEntry.
type WorkloadEntrySpec struct {
	Address        string            `json:"address,omitempty"`
	Ports          map[string]uint32 `json:"ports,omitempty"` // by the name of the service's port
	Labels         map[string]string `json:"labels,omitempty"`
	Network        string            `json:"network,omitempty"`
	Locality       string            `json:"locality,omitempty"` // region/zone/subzone
	Weight         uint32            `json:"weight,omitempty"`   // 0 is 1
	ServiceAccount string            `json:"serviceAccount,omitempty"`
}

// WorkloadGroup is the pattern after which virtual machines register themselves.
type WorkloadGroup struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   WorkloadGroupSpec `json:"spec,omitempty"`
	Status Status            `json:"status,omitempty"`
}

// WorkloadGroupSpec is networking.istio.io WorkloadGroup.
type WorkloadGroupSpec struct {
	Metadata *GroupMetadata     `json:"metadata,omitempty"`
	Template *WorkloadEntrySpec `json:"template,omitempty"`
	Probe    *Probe             `json:"probe,omitempty"`
}

// GroupMetadata is put on every WorkloadEntry of the group.
type GroupMetadata struct {
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Probe is how the health of a group's workloads is checked.
type Probe struct {
	InitialDelaySeconds int32      `json:"initialDelaySeconds,omitempty"`
	TimeoutSeconds      int32      `json:"timeoutSeconds,omitempty"`
	PeriodSeconds       int32      `json:"periodSeconds,omitempty"`
	SuccessThreshold    int32      `json:"successThreshold,omitempty"`
	FailureThreshold    int32      `json:"failureThreshold,omitempty"`
	HTTPGet             *HTTPProbe `json:"httpGet,omitempty"`
	TCPSocket           *TCPProbe  `json:"tcpSocket,omitempty"`
	Exec                *ExecProbe `json:"exec,omitempty"`
	GRPC                *GRPCProbe `json:"grpc,omitempty"`
}

// HTTPProbe asks for a page.
type HTTPProbe struct {
	Path        string         `json:"path,omitempty"`
	Port        uint32         `json:"port,omitempty"`
	Host        string         `json:"host,omitempty"`
	Scheme      string         `json:"scheme,omitempty"`
	HTTPHeaders []*ProbeHeader `json:"httpHeaders,omitempty"`
}

// ProbeHeader is a header of an HTTPProbe.
type ProbeHeader struct {
	Name  string `json:"name,omitempty"`
	Value string `json:"value,omitempty"`
}

// TCPProbe connects.
type TCPProbe struct {
	Host string `json:"host,omitempty"`
	Port uint32 `json:"port,omitempty"`
}

// ExecProbe runs a command.
type ExecProbe struct {
	Command []string `json:"command,omitempty"`
}

// GRPCProbe asks the health service.
type GRPCProbe struct {
	Port    uint32 `json:"port,omitempty"`
	Service string `json:"service,omitempty"`
}
