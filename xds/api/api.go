// Package api is the vocabulary on the wire: the .proto files of the workload,
// authorization, certificate, hand-off and discovery protocols, each in a
// folder with its generated Go. `make generate` reproduces the generated files.
//
// Names and field numbers are compatible with Istio ambient, so that each half
// of Ambit runs against the other project's half. A field is never renumbered.
package api

//go:generate go run ./gen

// Type URLs of the resources that node proxies subscribe to.
const (
	AddressType       = "type.googleapis.com/istio.workload.Address"
	AuthorizationType = "type.googleapis.com/istio.security.Authorization"
)

// WorkloadExtension names the extension of istio.workload.Workload that holds
// an ambit.v1.WorkloadExtension; its type URL is WorkloadExtensionType.
const (
	WorkloadExtension     = "ambit.dev/workload"
	WorkloadExtensionType = "type.googleapis.com/ambit.v1.WorkloadExtension"
)

// ServiceExtension names the extension of istio.workload.Service that holds an
// ambit.v1.ServiceExtension; its type URL is ServiceExtensionType.
const (
	ServiceExtension     = "ambit.dev/service"
	ServiceExtensionType = "type.googleapis.com/ambit.v1.ServiceExtension"
)
