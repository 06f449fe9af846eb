// Package derive computes what node proxies are served from what the cluster
// contains: pods, services and policies become istio.workload.Address and
// istio.security.Authorization resources, plus a condition per policy.
//
//	dir.Change ─▶ tables ─▶ dirty keys (by indexes) ─▶ recompute ─▶ differs? ─▶ Result
//
// It is pure: no I/O, no clock. Apply is for one goroutine at a time and
// recomputes only what a change can affect; reads (RunsOn, PodByUID, Resources)
// are safe from any goroutine at any time.
package derive

import (
	"github.com/ambit-mesh/ambit/xds/dir"
	"github.com/ambit-mesh/ambit/xds/identity"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
)

// Config is fixed for the life of an Engine. The zero value is usable.
type Config struct {
	ClusterID       string // default Kubernetes
	TrustDomain     string // default cluster.local; the mesh configuration's trustDomain wins
	SystemNamespace string // default ambit-system
	RootNamespace   string // default: what the mesh configuration says, else istio-system when it exists, else SystemNamespace
	ClusterDomain   string // default cluster.local
	Network         string // default network of workloads and services
}

// Name identifies a resource.
type Name struct{ Type, Name string }

// Resource is one resource as it is served. It is immutable.
type Resource struct {
	Type    string // type URL: api.AddressType or api.AuthorizationType
	Name    string
	Aliases []string // network/ip of workloads and services
	Message proto.Message
	Bytes   []byte // Message, marshalled deterministically: equal bytes are equal resources
}

// Condition is the verdict on one object, to be shown as its status.
type Condition struct {
	Kind, Namespace, Name string
	Type                  string // ZtunnelAccepted
	Status                string // True, False
	Reason                string // Accepted, UnsupportedValue, ...
	Message               string
}

// Result is what one Apply changed. Status is the full current list, sorted.
type Result struct {
	Upserts []Resource
	Removes []Name
	Status  []Condition
}

// Engine holds the tables. Create it with New.
type Engine struct{ cfg Config }

// New returns an engine without objects.
func New(cfg Config) *Engine { return &Engine{cfg: cfg} }

// Apply takes a change into account and returns the resources that differ.
func (e *Engine) Apply(c dir.Change) Result { return Result{} }

// Resources returns every current resource of a type, sorted by name.
func (e *Engine) Resources(typeURL string) []Resource { return nil }

// RunsOn reports whether a live pod with this identity runs on the node.
func (e *Engine) RunsOn(node string, id identity.ID) bool { return false }

// PodByUID returns the pod with this metadata.uid. It must not be modified.
func (e *Engine) PodByUID(uid string) (*corev1.Pod, bool) { return nil, false }

// TrustDomain returns the trust domain in force.
func (e *Engine) TrustDomain() string { return e.cfg.TrustDomain }
