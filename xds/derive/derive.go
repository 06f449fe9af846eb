// Package derive computes what node proxies are served from what the cluster
// contains: pods, services, entries, Gateways and policies become
// istio.workload.Address and istio.security.Authorization resources, and whatever
// of an object is not in force as it is written becomes a condition on it.
//
//	dir.Change ─▶ tables ─▶ dirty keys (by indexes) ─▶ recompute ─▶ differs? ─▶ Result
//
// It is pure: no I/O, no clock. Apply is for one goroutine at a time and
// recomputes only what a change can affect. Reads are safe from any goroutine at
// any time; those that certificates depend on (RunsOn, Pod, TrustDomain) and
// Status do not wait for an Apply under way.
package derive

import (
	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/crd"
)

// Config is fixed for the life of an Engine. The zero value is usable.
type Config struct {
	ClusterID       string // default Kubernetes
	TrustDomain     string // default cluster.local; the mesh configuration's trustDomain wins
	SystemNamespace string // default ambit-system
	// RootNamespace holds mesh-wide policy. Default: what the mesh configuration
	// says, else both SystemNamespace and istio-system, so that an Istio user's
	// mesh-wide policies hold unchanged.
	RootNamespace string
	ClusterDomain string // default cluster.local
	Network       string // default network of workloads and services
	// SameNode is how workloads of one node reach each other unless the mesh
	// configuration, a namespace or a pod says otherwise. Default: local for
	// workloads that accept plaintext, hbone for others.
	SameNode crd.SameNode
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
	Type                  string // ConditionAccepted or ConditionWaypoint
	Status                string // True, False
	Reason                string // one of the Reason constants
	Message               string // what differs from what was written, "" when nothing does
}

// Result is what one Apply changed. Status is the full current list, sorted.
type Result struct {
	Upserts []Resource
	Removes []Name
	Status  []Condition
}
