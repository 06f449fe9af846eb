package app

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"crypto/x509"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/boot"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/xds/store"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
)

func (a *app) admin(levels *boot.LevelControl, quit func()) http.Handler {
	return boot.AdminMux(boot.AdminConfig{Levels: levels, Shutdown: quit, Handlers: map[string]http.Handler{
		"GET /config_dump": jsonPage(func() any { return a.dump() }),
		"GET /connections": jsonPage(func() any { return a.node.flow.List() }),
		"GET /refusals":    a.refusals(),
	}})
}

func jsonPage(f func() any) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(f()) // the client has gone: nothing to do
	})
}

// refusals is what this proxy refused, or was refused, of late: JSON, or a
// table with ?format=text.
func (a *app) refusals() http.Handler {
	asJSON := jsonPage(func() any { return a.node.flow.Refusals() })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch f := r.URL.Query().Get("format"); f {
		case "", "json":
			asJSON.ServeHTTP(w, r)
		case "text":
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			_ = flow.WriteRefusals(w, a.node.flow.Refusals()) // the client has gone: nothing to do
		default:
			http.Error(w, fmt.Sprintf("format %q: one of json, text", f), http.StatusBadRequest)
		}
	})
}

// The dump has the reference's shape, which its command line tool reads.
type dump struct {
	Workloads      []dumpWorkload          `json:"workloads"`
	Services       []dumpService           `json:"services"`
	Policies       []dumpPolicy            `json:"policies"`
	StagedServices map[string]any          `json:"stagedServices"`
	StaticConfig   map[string]any          `json:"staticConfig"`
	Version        boot.Build              `json:"version"`
	Config         map[string]string       `json:"config"`
	Certificates   []dumpCertificate       `json:"certificates"`
	WorkloadState  map[string]dumpPodState `json:"workloadState"`
	Generation     uint64                  `json:"generation"`
}

type dumpWorkload struct {
	IPs               []string                     `json:"workloadIps"`
	Waypoint          *dumpGateway                 `json:"waypoint,omitempty"`
	NetworkGateway    *dumpGateway                 `json:"networkGateway,omitempty"`
	Protocol          string                       `json:"protocol"`
	NetworkMode       string                       `json:"networkMode"`
	Name              string                       `json:"name"`
	Namespace         string                       `json:"namespace"`
	ServiceAccount    string                       `json:"serviceAccount"`
	TrustDomain       string                       `json:"trustDomain"`
	WorkloadName      string                       `json:"workloadName"`
	WorkloadType      string                       `json:"workloadType"`
	CanonicalName     string                       `json:"canonicalName"`
	CanonicalRevision string                       `json:"canonicalRevision"`
	ClusterID         string                       `json:"clusterId"`
	Node              string                       `json:"node"`
	Network           string                       `json:"network"`
	Status            string                       `json:"status"`
	UID               string                       `json:"uid"`
	Policies          []string                     `json:"authorizationPolicies,omitempty"`
	Services          map[string]map[string]uint16 `json:"services"`
	Capacity          uint32                       `json:"capacity"`
	Locality          mesh.Locality                `json:"locality"`
}

type dumpGateway struct {
	Destination string `json:"destination"`
	Port        uint16 `json:"hboneMtlsPort"`
}

type dumpService struct {
	Name       string                  `json:"name"`
	Namespace  string                  `json:"namespace"`
	Hostname   string                  `json:"hostname"`
	VIPs       []string                `json:"vips"`
	Ports      map[string]uint16       `json:"ports"`
	Endpoints  map[string]dumpEndpoint `json:"endpoints"`
	SANs       []string                `json:"subjectAltNames"`
	Waypoint   *dumpGateway            `json:"waypoint,omitempty"`
	IPFamilies string                  `json:"ipFamilies"`
}

type dumpEndpoint struct {
	WorkloadUID string            `json:"workloadUid"`
	Port        map[string]uint16 `json:"port"`
	Status      string            `json:"status"`
}

type dumpPolicy struct {
	Name      string   `json:"name"`
	Namespace string   `json:"namespace"`
	Scope     string   `json:"scope"`
	Action    string   `json:"action"`
	DryRun    bool     `json:"dryRun,omitempty"`
	Rules     int      `json:"ruleCount"`
	Problems  []string `json:"problems,omitempty"`
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
	Inbound  []flow.Live `json:"inbound"`
	Outbound []flow.Live `json:"outbound"`
}

func (a *app) dump() dump {
	v := a.node.store.View()
	d := dump{Version: boot.BuildOf("ztunnel"), Generation: v.Generation,
		StagedServices: map[string]any{}, StaticConfig: map[string]any{}, Config: a.cfg.public(), WorkloadState: a.podStates()}
	for w := range v.Mesh.AllWorkloads() {
		d.Workloads = append(d.Workloads, workloadDump(w))
	}
	for s := range v.Mesh.AllServices() {
		d.Services = append(d.Services, serviceDump(v, s))
	}
	for p := range v.Policies.All() {
		dp := dumpPolicy{Name: p.Name, Namespace: p.Namespace, Scope: p.Scope.String(), Action: p.Action.String(), DryRun: p.DryRun, Rules: p.Rules()}
		for _, problem := range p.Problems {
			dp.Problems = append(dp.Problems, problem.Error())
		}
		d.Policies = append(d.Policies, dp)
	}
	for _, s := range a.node.certs.Status() {
		d.Certificates = append(d.Certificates, certificateDump(s))
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
		Policies: w.Policies, Capacity: w.Capacity, Locality: w.Locality, Status: health(w), Protocol: "TCP",
		NetworkMode: "Standard", Waypoint: gatewayDump(w.Waypoint), NetworkGateway: gatewayDump(w.NetworkGateway),
		Services: map[string]map[string]uint16{},
	}
	if w.Tunnel == workload.TunnelProtocol_HBONE {
		d.Protocol = "HBONE"
	}
	if w.NetworkMode == workload.NetworkMode_HOST_NETWORK {
		d.NetworkMode = "HostNetwork"
	}
	for _, ip := range w.Addrs {
		d.IPs = append(d.IPs, ip.String())
	}
	for h, ports := range w.Services {
		d.Services[h.String()] = portsDump(ports)
	}
	return d
}

func serviceDump(v *store.View, s *mesh.Service) dumpService {
	d := dumpService{Name: s.Name, Namespace: s.Namespace, Hostname: s.Host.Name, Ports: portsDump(s.Ports),
		Endpoints: map[string]dumpEndpoint{}, Waypoint: gatewayDump(s.Waypoint), IPFamilies: s.Families.String(), SANs: []string{}}
	for _, a := range s.VIPs {
		d.VIPs = append(d.VIPs, a.String())
	}
	for _, id := range s.SANs {
		d.SANs = append(d.SANs, id.String())
	}
	set := v.Mesh.Endpoints(s.Host)
	for i := range set.Len() {
		e := set.At(i)
		d.Endpoints[e.Workload.UID] = dumpEndpoint{WorkloadUID: e.Workload.UID, Port: portsDump(e.Ports), Status: health(e.Workload)}
	}
	return d
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
			Connections: &dumpConnections{Inbound: []flow.Live{}, Outbound: []flow.Live{}}}
	}
	for uid, why := range a.pods.Pending() {
		out[uid] = dumpPodState{State: "Pending", Why: why}
	}
	for _, l := range a.node.flow.List() {
		s, ok := out[l.Pod]
		if !ok {
			s = dumpPodState{State: "Draining", Connections: &dumpConnections{Inbound: []flow.Live{}, Outbound: []flow.Live{}}}
			out[l.Pod] = s
		}
		if s.Connections == nil {
			continue
		}
		if l.Direction == flow.Inbound {
			s.Connections.Inbound = append(s.Connections.Inbound, l)
		} else {
			s.Connections.Outbound = append(s.Connections.Outbound, l)
		}
	}
	return out
}
