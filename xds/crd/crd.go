// Package crd holds the Go shape of the Istio kinds that the control plane
// reads: PeerAuthentication, AuthorizationPolicy, ServiceEntry, WorkloadEntry,
// Telemetry and the mesh configuration, and of the Gateway API Gateway and
// GatewayClass.
//
// The shapes are declarations only. Besides its fields, a type states the values
// an enum accepts (Enum) and the rules its schema cannot express (Validator), so
// that one strict decoder can judge every kind and name the nearest valid value.
// Values are immutable once decoded and may be shared between goroutines.
package crd

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Groups of the kinds.
const (
	SecurityGroup = "security.istio.io"
	MeshGroup     = "mesh.istio.io"
)

// Enum is implemented by string types that accept a closed set of values.
type Enum interface {
	// Values lists what is accepted, in the order users should see it.
	Values() []string
}

// Validator is implemented by kinds with rules beyond the type of each field.
type Validator interface {
	// Validate returns every broken rule; none means valid.
	Validate() []Fault
}

// Fault is a rule that an object breaks.
type Fault struct {
	Path    string // field path, as in spec.rules[0].from[1].source.principals
	Message string // what is wrong
	Hint    string // what to write instead, may be empty
}

// Selector chooses pods by their labels. Nil or empty means no selector.
type Selector struct {
	MatchLabels map[string]string `json:"matchLabels,omitempty"`
}

// Labels returns the labels a pod must carry, nil when everything is chosen.
func (s *Selector) Labels() map[string]string {
	if s == nil {
		return nil
	}
	return s.MatchLabels
}

// Status of an Istio object is written by controllers and never read by us.
type Status map[string]any

// PeerAuthentication says whether plaintext is accepted.
type PeerAuthentication struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   PeerAuthenticationSpec `json:"spec,omitempty"`
	Status Status                 `json:"status,omitempty"`
}

// PeerAuthenticationSpec is security.istio.io PeerAuthentication.
type PeerAuthenticationSpec struct {
	Selector      *Selector        `json:"selector,omitempty"`
	MTLS          *MTLS            `json:"mtls,omitempty"`
	PortLevelMTLS map[uint32]*MTLS `json:"portLevelMtls,omitempty"`
}

// MTLS is one mode setting.
type MTLS struct {
	Mode MTLSMode `json:"mode,omitempty"`
}

// MTLSMode is a mode of PeerAuthentication.
type MTLSMode string

// Modes of PeerAuthentication. Unset inherits from the wider level.
const (
	ModeUnset      MTLSMode = "UNSET"
	ModeDisable    MTLSMode = "DISABLE"
	ModePermissive MTLSMode = "PERMISSIVE"
	ModeStrict     MTLSMode = "STRICT"
)

// Values implements Enum.
func (MTLSMode) Values() []string {
	return []string{string(ModeUnset), string(ModeDisable), string(ModePermissive), string(ModeStrict)}
}

// EffectiveMode is the mode, ModeUnset when nothing is said.
func (m *MTLS) EffectiveMode() MTLSMode {
	if m == nil || m.Mode == "" {
		return ModeUnset
	}
	return m.Mode
}

// AuthorizationPolicy allows or denies connections and requests.
type AuthorizationPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   AuthorizationPolicySpec `json:"spec,omitempty"`
	Status Status                  `json:"status,omitempty"`
}

// AuthorizationPolicySpec is security.istio.io AuthorizationPolicy.
type AuthorizationPolicySpec struct {
	Selector   *Selector         `json:"selector,omitempty"`
	TargetRef  *TargetRef        `json:"targetRef,omitempty"` // deprecated form of TargetRefs
	TargetRefs []*TargetRef      `json:"targetRefs,omitempty"`
	Rules      []*Rule           `json:"rules,omitempty"`
	Action     Action            `json:"action,omitempty"`
	Provider   *ExternalProvider `json:"provider,omitempty"`
}

// TargetRef names the object a policy is attached to.
type TargetRef struct {
	Group     string `json:"group,omitempty"`
	Kind      string `json:"kind,omitempty"`
	Name      string `json:"name,omitempty"`
	Namespace string `json:"namespace,omitempty"`
}

// ExternalProvider names an extension provider of the mesh configuration.
type ExternalProvider struct {
	Name string `json:"name,omitempty"`
}

// Action is what a matching AuthorizationPolicy does.
type Action string

// Actions of AuthorizationPolicy; empty is ALLOW.
const (
	ActionAllow  Action = "ALLOW"
	ActionDeny   Action = "DENY"
	ActionAudit  Action = "AUDIT"
	ActionCustom Action = "CUSTOM"
)

// Values implements Enum.
func (Action) Values() []string {
	return []string{string(ActionAllow), string(ActionDeny), string(ActionAudit), string(ActionCustom)}
}

// Rule matches when one From, one To and every When match.
type Rule struct {
	From []*From      `json:"from,omitempty"`
	To   []*To        `json:"to,omitempty"`
	When []*Condition `json:"when,omitempty"`
}

// From wraps a source.
type From struct {
	Source *Source `json:"source,omitempty"`
}

// To wraps an operation.
type To struct {
	Operation *Operation `json:"operation,omitempty"`
}

// Source says who connects. Fields that are set are ANDed, their values ORed.
type Source struct {
	Principals           []string `json:"principals,omitempty"`
	NotPrincipals        []string `json:"notPrincipals,omitempty"`
	RequestPrincipals    []string `json:"requestPrincipals,omitempty"`
	NotRequestPrincipals []string `json:"notRequestPrincipals,omitempty"`
	Namespaces           []string `json:"namespaces,omitempty"`
	NotNamespaces        []string `json:"notNamespaces,omitempty"`
	ServiceAccounts      []string `json:"serviceAccounts,omitempty"`
	NotServiceAccounts   []string `json:"notServiceAccounts,omitempty"`
	TrustDomains         []string `json:"trustDomains,omitempty"`
	NotTrustDomains      []string `json:"notTrustDomains,omitempty"`
	IPBlocks             []string `json:"ipBlocks,omitempty"`
	NotIPBlocks          []string `json:"notIpBlocks,omitempty"`
	RemoteIPBlocks       []string `json:"remoteIpBlocks,omitempty"`
	NotRemoteIPBlocks    []string `json:"notRemoteIpBlocks,omitempty"`
}

// Operation says what is asked for. Fields that are set are ANDed, their values ORed.
type Operation struct {
	Hosts      []string `json:"hosts,omitempty"`
	NotHosts   []string `json:"notHosts,omitempty"`
	Ports      []string `json:"ports,omitempty"`
	NotPorts   []string `json:"notPorts,omitempty"`
	Methods    []string `json:"methods,omitempty"`
	NotMethods []string `json:"notMethods,omitempty"`
	Paths      []string `json:"paths,omitempty"`
	NotPaths   []string `json:"notPaths,omitempty"`
}

// Condition restricts one attribute.
type Condition struct {
	Key       string   `json:"key,omitempty"`
	Values    []string `json:"values,omitempty"`
	NotValues []string `json:"notValues,omitempty"`
}
