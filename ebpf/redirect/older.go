package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/ebpf/sockdiag"
)

// Uncaptured are a pod's connections that do not pass the proxy although their
// like would: they are older than the pod's enrolment.
type Uncaptured struct {
	Connections []sockdiag.Socket
	// HalfOpen are those still being opened. Whatever answered them now would
	// complete a connection past the mesh after its enrolment.
	HalfOpen []sockdiag.Socket
}

// Uncaptured lists ns's connections that rules would capture and did not. Right
// after Apply that is what is older; later the node's own probes are among them.
func (d *Dataplane) Uncaptured(ns *netns.NS, rules PodRules) (Uncaptured, error) {
	return uncaptured(ns, rules, nil)
}

// Uncaptured is as a Dataplane's.
func (h *Hooks) Uncaptured(ns *netns.NS, rules PodRules) (Uncaptured, error) {
	proxies, err := h.proxies()
	if err != nil {
		return Uncaptured{}, err
	}
	return uncaptured(ns, rules, proxies)
}

// Reset ends connections of ns: both ends are told. It returns how many were still there.
func (d *Dataplane) Reset(ns *netns.NS, sockets []sockdiag.Socket) (int, error) {
	return sockdiag.Destroy(ns, sockets)
}

// Reset is as a Dataplane's.
func (h *Hooks) Reset(ns *netns.NS, sockets []sockdiag.Socket) (int, error) {
	return sockdiag.Destroy(ns, sockets)
}

// uncaptured lists and sorts out. proxies are cgroups by number; with none known
// the mark tells the proxy's sockets.
func uncaptured(ns *netns.NS, rules PodRules, proxies map[uint64]bool) (Uncaptured, error) {
	all, err := sockdiag.List(ns, sockdiag.Connections|sockdiag.HalfOpen|sockdiag.Of(sockdiag.Listen))
	if err != nil {
		return Uncaptured{}, err
	}
	return sortOut(all, rules, proxies), nil
}

// ends are both addresses of a socket.
type ends struct{ local, remote netip.AddrPort }

// sortOut finds the connections that the mesh does not carry. Those it carries
// have their other end in the same namespace: at an alias, as the mirror image of
// the proxy's dial, or, where addresses are translated, at the proxy's port.
func sortOut(all []sockdiag.Socket, rules PodRules, proxies map[uint64]bool) Uncaptured {
	there := make(map[ends]bool, len(all))
	listens := map[uint16]bool{}
	taken := map[netip.AddrPort]bool{} // apps' ends of what the proxy took by translation
	for _, s := range all {
		if s.State == sockdiag.Listen {
			listens[s.Local.Port()] = true
			continue
		}
		there[ends{s.Local, s.Remote}] = true
		if p := s.Local.Port(); (p == PortOutbound || p == PortDNS) && ofProxy(s, proxies) {
			taken[s.Remote] = true
		}
	}
	var out Uncaptured
	for _, s := range all {
		inbound := s.State == sockdiag.SynRecv || listens[s.Local.Port()]
		switch {
		case s.State == sockdiag.Listen, ofProxy(s, proxies), isOwn(s.Local.Addr()), isOwn(s.Remote.Addr()),
			there[ends{s.Remote, s.Local}], taken[s.Local]:
		case inbound && (rules.BypassInbound || rules.ExcludeInbound.Has(s.Local.Port())):
		case !inbound && rules.ExcludeOutbound.Has(s.Remote.Port()):
		case sockdiag.HalfOpen.Has(s.State):
			out.HalfOpen = append(out.HalfOpen, s)
		default:
			out.Connections = append(out.Connections, s)
		}
	}
	return out
}

// ofProxy tells the proxy's sockets. A request that nobody accepted yet is in no
// cgroup, and carries the mark of its listener.
func ofProxy(s sockdiag.Socket, proxies map[uint64]bool) bool {
	marked := s.Mark&MarkMask == MarkProxy
	if s.State == sockdiag.SynRecv {
		p := s.Local.Port()
		return marked || p == PortOutbound || p == PortInbound || p == PortHBONE
	}
	if len(proxies) > 0 && s.Cgroup != 0 {
		return proxies[s.Cgroup]
	}
	return marked
}

// isOwn reports an address that no packet leaves the pod for.
func isOwn(a netip.Addr) bool { return a.IsLoopback() || aliases6.Contains(a) }

// proxies returns the cgroups whose processes were made the proxy, by number.
func (h *Hooks) proxies() (map[uint64]bool, error) {
	dirs, err := os.ReadDir(h.path(proxyDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list proxies: %w", err)
	}
	ids := make(map[uint64]bool, len(dirs))
	for _, d := range dirs {
		if id, err := strconv.ParseUint(d.Name(), 10, 64); err == nil {
			ids[id] = true
		}
	}
	return ids, nil
}
