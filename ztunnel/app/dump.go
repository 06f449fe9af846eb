package app

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/security"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/policy"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

// The dump has the reference's shape, which its command line tool reads: its key
// names, its spelling of values, and its choice of what is left out when empty.
// What only we have comes on top. test/interop compares both.
type dump struct {
	Workloads      []dumpWorkload          `json:"workloads"`
	Services       []dumpService           `json:"services"`
	Policies       []dumpPolicy            `json:"policies"`
	StagedServices map[string]any          `json:"stagedServices"`
	StaticConfig   dumpStatic              `json:"staticConfig"`
	Version        boot.Build              `json:"version"`
	Config         map[string]string       `json:"config"`
	Certificates   []dumpCertificate       `json:"certificates"`
	WorkloadState  map[string]dumpPodState `json:"workloadState"`
	Generation     uint64                  `json:"generation"`
}

// dumpStatic is what a proxy was given without a control plane.
type dumpStatic struct {
	Workloads []dumpWorkload `json:"workloads"`
	Policies  []dumpPolicy   `json:"policies"`
	Services  []dumpService  `json:"services"`
}

type dumpWorkload struct {
	IPs               []string      `json:"workloadIps"`
	Waypoint          *dumpGateway  `json:"waypoint,omitempty"`
	NetworkGateway    *dumpGateway  `json:"networkGateway,omitempty"`
	Protocol          string        `json:"protocol"`
	NetworkMode       string        `json:"networkMode"`
	UID               string        `json:"uid,omitempty"`
	Name              string        `json:"name"`
	Namespace         string        `json:"namespace"`
	TrustDomain       string        `json:"trustDomain,omitempty"`
	ServiceAccount    string        `json:"serviceAccount,omitempty"`
	Network           string        `json:"network,omitempty"`
	WorkloadName      string        `json:"workloadName,omitempty"`
	WorkloadType      string        `json:"workloadType,omitempty"`
	CanonicalName     string        `json:"canonicalName,omitempty"`
	CanonicalRevision string        `json:"canonicalRevision,omitempty"`
	Hostname          string        `json:"hostname,omitempty"`
	Node              string        `json:"node,omitempty"`
	NativeTunnel      bool          `json:"nativeTunnel,omitempty"`
	AppTunnel         *dumpTunnel   `json:"applicationTunnel,omitempty"`
	Policies          []string      `json:"authorizationPolicies,omitempty"`
	Status            string        `json:"status"`
	ClusterID         string        `json:"clusterId"`
	Locality          *dumpLocality `json:"locality,omitempty"`
	Services          []string      `json:"services,omitempty"`
	Capacity          uint32        `json:"capacity"`
	Terminating       bool          `json:"terminating,omitempty"`
}

type dumpLocality struct {
	Region  string `json:"region"`
	Zone    string `json:"zone"`
	Subzone string `json:"subzone"`
}

type dumpTunnel struct {
	Protocol string  `json:"protocol"`
	Port     *uint16 `json:"port"`
}

type dumpGateway struct {
	Destination string `json:"destination"`
	Port        uint16 `json:"hboneMtlsPort"`
}

type dumpService struct {
	Name              string                  `json:"name"`
	Namespace         string                  `json:"namespace"`
	Hostname          string                  `json:"hostname"`
	VIPs              []string                `json:"vips"`
	CIDRs             []string                `json:"cidrVips,omitempty"`
	Ports             map[string]uint16       `json:"ports"`
	Endpoints         map[string]dumpEndpoint `json:"endpoints"`
	SANs              []string                `json:"subjectAltNames"`
	Waypoint          *dumpGateway            `json:"waypoint,omitempty"`
	WeightedWaypoints []dumpWeighted          `json:"weightedWaypoints,omitempty"`
	LoadBalancer      *dumpBalancer           `json:"loadBalancer,omitempty"`
	IPFamilies        string                  `json:"ipFamilies,omitempty"`
	Canonical         bool                    `json:"canonical"`
	Visibility        string                  `json:"visibility"`
}

type dumpWeighted struct {
	Destination *dumpGateway `json:"destination"`
	Weight      uint32       `json:"weight"`
}

type dumpBalancer struct {
	Preferences []string `json:"routingPreferences"`
	Mode        string   `json:"mode"`
	Health      string   `json:"healthPolicy"`
}

type dumpEndpoint struct {
	WorkloadUID string            `json:"workloadUid"`
	Port        map[string]uint16 `json:"port"`
	Status      string            `json:"status"`
}

type dumpPolicy struct {
	Name      string          `json:"name"`
	Namespace string          `json:"namespace"`
	Scope     string          `json:"scope"`
	Action    string          `json:"action"`
	Rules     [][][]dumpMatch `json:"rules"`
	DryRun    bool            `json:"dryRun"`
	Problems  []string        `json:"problems,omitempty"`
}

// dumpMatch has its strings as {"Exact": "x"}, {"Presence": []}.
type dumpMatch struct {
	Namespaces      []map[string]any `json:"namespaces,omitempty"`
	NotNamespaces   []map[string]any `json:"notNamespaces,omitempty"`
	Accounts        []dumpAccount    `json:"serviceAccounts,omitempty"`
	NotAccounts     []dumpAccount    `json:"notServiceAccounts,omitempty"`
	Principals      []map[string]any `json:"principals,omitempty"`
	NotPrincipals   []map[string]any `json:"notPrincipals,omitempty"`
	SourceIPs       []string         `json:"sourceIps,omitempty"`
	NotSourceIPs    []string         `json:"notSourceIps,omitempty"`
	DestinationIPs  []string         `json:"destinationIps,omitempty"`
	NotDestinations []string         `json:"notDestinationIps,omitempty"`
	Ports           []uint32         `json:"destinationPorts,omitempty"`
	NotPorts        []uint32         `json:"notDestinationPorts,omitempty"`
}

type dumpAccount struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

type dumpCertificate struct {
	Identity  string     `json:"identity"`
	State     string     `json:"state"`
	CertChain []dumpCert `json:"certChain"`
	RootCerts []dumpCert `json:"rootCerts"`
}

type dumpCert struct {
	PEM            string `json:"pem"`
	SerialNumber   string `json:"serialNumber"`
	ValidFrom      string `json:"validFrom"`
	ExpirationTime string `json:"expirationTime"`
}

type dumpPodState struct {
	State       string           `json:"state"`
	Info        *dumpPodInfo     `json:"info,omitempty"`
	Why         string           `json:"why,omitempty"`
	Connections *dumpConnections `json:"connections,omitempty"`
}

type dumpPodInfo struct {
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

type dumpConnections struct {
	Inbound  []dumpConnection `json:"inbound"`
	Outbound []dumpConnection `json:"outbound"`
}

// dumpConnection is a live connection under the reference's names and ours.
type dumpConnection struct {
	flow.Live
	OriginalDst *string `json:"originalDst"`
	ActualDst   string  `json:"actualDst"`
	Protocol    string  `json:"protocol"`
}

func (a *app) dump() dump {
	v := a.node.store.View()
	d := dump{Workloads: []dumpWorkload{}, Services: []dumpService{}, Policies: []dumpPolicy{}, Certificates: []dumpCertificate{},
		StaticConfig: dumpStatic{[]dumpWorkload{}, []dumpPolicy{}, []dumpService{}},
		Version:      boot.BuildOf("ztunnel"), Generation: v.Generation,
		StagedServices: map[string]any{}, Config: a.cfg.public(), WorkloadState: a.podStates()}
	for w := range v.Mesh.AllWorkloads() {
		d.Workloads = append(d.Workloads, workloadDump(w))
	}
	for s := range v.Mesh.AllServices() {
		d.Services = append(d.Services, serviceDump(v, s))
	}
	for p := range v.Policies.All() {
		d.Policies = append(d.Policies, policyDump(p))
	}
	d.StagedServices = staged(v)
	if a.static != nil {
		d.StaticConfig = staticDump(a.static)
	}
	for _, s := range a.node.certs.Status() {
		d.Certificates = append(d.Certificates, certificateDump(s))
	}
	return d
}

// staged are endpoints of services that are not known (yet), by service and
// workload.
func staged(v *store.View) map[string]any {
	out := map[string]any{}
	for w := range v.Mesh.AllWorkloads() {
		for h, ports := range w.Services {
			if v.Mesh.Service(h) != nil {
				continue
			}
			of, ok := out[h.String()].(map[string]dumpEndpoint)
			if !ok {
				of = map[string]dumpEndpoint{}
				out[h.String()] = of
			}
			of[w.UID] = dumpEndpoint{WorkloadUID: w.UID, Port: portsDump(ports), Status: health(w)}
		}
	}
	return out
}

// staticDump is what LOCAL_XDS described.
func staticDump(v *store.View) dumpStatic {
	d := dumpStatic{[]dumpWorkload{}, []dumpPolicy{}, []dumpService{}}
	for w := range v.Mesh.AllWorkloads() {
		d.Workloads = append(d.Workloads, workloadDump(w))
	}
	for s := range v.Mesh.AllServices() {
		d.Services = append(d.Services, serviceDump(v, s))
	}
	for p := range v.Policies.All() {
		d.Policies = append(d.Policies, policyDump(p))
	}
	return d
}

// public is the configuration without anything secret.
func (c *Config) public() map[string]string {
	out := map[string]string{}
	for _, s := range c.settings() {
		if s.env != "AUTH_TOKEN" {
			out[s.env] = s.value.String()
		}
	}
	return out
}

func workloadDump(w *mesh.Workload) dumpWorkload {
	d := dumpWorkload{
		Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, TrustDomain: w.TrustDomain,
		WorkloadName: w.WorkloadName, WorkloadType: strings.ToLower(w.WorkloadType.String()), CanonicalName: w.CanonicalName,
		CanonicalRevision: w.CanonicalRevision, ClusterID: w.ClusterID, Node: w.Node, Network: w.Network, UID: w.UID,
		Policies: w.Policies, Capacity: w.Capacity, Status: health(w), Protocol: "TCP", Hostname: w.Hostname,
		NetworkMode: "Standard", NativeTunnel: w.NativeTunnel, Waypoint: gatewayDump(w.Waypoint), NetworkGateway: gatewayDump(w.NetworkGateway),
		IPs: []string{}, Terminating: w.Terminating,
	}
	if w.Tunnel == workload.TunnelProtocol_HBONE {
		d.Protocol = "HBONE"
	}
	if w.NetworkMode == workload.NetworkMode_HOST_NETWORK {
		d.NetworkMode = "HostNetwork"
	}
	if w.Locality != (mesh.Locality{}) {
		d.Locality = &dumpLocality{w.Locality.Region, w.Locality.Zone, w.Locality.Subzone}
	}
	if t := w.AppTunnel; t != nil {
		d.AppTunnel = &dumpTunnel{Protocol: t.Protocol.String()}
		if t.Port != 0 {
			d.AppTunnel.Port = &t.Port
		}
	}
	for _, ip := range w.Addrs {
		d.IPs = append(d.IPs, ip.String())
	}
	for h := range w.Services {
		d.Services = append(d.Services, h.String())
	}
	slices.Sort(d.Services)
	return d
}

// The reference's spelling of values.
var (
	familyNames = map[workload.IPFamilies]string{workload.IPFamilies_DUAL: "Dual", workload.IPFamilies_IPV4_ONLY: "IPv4", workload.IPFamilies_IPV6_ONLY: "IPv6"}
	modeNames   = map[workload.LoadBalancing_Mode]string{workload.LoadBalancing_UNSPECIFIED_MODE: "Standard", workload.LoadBalancing_STRICT: "Strict",
		workload.LoadBalancing_FAILOVER: "Failover", workload.LoadBalancing_PASSTHROUGH: "Passthrough"}
	scopeNames = map[policy.Scope]string{policy.Global: "Global", policy.Namespace: "Namespace", policy.Selector: "WorkloadSelector"}
)

func serviceDump(v *store.View, s *mesh.Service) dumpService {
	d := dumpService{Name: s.Name, Namespace: s.Namespace, Hostname: s.Host.Name, Ports: portsDump(s.Ports), VIPs: []string{}, SANs: []string{},
		Endpoints: map[string]dumpEndpoint{}, Waypoint: gatewayDump(s.Waypoint), IPFamilies: familyNames[s.Families], Canonical: s.Canonical, Visibility: "Public"}
	if s.Visibility == workload.Service_NAMESPACE {
		d.Visibility = "Namespace"
	}
	for _, a := range s.VIPs {
		d.VIPs = append(d.VIPs, a.String())
	}
	for _, c := range s.CIDRs {
		d.CIDRs = append(d.CIDRs, c.Network+"/"+c.Prefix.String())
	}
	for _, id := range s.SANs {
		d.SANs = append(d.SANs, id.String())
	}
	for _, w := range s.WeightedWaypoints {
		d.WeightedWaypoints = append(d.WeightedWaypoints, dumpWeighted{gatewayDump(&w.Gateway), w.Weight})
	}
	if s.Mode != workload.LoadBalancing_UNSPECIFIED_MODE || len(s.Preference) > 0 || s.AllowUnhealthy {
		d.LoadBalancer = &dumpBalancer{Preferences: []string{}, Mode: modeNames[s.Mode], Health: "OnlyHealthy"}
		for _, p := range s.Preference {
			n := p.String()
			d.LoadBalancer.Preferences = append(d.LoadBalancer.Preferences, n[:1]+strings.ToLower(n[1:]))
		}
		if s.AllowUnhealthy {
			d.LoadBalancer.Health = "AllowAll"
		}
	}
	set := v.Mesh.Endpoints(s.Host)
	for i := range set.Len() {
		e := set.At(i)
		d.Endpoints[e.Workload.UID] = dumpEndpoint{WorkloadUID: e.Workload.UID, Port: portsDump(e.Ports), Status: health(e.Workload)}
	}
	return d
}

func policyDump(p *policy.Policy) dumpPolicy {
	d := dumpPolicy{Name: p.Name, Namespace: p.Namespace, Scope: scopeNames[p.Scope], Action: "Allow", DryRun: p.DryRun, Rules: [][][]dumpMatch{}}
	if p.Action == policy.Deny {
		d.Action = "Deny"
	}
	for _, r := range p.Source.GetRules() {
		clauses := [][]dumpMatch{}
		for _, c := range r.GetClauses() {
			matches := []dumpMatch{}
			for _, m := range c.GetMatches() {
				matches = append(matches, matchDump(m))
			}
			clauses = append(clauses, matches)
		}
		d.Rules = append(d.Rules, clauses)
	}
	for _, problem := range p.Problems {
		d.Problems = append(d.Problems, problem.Error())
	}
	return d
}

func matchDump(m *security.Match) dumpMatch {
	return dumpMatch{
		Namespaces: stringsDump(m.GetNamespaces()), NotNamespaces: stringsDump(m.GetNotNamespaces()),
		Principals: stringsDump(m.GetPrincipals()), NotPrincipals: stringsDump(m.GetNotPrincipals()),
		Accounts: accountsDump(m.GetServiceAccounts()), NotAccounts: accountsDump(m.GetNotServiceAccounts()),
		SourceIPs: prefixesDump(m.GetSourceIps()), NotSourceIPs: prefixesDump(m.GetNotSourceIps()),
		DestinationIPs: prefixesDump(m.GetDestinationIps()), NotDestinations: prefixesDump(m.GetNotDestinationIps()),
		Ports: m.GetDestinationPorts(), NotPorts: m.GetNotDestinationPorts(),
	}
}

func stringsDump(in []*security.StringMatch) []map[string]any {
	var out []map[string]any
	for _, m := range in {
		switch v := m.GetMatchType().(type) {
		case *security.StringMatch_Exact:
			out = append(out, map[string]any{"Exact": v.Exact})
		case *security.StringMatch_Prefix:
			out = append(out, map[string]any{"Prefix": v.Prefix})
		case *security.StringMatch_Suffix:
			out = append(out, map[string]any{"Suffix": v.Suffix})
		case *security.StringMatch_Presence:
			out = append(out, map[string]any{"Presence": []any{}})
		}
	}
	return out
}

func accountsDump(in []*security.ServiceAccountMatch) []dumpAccount {
	var out []dumpAccount
	for _, a := range in {
		out = append(out, dumpAccount{a.GetNamespace(), a.GetServiceAccount()})
	}
	return out
}

// prefixesDump leaves out what Compile reports as a problem.
func prefixesDump(in []*security.Address) []string {
	var out []string
	for _, a := range in {
		if ip, ok := netip.AddrFromSlice(a.GetAddress()); ok {
			out = append(out, fmt.Sprintf("%s/%d", ip, a.GetLength()))
		}
	}
	return out
}

func portsDump(ports []mesh.Port) map[string]uint16 {
	out := map[string]uint16{}
	for _, p := range ports {
		out[strconv.Itoa(int(p.Service))] = p.Target
	}
	return out
}

func gatewayDump(g *mesh.GatewayAddress) *dumpGateway {
	if g == nil {
		return nil
	}
	d := &dumpGateway{Port: g.HBONEPort, Destination: g.Host.String()}
	if g.Addr.IsValid() {
		d.Destination = g.Network + "/" + g.Addr.String()
	}
	return d
}

func health(w *mesh.Workload) string {
	if w.Healthy {
		return "Healthy"
	}
	return "Unhealthy"
}

func certificateDump(s cert.Status) dumpCertificate {
	d := dumpCertificate{Identity: s.ID.String(), State: s.State}
	if s.Cert == nil {
		return d
	}
	for _, c := range append([]*x509.Certificate{s.Cert.Leaf}, s.Cert.Chain...) {
		d.CertChain = append(d.CertChain, certDump(c))
	}
	for _, c := range s.Cert.Roots {
		d.RootCerts = append(d.RootCerts, certDump(c))
	}
	return d
}

func certDump(c *x509.Certificate) dumpCert {
	return dumpCert{
		PEM:          base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})),
		SerialNumber: fmt.Sprint(c.SerialNumber),
		ValidFrom:    c.NotBefore.UTC().Format(time.RFC3339), ExpirationTime: c.NotAfter.UTC().Format(time.RFC3339),
	}
}

func (a *app) podStates() map[string]dumpPodState {
	out := map[string]dumpPodState{}
	for _, p := range a.pods.Pods() {
		out[p.UID] = dumpPodState{State: "Up", Info: &dumpPodInfo{p.Name, p.Namespace, p.ServiceAccount},
			Connections: &dumpConnections{Inbound: []dumpConnection{}, Outbound: []dumpConnection{}}}
	}
	for uid, why := range a.pods.Pending() {
		out[uid] = dumpPodState{State: "Pending", Why: why}
	}
	for _, l := range a.node.flow.List() {
		s, ok := out[l.Pod]
		if !ok {
			s = dumpPodState{State: "Draining", Connections: &dumpConnections{Inbound: []dumpConnection{}, Outbound: []dumpConnection{}}}
			out[l.Pod] = s
		}
		if s.Connections == nil {
			continue
		}
		if l.Direction == flow.Inbound {
			s.Connections.Inbound = append(s.Connections.Inbound, connectionDump(l))
		} else {
			s.Connections.Outbound = append(s.Connections.Outbound, connectionDump(l))
		}
	}
	return out
}

func connectionDump(l flow.Live) dumpConnection {
	d := dumpConnection{Live: l, ActualDst: l.Dst, Protocol: "TCP"}
	if l.OriginalDst != "" {
		d.OriginalDst = &l.OriginalDst
	}
	if l.Transport == flow.HBONE {
		d.Protocol = "HBONE"
	}
	return d
}
