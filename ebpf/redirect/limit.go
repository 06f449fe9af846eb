package redirect

import "slices"

// Limit is something that a redirector cannot do, in words for who runs a node. The
// conformance suite has a row for each, which fails when a limit is none any more.
type Limit string

// What a pod can do that has the capabilities which container runtimes give by
// default, CAP_NET_RAW above all.
const (
	LimitMark   Limit = "a pod with CAP_NET_RAW can mark its sockets as the proxy does (0x539) and connect past the mesh"
	LimitPacket Limit = "a pod with CAP_NET_RAW can open connections past the mesh with packet sockets, which meet no rules"
	LimitTunnel Limit = "packets that a pod wraps itself (GRE, VXLAN, Geneve) are not looked into: a node that unpacks strangers' tunnels is a way past the mesh"
	LimitPorts  Limit = "a pod that listens on the proxy's ports (15001, 15006, 15008, 15053) before the proxy does, or beside it, gets connections that no policy has seen"
)

// What the node notices.
const LimitProbes Limit = "probes of some pods meet the mesh as strangers' connections do: the node's end of the pod's cable, where the node's own connections are known by, was not found (it is no veth, or ends elsewhere)"

// What applications notice.
const (
	LimitDevice   Limit = "a socket bound to an interface (SO_BINDTODEVICE) cannot connect"
	LimitListener Limit = "an app that marks its listening socket (SO_MARK) gets no connections: the mark that leads its answers back to the proxy does not come to bear"
)

var (
	rulesLimits = []Limit{LimitPacket, LimitTunnel, LimitPorts, LimitDevice}
	hooksLimits = []Limit{LimitTunnel, LimitListener}
)

// Limits names what the rules cannot do. That of marks ends with the first proxy
// whose cgroup is known, where the kernel can compare it; see Proxy.
func (d *Dataplane) Limits() []Limit {
	limits := slices.Clone(rulesLimits)
	if d.byMark() {
		limits = append(limits, LimitMark)
	}
	return limits
}

// Limits names what the programs cannot do. That of probes is there while a pod is
// that it is about.
func (h *Hooks) Limits() []Limit {
	limits := slices.Clone(hooksLimits)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.cfg.Probes && len(h.blind) > 0 {
		limits = append(limits, LimitProbes)
	}
	return limits
}
