package derive

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/crd"
	"github.com/ambit-mesh/ambit/xds/identity"
)

const (
	waypointForLabel         = "istio.io/waypoint-for"
	gatewayNameLabel         = "gateway.networking.k8s.io/gateway-name"
	gatewayManagedLabel      = "gateway.istio.io/managed"
	inboundBindingAnnotation = "ambient.istio.io/waypoint-inbound-binding"
	nameOverrideAnnotation   = "gateway.istio.io/name-override"
	accountAnnotation        = "gateway.istio.io/service-account"
	trustDomainAnnotation    = "gateway.istio.io/trust-domain"
	addressTypeAnnotation    = "networking.istio.io/address-type"
	clusterLabel             = "topology.istio.io/cluster"

	classIngress  = "istio"
	classWaypoint = "istio-waypoint"
	classEastWest = "istio-east-west"
	classRemote   = "istio-remote"

	// Controllers of the classes above, as GatewayClasses name them.
	controllerWaypoint = "istio.io/mesh-controller"

	protocolHBONE = "HBONE"
	protocolPROXY = "istio.io/PROXY"
	portHBONE     = 15008
)

// ConditionGateway says whether node proxies act on a Gateway as it is written.
const ConditionGateway = "ambit.dev/GatewayAccepted"

// gateways is what Gateways mean to node proxies.
type gateways struct {
	all     map[nn]*crd.Gateway
	classes map[string]*crd.GatewayClass
	ofClass multi[string, nn]
	users   multi[nn, source] // objects whose labels name the Gateway
	points  map[nn]*waypoint  // as they are in force
	// into are the Gateways of each remote network, as they are in force.
	into map[string]map[nn]*waypoint

	selective int // points that choose namespaces by label

	dirty           set[nn]
	dirtyNamespaces set[string] // whose conditions may differ
}

func newGateways() gateways {
	return gateways{
		all: map[nn]*crd.Gateway{}, classes: map[string]*crd.GatewayClass{},
		ofClass: multi[string, nn]{}, users: multi[nn, source]{}, points: map[nn]*waypoint{},
		into: map[string]map[nn]*waypoint{}, dirty: set[nn]{}, dirtyNamespaces: set[string]{},
	}
}

// waypoint is a Gateway as those see it who may use it.
type waypoint struct {
	address  *workload.GatewayAddress // nil: not ready
	why      string                   // it is not ready
	serves   string                   // service, workload, all or none
	from     crd.FromNamespaces
	selector *metav1.LabelSelector // of FromSelector
	tunnel   *workload.ApplicationTunnel
	isPart   bool // acts as a waypoint, or leads into a network: has no waypoint itself
	network  string
	// Of what leads into a network: how old it is, itself, the service that names
	// it when it has a hostname only, and how others refer to it.
	created  time.Time
	workload *workload.Workload
	service  *workload.Service
	into     *workload.GatewayAddress
}

func (w *waypoint) equal(o *waypoint) bool {
	if w == nil || o == nil {
		return w == o
	}
	return proto.Equal(w.address, o.address) && w.why == o.why && w.serves == o.serves && w.from == o.from &&
		reflect.DeepEqual(w.selector, o.selector) && proto.Equal(w.tunnel, o.tunnel) && w.isPart == o.isPart
}

// chooses counts 1 for a waypoint that admits namespaces by their labels.
func (w *waypoint) chooses() int {
	if w != nil && w.from == crd.FromSelector {
		return 1
	}
	return 0
}

func (e *Engine) inputGateway(k nn, g *crd.Gateway) {
	if was := put(e.gw.all, k, g); was != nil {
		e.gw.ofClass.remove(was.Spec.GatewayClassName, k)
	}
	if g != nil {
		e.gw.ofClass.add(g.Spec.GatewayClassName, k)
	}
	e.gw.dirty[k] = struct{}{}
}

func (e *Engine) inputGatewayClass(name string, c *crd.GatewayClass) {
	put(e.gw.classes, name, c)
	for k := range e.gw.ofClass[name] {
		e.gw.dirty[k] = struct{}{}
	}
}

// serviceOfGateways marks the Gateways that a Service may stand for.
func (e *Engine) serviceOfGateways(k nn) {
	for _, name := range []string{k.name, strings.TrimSuffix(k.name, "-"+classIngress)} {
		if g := (nn{k.ns, name}); e.gw.all[g] != nil {
			e.gw.dirty[g] = struct{}{}
		}
	}
	// Gateways with a name of their own choosing for their Service are few.
	for g, o := range e.gw.all {
		if g.ns == k.ns && o.Annotations[nameOverrideAnnotation] == k.name {
			e.gw.dirty[g] = struct{}{}
		}
	}
}

// settleGateways computes changed Gateways and marks what depends on them. It
// comes before everything else is computed.
func (e *Engine) settleGateways(r *Result) {
	for k := range e.gw.dirty {
		src := source{"Gateway", k}
		was := e.gw.points[k]
		now, notes := e.resolveGateway(k)
		e.gw.selective += now.chooses() - was.chooses()
		if now == nil {
			delete(e.gw.points, k)
		} else {
			e.gw.points[k] = now
		}
		if !was.equal(now) {
			e.markUsers(k)
		}
		e.setWayInto(k, was, now)
		var out []Resource
		if now != nil && now.workload != nil {
			out = append(out, workloadResource(now.workload))
		}
		if now != nil && now.service != nil {
			out = append(out, serviceResource(now.service))
		}
		e.output(r, src, out)
		e.condition(src, e.gatewayConditions(k, now, notes))
	}
}

// markUsers marks everything that may use a Gateway, or is part of it.
func (e *Engine) markUsers(k nn) {
	if e.services[k] != nil {
		e.dirty.services[k] = struct{}{}
	}
	for user := range e.gw.users[k] {
		if user.kind == "Namespace" {
			e.gw.dirtyNamespaces[user.name] = struct{}{}
			e.markNamespace(user.name)
			continue
		}
		e.markSource(user)
	}
}

// markNamespace marks what inherits from a namespace.
func (e *Engine) markNamespace(ns string) {
	for svc := range e.servicesIn[ns] {
		e.dirty.services[svc] = struct{}{}
	}
	markAll(e.dirty.entries, e.entries.in[ns])
	e.markWorkloads(ns, nil)
}

func (e *Engine) markSource(src source) {
	switch src.kind {
	case "Pod":
		e.dirty.pods[src.nn] = struct{}{}
	case "Service":
		e.dirty.services[src.nn] = struct{}{}
	case "ServiceEntry":
		e.dirty.entries[src.nn] = struct{}{}
	case "WorkloadEntry":
		e.dirty.workloads[src.nn] = struct{}{}
	}
}

// use files an object under the Gateways that its labels name.
func (e *Engine) use(src source, before, after map[string]string) {
	for _, k := range namedGateways(src, before) {
		e.gw.users.remove(k, src)
	}
	for _, k := range namedGateways(src, after) {
		e.gw.users.add(k, src)
	}
}

func namedGateways(src source, labels map[string]string) []nn {
	var out []nn
	ns := src.ns
	if src.kind == "Namespace" {
		ns = src.name
	}
	if k, ok := waypointName(labels, ns, useWaypointLabel, waypointNamespaceLabel); ok {
		out = append(out, k)
	}
	if k, ok := waypointName(labels, ns, canaryLabel, canaryNamespaceLabel); ok {
		out = append(out, k)
	}
	if name := labels[gatewayNameLabel]; name != "" {
		out = append(out, nn{ns, name})
	}
	return out
}

// notes are faults found in one object.
type notes []string

func (n *notes) add(format string, args ...any) { *n = append(*n, fmt.Sprintf(format, args...)) }

// resolveGateway reads a Gateway, nil when there is none.
func (e *Engine) resolveGateway(k nn) (*waypoint, notes) {
	g := e.gw.all[k]
	if g == nil {
		return nil, nil
	}
	var n notes
	class := e.gw.classes[g.Spec.GatewayClassName]
	w := &waypoint{
		serves: servesOf(g, class, &n), tunnel: tunnelOf(g, class, &n),
		network: g.Labels[networkLabel], isPart: isInfrastructure(g, class), created: g.CreationTimestamp.Time,
	}
	l := boundListener(g, w.tunnel)
	w.from = crd.FromSame
	if l != nil && l.AllowedRoutes != nil && l.AllowedRoutes.Namespaces != nil {
		w.from = cmp.Or(l.AllowedRoutes.Namespaces.From, crd.FromSame)
		if w.from == crd.FromSelector {
			w.selector = l.AllowedRoutes.Namespaces.Selector
		}
	}
	w.isPart = w.isPart || w.tunnel != nil || hboneListener(g) != nil
	w.address, w.why = e.gatewayAddress(k, g)
	if isWayInto(g) {
		e.wayInto(k, g, w, &n)
	}
	return w, n
}

// servesOf is the kind of traffic a waypoint takes.
func servesOf(g *crd.Gateway, class *crd.GatewayClass, n *notes) string {
	v, where := g.Labels[waypointForLabel], "label"
	if v == "" && class != nil {
		v, where = class.Labels[waypointForLabel], "label of GatewayClass "+class.Name
	}
	switch v {
	case "":
		return trafficService
	case trafficService, trafficWorkload, trafficAll, trafficNone:
		return v
	}
	n.add("%s %s=%q: valid are service, workload, all, none; the waypoint takes no traffic", where, waypointForLabel, v)
	return trafficNone
}

// tunnelOf is how the node's proxy hands connections to a waypoint that lets it
// terminate HBONE: "PROXY[/port]" or "NONE[/port]".
func tunnelOf(g *crd.Gateway, class *crd.GatewayClass, n *notes) *workload.ApplicationTunnel {
	v, ok := g.Annotations[inboundBindingAnnotation]
	if !ok && class != nil {
		v, ok = class.Annotations[inboundBindingAnnotation]
	}
	if !ok {
		return nil
	}
	t := &workload.ApplicationTunnel{}
	protocol, port, hasPort := strings.Cut(v, "/")
	switch protocol {
	case "NONE":
	case "PROXY":
		t.Protocol = workload.ApplicationTunnel_PROXY
	default:
		n.add("annotation %s: %q: write PROXY, PROXY/<port>, NONE or NONE/<port>; it is ignored", inboundBindingAnnotation, v)
		return nil
	}
	if hasPort {
		p, err := strconv.ParseUint(port, 10, 16)
		if err != nil || p == 0 {
			n.add("annotation %s: %q: the port is not a number from 1 to 65535; it is ignored", inboundBindingAnnotation, v)
			return nil
		}
		t.Port = uint32(p)
	}
	return t
}

// boundListener is the listener whose allowedRoutes hold for a waypoint.
func boundListener(g *crd.Gateway, t *workload.ApplicationTunnel) *crd.Listener {
	for _, l := range g.Spec.Listeners {
		if t != nil && (t.Port != 0 && l.Port == int32(t.Port) || t.Port == 0 && t.Protocol == workload.ApplicationTunnel_PROXY && l.Protocol == protocolPROXY) {
			return l
		}
	}
	return hboneListener(g)
}

func hboneListener(g *crd.Gateway) *crd.Listener {
	for _, l := range g.Spec.Listeners {
		if l.Protocol == protocolHBONE {
			return l
		}
	}
	return nil
}

func hbonePort(g *crd.Gateway) uint32 {
	if l := hboneListener(g); l != nil {
		return uint32(l.Port)
	}
	return portHBONE
}

func isWayInto(g *crd.Gateway) bool {
	return g.Spec.GatewayClassName == classEastWest || g.Spec.GatewayClassName == classRemote
}

// isInfrastructure: a waypoint's own Service never has a waypoint.
func isInfrastructure(g *crd.Gateway, class *crd.GatewayClass) bool {
	return g.Spec.GatewayClassName == classWaypoint || isWayInto(g) || class != nil && class.Spec.ControllerName == controllerWaypoint
}

// gatewayAddress is where node proxies reach a Gateway: what its controller
// reports, a hostname before an address; for a Gateway in a plain file, that no
// controller has taken up, the Service that carries its name.
func (e *Engine) gatewayAddress(k nn, g *crd.Gateway) (*workload.GatewayAddress, string) {
	addrs := g.Status.Addresses
	if len(addrs) == 0 && g.Spec.GatewayClassName == classRemote {
		addrs = g.Spec.Addresses
	}
	network := cmp.Or(g.Labels[networkLabel], e.set.network)
	preferIP := g.Annotations[addressTypeAnnotation] == crd.AddressIP
	var byName, byIP *workload.GatewayAddress
	for _, a := range addrs {
		switch ip, err := netip.ParseAddr(a.Value); {
		case a.Type == crd.AddressHostname && byName == nil && dnsName(a.Value) != "":
			byName = toHostname(k.ns, dnsName(a.Value), hbonePort(g))
		case a.Type != crd.AddressHostname && err == nil && ip.Zone() == "" && byIP == nil:
			byIP = toAddress(network, ip.Unmap(), hbonePort(g))
		}
	}
	if byIP != nil && (preferIP || byName == nil) {
		return byIP, ""
	}
	if byName != nil {
		return byName, ""
	}
	if len(addrs) > 0 {
		return nil, "its addresses are neither IP addresses nor hostnames"
	}
	if g.Status.Reported() {
		return nil, "its status has no addresses, no pod of it has become ready yet"
	}
	svc := nn{k.ns, serviceOfGateway(g)}
	s := e.services[svc]
	if s == nil || !inMesh(s) {
		return nil, fmt.Sprintf("its status has no addresses and there is no Service %s", svc)
	}
	if vips := clusterIPs(s); preferIP && len(vips) > 0 {
		return toAddress(network, vips[0], hbonePort(g)), ""
	}
	return toHostname(k.ns, e.hostname(svc), hbonePort(g)), ""
}

// serviceOfGateway is the name of the Service that Istio makes for a Gateway.
func serviceOfGateway(g *crd.Gateway) string {
	if name := g.Annotations[nameOverrideAnnotation]; name != "" {
		return name
	}
	if g.Spec.GatewayClassName == classIngress {
		return g.Name + "-" + classIngress
	}
	return g.Name
}

// dnsName spells a host in one way, "" when it is none.
func dnsName(host string) string {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	if len(validation.IsDNS1123Subdomain(host)) > 0 {
		return ""
	}
	return host
}

func toHostname(ns, host string, port uint32) *workload.GatewayAddress {
	return &workload.GatewayAddress{
		Destination:   &workload.GatewayAddress_Hostname{Hostname: &workload.NamespacedHostname{Namespace: ns, Hostname: host}},
		HboneMtlsPort: port,
	}
}

func toAddress(network string, a netip.Addr, port uint32) *workload.GatewayAddress {
	return &workload.GatewayAddress{
		Destination:   &workload.GatewayAddress_Address{Address: &workload.NetworkAddress{Network: network, Address: a.AsSlice()}},
		HboneMtlsPort: port,
	}
}

// gatewayConditions says what of a Gateway is not in force as it is written.
func (e *Engine) gatewayConditions(k nn, w *waypoint, n notes) []Condition {
	g := e.gw.all[k]
	if g == nil {
		return nil
	}
	class := g.Spec.GatewayClassName
	forUs := w.isPart || w.tunnel != nil || hboneListener(g) != nil || g.Labels[waypointForLabel] != ""
	if !forUs && class != classIngress && len(n) == 0 {
		return nil // somebody else's
	}
	if !forUs && class == classIngress {
		n.add("spec.gatewayClassName %s: this build runs no ingress gateways and programs none", class)
	}
	if class == classWaypoint {
		for i, l := range g.Spec.Listeners {
			if l.Protocol != protocolHBONE {
				n.add("spec.listeners[%d]: protocol %s is not used, a waypoint has one listener with port %d and protocol %s", i, l.Protocol, portHBONE, protocolHBONE)
			}
		}
	}
	reason := ReasonUnsupported
	if len(n) == 0 && w.isPart && !isWayInto(g) && w.address == nil {
		reason = ReasonWaypointNotReady
		n.add("it is not ready: %s; nothing is bound to it", w.why)
	}
	cond := Condition{Kind: "Gateway", Namespace: k.ns, Name: k.name, Type: ConditionGateway, Status: "True", Reason: ReasonAccepted}
	if len(n) > 0 {
		cond.Status, cond.Reason, cond.Message = "False", reason, strings.Join(n, "; ")
	}
	return []Condition{cond}
}

// wayInto reads a Gateway that leads into a network: its address there, and the
// workload that proxies authenticate it as.
func (e *Engine) wayInto(k nn, g *crd.Gateway, w *waypoint, n *notes) {
	l := hboneListener(g)
	switch {
	case w.network == "":
		n.add("label %s is missing: name the network that the Gateway leads into", networkLabel)
		return
	case l == nil:
		n.add("spec.listeners: none has protocol %s, which node proxies need to enter network %s", protocolHBONE, w.network)
		return
	}
	addrs := g.Spec.Addresses
	if len(addrs) == 0 {
		addrs = g.Status.Addresses
	}
	account := cmp.Or(g.Annotations[accountAnnotation], g.Name)
	trustDomain := cmp.Or(g.Annotations[trustDomainAnnotation], e.set.trustDomain)
	if _, err := identity.New(trustDomain, k.ns, account); err != nil {
		n.add("annotations %s and %s: %v; network %s is not entered this way", accountAnnotation, trustDomainAnnotation, err, w.network)
		return
	}
	r := &workload.Workload{
		Name: k.name, Namespace: k.ns, Network: w.network,
		TunnelProtocol: workload.TunnelProtocol_HBONE,
		TrustDomain:    unless(trustDomain, defaultTrustDomain),
		ServiceAccount: unless(account, "default"),
		ClusterId:      unless(cmp.Or(g.Labels[clusterLabel], e.cfg.ClusterID), defaultCluster),
		WorkloadName:   k.name, CanonicalName: k.name, CanonicalRevision: "latest",
	}
	uid := e.cfg.ClusterID + "/gateway.networking.k8s.io/Gateway/" + k.ns + "/" + k.name + "/"
	ips, host := e.outsideAddresses(k, g, addrs)
	switch {
	case len(ips) > 0:
		r.Uid = uid + ips[0].String()
		for _, ip := range ips {
			r.Addresses = append(r.Addresses, ip.AsSlice())
		}
		w.into = toAddress(w.network, ips[0], uint32(l.Port))
	case host != "":
		// Proxies look a gateway up as a service, and resolve names of a service's
		// endpoints. The service's own name is one that nothing else can have: a
		// ServiceEntry's host holds no "_".
		port := []*workload.Port{{ServicePort: uint32(l.Port), TargetPort: uint32(l.Port)}}
		w.service = &workload.Service{Name: k.name, Namespace: k.ns, Hostname: k.name + "." + k.ns + "._gateway." + e.cfg.ClusterDomain, Ports: port}
		r.Uid, r.Hostname = uid+host, host
		r.Services = map[string]*workload.PortList{k.ns + "/" + w.service.Hostname: {Ports: port}}
		w.into = toHostname(k.ns, w.service.Hostname, uint32(l.Port))
	default:
		n.add("no address: set spec.addresses to where network %s can be entered from outside", w.network)
		return
	}
	w.workload = r
}

// outsideAddresses are where a Gateway is reached from other networks: what it
// says, else its Service's load balancer.
func (e *Engine) outsideAddresses(k nn, g *crd.Gateway, addrs []crd.GatewayAddress) (ips []netip.Addr, host string) {
	if s := e.services[nn{k.ns, serviceOfGateway(g)}]; s != nil && len(addrs) == 0 {
		for _, in := range s.Status.LoadBalancer.Ingress {
			if in.IP != "" {
				addrs = append(addrs, crd.GatewayAddress{Value: in.IP})
			} else if in.Hostname != "" {
				addrs = append(addrs, crd.GatewayAddress{Type: crd.AddressHostname, Value: in.Hostname})
			}
		}
	}
	var values []string
	for _, a := range addrs {
		if a.Type != crd.AddressHostname {
			values = append(values, a.Value)
		} else if host == "" {
			host = dnsName(a.Value)
		}
	}
	return parseAddrs(values), host
}

// setWayInto notes a change of the ways into a network and marks who is there.
func (e *Engine) setWayInto(k nn, was, now *waypoint) {
	touched := set[string]{}
	if was != nil && was.into != nil {
		touched[was.network] = struct{}{}
	}
	if now != nil && now.into != nil {
		touched[now.network] = struct{}{}
	}
	before := map[string]*workload.GatewayAddress{}
	for network := range touched {
		before[network] = e.networkGateway(network)
	}
	if was != nil && was.into != nil {
		if delete(e.gw.into[was.network], k); len(e.gw.into[was.network]) == 0 {
			delete(e.gw.into, was.network)
		}
	}
	if now != nil && now.into != nil {
		if e.gw.into[now.network] == nil {
			e.gw.into[now.network] = map[nn]*waypoint{}
		}
		e.gw.into[now.network][k] = now
	}
	for network := range touched {
		if proto.Equal(before[network], e.networkGateway(network)) {
			continue
		}
		// Gateways change rarely: looking at every pod costs less than an index.
		for pod, p := range e.pods {
			if e.podNetwork(p) == network {
				e.dirty.pods[pod] = struct{}{}
			}
		}
		e.markEntriesIn(network)
	}
}

// networkGateway is the way into a network from others: one of the root
// namespaces before others, so that no other namespace takes everybody's traffic
// over, then the oldest.
func (e *Engine) networkGateway(network string) *workload.GatewayAddress {
	ways := e.gw.into[network]
	if len(ways) == 0 {
		return nil
	}
	level := func(k nn) int {
		if e.set.isRoot(k.ns) {
			return 0
		}
		return 1
	}
	first := slices.MinFunc(slices.Collect(maps.Keys(ways)), func(a, b nn) int {
		return cmp.Or(cmp.Compare(level(a), level(b)), compareAge(ways[a].created, a, ways[b].created, b))
	})
	return ways[first].into
}

// applicationTunnel is what the Gateway that a pod belongs to asks for.
func (e *Engine) applicationTunnel(k nn, p *corev1.Pod) *workload.ApplicationTunnel {
	if name := p.Labels[gatewayNameLabel]; name != "" {
		if w := e.gw.points[nn{k.ns, name}]; w != nil {
			return w.tunnel
		}
	}
	return nil
}
