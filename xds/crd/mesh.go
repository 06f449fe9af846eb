package crd

import (
	"reflect"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// MeshConfigKind is the kind under which the directory source reports the key
// `mesh` of a ConfigMap named `istio`; it exists in no cluster.
const MeshConfigKind = "MeshConfig"

// MeshConfig is the mesh-wide configuration. Keys with a Go type of their own are
// enforced; keys of type any are known and accepted, but change nothing in this
// build (Unenforced lists those that are set). Any other key is a mistake.
type MeshConfig struct {
	TrustDomain        string   `json:"trustDomain,omitempty"`
	TrustDomainAliases []string `json:"trustDomainAliases,omitempty"`
	RootNamespace      string   `json:"rootNamespace,omitempty"`
	// SameNode is ours: how workloads of one node reach each other.
	SameNode SameNode `json:"sameNode,omitempty"`

	AccessLogEncoding              any `json:"accessLogEncoding,omitempty"`
	AccessLogFile                  any `json:"accessLogFile,omitempty"`
	AccessLogFormat                any `json:"accessLogFormat,omitempty"`
	CA                             any `json:"ca,omitempty"`
	CACertificates                 any `json:"caCertificates,omitempty"`
	Certificates                   any `json:"certificates,omitempty"`
	ConfigSources                  any `json:"configSources,omitempty"`
	ConnectTimeout                 any `json:"connectTimeout,omitempty"`
	DefaultConfig                  any `json:"defaultConfig,omitempty"`
	DefaultDestinationRuleExportTo any `json:"defaultDestinationRuleExportTo,omitempty"`
	DefaultHTTPRetryPolicy         any `json:"defaultHttpRetryPolicy,omitempty"`
	DefaultProviders               any `json:"defaultProviders,omitempty"`
	DefaultServiceExportTo         any `json:"defaultServiceExportTo,omitempty"`
	DefaultTrafficPolicy           any `json:"defaultTrafficPolicy,omitempty"`
	DefaultVirtualServiceExportTo  any `json:"defaultVirtualServiceExportTo,omitempty"`
	DisableEnvoyListenerLog        any `json:"disableEnvoyListenerLog,omitempty"`
	DiscoverySelectors             any `json:"discoverySelectors,omitempty"`
	DNSRefreshRate                 any `json:"dnsRefreshRate,omitempty"`
	EnableAutoMTLS                 any `json:"enableAutoMtls,omitempty"`
	EnableEnvoyAccessLogService    any `json:"enableEnvoyAccessLogService,omitempty"`
	EnablePrometheusMerge          any `json:"enablePrometheusMerge,omitempty"`
	EnableTracing                  any `json:"enableTracing,omitempty"`
	ExtensionProviders             any `json:"extensionProviders,omitempty"`
	H2UpgradePolicy                any `json:"h2UpgradePolicy,omitempty"`
	HboneIdleTimeout               any `json:"hboneIdleTimeout,omitempty"`
	InboundClusterStatName         any `json:"inboundClusterStatName,omitempty"`
	InboundTrafficPolicy           any `json:"inboundTrafficPolicy,omitempty"`
	IngressClass                   any `json:"ingressClass,omitempty"`
	IngressControllerMode          any `json:"ingressControllerMode,omitempty"`
	IngressSelector                any `json:"ingressSelector,omitempty"`
	IngressService                 any `json:"ingressService,omitempty"`
	LocalityLBSetting              any `json:"localityLbSetting,omitempty"`
	MeshMTLS                       any `json:"meshMTLS,omitempty"`
	OutboundClusterStatName        any `json:"outboundClusterStatName,omitempty"`
	OutboundTrafficPolicy          any `json:"outboundTrafficPolicy,omitempty"`
	PathNormalization              any `json:"pathNormalization,omitempty"`
	ProtocolDetectionTimeout       any `json:"protocolDetectionTimeout,omitempty"`
	ProxyHTTPPort                  any `json:"proxyHttpPort,omitempty"`
	ProxyInboundListenPort         any `json:"proxyInboundListenPort,omitempty"`
	ProxyListenPort                any `json:"proxyListenPort,omitempty"`
	ServiceEntryVisibility         any `json:"serviceEntryVisibility,omitempty"`
	ServiceScopeConfigs            any `json:"serviceScopeConfigs,omitempty"`
	ServiceSettings                any `json:"serviceSettings,omitempty"`
	TCPKeepalive                   any `json:"tcpKeepalive,omitempty"`
	TLSDefaults                    any `json:"tlsDefaults,omitempty"`
	VerifyCertificateAtClient      any `json:"verifyCertificateAtClient,omitempty"`
	ZoneAwareLBSetting             any `json:"zoneAwareLbSetting,omitempty"`
}

// SameNode is how a client reaches a workload on its own node.
type SameNode string

// Values of SameNode; empty follows the workload's PeerAuthentication.
const (
	SameNodeHBONE SameNode = "hbone"
	SameNodeLocal SameNode = "local"
)

// Values implements Enum.
func (SameNode) Values() []string { return []string{string(SameNodeHBONE), string(SameNodeLocal)} }

// Mesh is a MeshConfig with the object it came from.
type Mesh struct {
	metav1.ObjectMeta
	Config MeshConfig
}

// Unenforced lists the keys that are set and change nothing in this build.
func (m *MeshConfig) Unenforced() []string {
	var keys []string
	v := reflect.ValueOf(m).Elem()
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.Interface && !f.IsNil() {
			name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
			keys = append(keys, name)
		}
	}
	return keys
}
