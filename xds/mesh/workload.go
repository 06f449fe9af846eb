package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// Hostname names a service: the namespace that defines it and its FQDN.
type Hostname struct{ Namespace, Name string }

// String is "namespace/host", the resource name of the service.
func (h Hostname) String() string { return h.Namespace + "/" + h.Name }

// IsZero reports whether no service is named.
func (h Hostname) IsZero() bool { return h == Hostname{} }

// ParseHostname parses "namespace/host".
func ParseHostname(s string) (Hostname, error) {
	ns, host, ok := strings.Cut(s, "/")
	if !ok || ns == "" || host == "" || strings.Contains(host, "/") {
		return Hostname{}, fmt.Errorf("parse hostname %q: is not namespace/host", s)
	}
	return Hostname{ns, host}, nil
}

// NetAddr is an address within a network; networks may overlap.
type NetAddr struct {
	Network string
	Addr    netip.Addr
}

// String is "network/address", an alias of the resource.
func (a NetAddr) String() string { return a.Network + "/" + a.Addr.String() }

// NetPrefix is a range of VIPs within a network.
type NetPrefix struct {
	Network string
	Prefix  netip.Prefix
}

// GatewayAddress is where a waypoint or a network gateway is: either Host or
// Addr (with its Network) is set.
type GatewayAddress struct {
	Host      Hostname
	Network   string
	Addr      netip.Addr
	HBONEPort uint16
}

// Locality is where a workload runs.
type Locality struct{ Region, Zone, Subzone string }

// Port maps a service port to a port of the endpoint; Target 0 is "taken from
// elsewhere".
type Port struct {
	Service, Target uint16
	App             workload.AppProtocol
}

// ApplicationTunnel says what precedes the bytes sent to the application.
type ApplicationTunnel struct {
	Protocol workload.ApplicationTunnel_Protocol
	Port     uint16
}

// Extension is configuration that only some proxies understand.
type Extension struct {
	Name, TypeURL string
	Value         []byte
}

// Workload is one thing with addresses and an identity. It is immutable.
type Workload struct {
	UID, Name, Node string
	WorkloadName    string // of what made it, which of a pod on its own is its name
	Addrs           []netip.Addr
	DNSNames        []string // lower case, without the final dot; from our own extension
	// Source is the digest of what the workload was decoded from, if whoever decoded it cares: nothing that it says.
	Source [2]uint64
	*Traits
}

// Traits are what the replicas of a workload have in common. They are immutable.
type Traits struct {
	Namespace, ServiceAccount, TrustDomain string
	Network, ClusterID                     string
	Identity                               identity.ID

	Hostname string // resolved by the proxy when there is no address

	Tunnel       workload.TunnelProtocol
	NetworkMode  workload.NetworkMode
	WorkloadType workload.WorkloadType
	Capacity     uint32
	NativeTunnel bool
	Healthy      bool

	CanonicalName, CanonicalRevision string

	Policies []string // "namespace/name", sorted
	Locality Locality

	Services       map[Hostname][]Port
	Waypoint       *GatewayAddress
	NetworkGateway *GatewayAddress
	AppTunnel      *ApplicationTunnel

	// From our own extension; zero under other control planes.
	SameNode    ambit.WorkloadExtension_SameNode
	AccessLog   ambit.WorkloadExtension_AccessLog
	Terminating bool
	StrictBy    string // the PeerAuthentication, "namespace/name", that refuses plaintext on every port
}

// Adopt makes w, which nobody else has seen yet, use another copy of its uid, and of its names where that ends with
// them, as those of pods do.
func (w *Workload) Adopt(uid string) {
	if uid != w.UID {
		return
	}
	w.UID = uid
	for _, name := range []*string{&w.Name, &w.WorkloadName} {
		if strings.HasSuffix(uid, *name) {
			*name = uid[len(uid)-len(*name):]
		}
	}
}

// Copy is a workload that says the same and may still be changed.
func (w *Workload) Copy() *Workload {
	c, t := *w, *w.Traits
	c.Traits = &t
	return &c
}

// HasAddr reports whether a is one of the workload's addresses.
func (w *Workload) HasAddr(a netip.Addr) bool {
	for _, have := range w.Addrs {
		if have == a {
			return true
		}
	}
	return false
}

// indexedByAddr: the address of a host-network workload is the node's and
// says nothing about which workload is meant.
func (w *Workload) indexedByAddr() bool { return w.NetworkMode != workload.NetworkMode_HOST_NETWORK }

// betterAt reports whether w rather than o is meant by an address that both
// have: a pod, then one that speaks HBONE.
func (w *Workload) betterAt(o *Workload) bool {
	if a, b := w.IsPod(), o.IsPod(); a != b {
		return a
	}
	if a, b := w.Tunnel == workload.TunnelProtocol_HBONE, o.Tunnel == workload.TunnelProtocol_HBONE; a != b {
		return a
	}
	return w.UID < o.UID
}

// IsPod reports whether w is a pod and not what somebody wrote down as a workload.
func (w *Workload) IsPod() bool { return w != nil && strings.Contains(w.UID, "//Pod/") }

// Service is a set of addresses and ports that a client may connect to. It is
// immutable.
type Service struct {
	Name, Namespace string
	Host            Hostname
	VIPs            []NetAddr
	CIDRs           []NetPrefix
	Ports           []Port
	SANs            []identity.ID // accepted besides the endpoint's identity

	Waypoint           *GatewayAddress
	WeightedWaypoints  []WeightedWaypoint
	IngressUseWaypoint bool

	Mode           workload.LoadBalancing_Mode
	Preference     []Scope
	AllowUnhealthy bool
	Families       workload.IPFamilies
	Canonical      bool
	Visibility     workload.Service_Visibility
	Extensions     []Extension
	PortNames      []PortName // from our own extension; none under other control planes
}

// Scope is one level of a routing preference.
type Scope = workload.LoadBalancing_Scope

// WeightedWaypoint is one of several waypoints drawn by weight.
type WeightedWaypoint struct {
	Gateway GatewayAddress
	Weight  uint32
}

// Port returns the service's port with the given number.
func (s *Service) Port(number uint16) (Port, bool) {
	for _, p := range s.Ports {
		if p.Service == number {
			return p, true
		}
	}
	return Port{}, false
}

// HasVIP reports whether the address belongs to the service, also by a range.
func (s *Service) HasVIP(network string, a netip.Addr) bool {
	a = a.Unmap()
	for _, v := range s.VIPs {
		if v.Addr == a && v.Network == network {
			return true
		}
	}
	for _, c := range s.CIDRs {
		if c.Network == network && c.Prefix.Contains(a) {
			return true
		}
	}
	return false
}

// VisibleTo reports whether clients of a namespace may use the service.
func (s *Service) VisibleTo(clientNS string) bool {
	return s.Visibility != workload.Service_NAMESPACE || s.Namespace == clientNS
}

var errAddrLen = errors.New("is not 4 or 16 bytes")
