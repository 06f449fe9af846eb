package inbound

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/outbound"
)

// TargetError refuses a CONNECT before policy is asked.
type TargetError struct {
	Status int // of the answer
	Reason string
}

func (e *TargetError) Error() string { return e.Reason }

func badRequest(format string, args ...any) *TargetError {
	return &TargetError{400, fmt.Sprintf(format, args...)}
}

func unavailable(format string, args ...any) *TargetError {
	return &TargetError{503, fmt.Sprintf(format, args...)}
}

// maxAuthority is the longest DNS name, brackets and a port.
const maxAuthority = 253 + 2 + 6

// Destination is where a CONNECT to a pod leads.
type Destination struct {
	// Addr is what policy is asked about: always the address at which the
	// tunnel arrived, so that a peer can reach nothing but this pod, whatever
	// it asks for.
	Addr netip.AddrPort
	// Header is the destination to write into a PROXY header, which the
	// application expects before the bytes; invalid where it expects none.
	Header netip.AddrPort
}

// target is Target, for the ports that are served.
func (p *Proxy) target(m *mesh.Snapshot, self *mesh.Workload, method, authority string, local netip.Addr) (Destination, error) {
	d, err := Target(m, self, method, authority, local)
	if err == nil && p.cfg.Only != 0 && d.Addr.Port() != p.cfg.Only {
		return Destination{}, unavailable("port %d is not for the mesh here, only %d is", d.Addr.Port(), p.cfg.Only)
	}
	return d, err
}

// Target decides where a CONNECT leads. The pod's own address is served, and
// host names of services that it stands for. What a waypoint or an application
// tunnel is asked for may be any address: their clients send the original
// destination.
func Target(m *mesh.Snapshot, self *mesh.Workload, method, authority string, local netip.Addr) (Destination, error) {
	if method != "CONNECT" {
		return Destination{}, badRequest("method %.20q: only CONNECT is served here", method)
	}
	host, port, err := splitAuthority(authority)
	if err != nil {
		return Destination{}, err
	}
	var header netip.AddrPort
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr = addr.Unmap(); addr.Zone() != "" || addr != local && self.AppTunnel == nil && !waypointOf(m, self, addr) {
			return Destination{}, badRequest("authority %s is not this pod's address %s", authority, local)
		}
		header = netip.AddrPortFrom(addr, port)
	} else if !isHostname(host) {
		return Destination{}, badRequest("authority %q is neither an address nor a host name", authority)
	} else {
		svc, target, err := servicePort(m, self, host, port)
		if err != nil {
			return Destination{}, err
		}
		header = netip.AddrPortFrom(vip(svc, self.Network), port)
		port = target
	}
	if outbound.OwnPort(port) {
		return Destination{}, unavailable("port %d belongs to the proxy", port)
	}
	t := self.AppTunnel
	if t == nil {
		return Destination{Addr: netip.AddrPortFrom(local, port)}, nil
	}
	if t.Port != 0 {
		port = t.Port
	}
	d := Destination{Addr: netip.AddrPortFrom(local, port)}
	if t.Protocol == workload.ApplicationTunnel_PROXY {
		if !header.Addr().IsValid() {
			return Destination{}, unavailable("service %s has no address in network %q to tell the application", host, self.Network)
		}
		d.Header = header
	}
	return d, nil
}

// vip is the address that stands for a service named by host name: of this
// network, IPv4 if there is one. Invalid if there is none.
func vip(svc *mesh.Service, network string) netip.Addr {
	var other netip.Addr
	for _, v := range svc.VIPs {
		switch {
		case v.Network != network:
		case v.Addr.Is4():
			return v.Addr
		case !other.IsValid():
			other = v.Addr
		}
	}
	return other
}

// isHostname tells names from malformed addresses: a name whose last label is
// a number is an address to those who read it (https://url.spec.whatwg.org/#ends-in-a-number-checker),
// so 010.244.2.2 is a bad request and no unknown service.
func isHostname(s string) bool {
	s = strings.TrimSuffix(s, ".")
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_') {
			return false
		}
	}
	last := s[strings.LastIndexByte(s, '.')+1:]
	return strings.Trim(last, "0123456789") != ""
}

func splitAuthority(a string) (string, uint16, error) {
	if len(a) > maxAuthority {
		return "", 0, badRequest("authority of %d bytes is too long", len(a))
	}
	host, p, err := net.SplitHostPort(a)
	if err != nil || host == "" {
		return "", 0, badRequest("authority %q is not host:port", a)
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil || port == 0 {
		return "", 0, badRequest("authority %q has no valid port", a)
	}
	return host, uint16(port), nil
}

// servicePort maps a service's port to this pod's. A pod without application
// tunnel answers only for services that it serves or is the waypoint of.
func servicePort(m *mesh.Snapshot, self *mesh.Workload, host string, port uint16) (*mesh.Service, uint16, error) {
	svc := m.ServiceByHostname(strings.TrimSuffix(host, "."), self.Namespace)
	if svc == nil {
		return nil, 0, unavailable("service %.253q is not known", host)
	}
	ports, serves := self.Services[svc.Host]
	if !serves && self.AppTunnel == nil && !waypointOfService(m, self, svc) {
		return nil, 0, unavailable("this pod is no endpoint of service %s", svc.Host)
	}
	for _, p := range ports {
		if p.Service == port && p.Target > 0 {
			return svc, p.Target, nil
		}
	}
	if p, ok := svc.Port(port); ok && p.Target > 0 {
		return svc, p.Target, nil
	}
	if self.AppTunnel != nil {
		return svc, port, nil
	}
	return nil, 0, unavailable("service %s has no port %d", svc.Host, port)
}

// waypointOf reports whether self is the waypoint of what addr is: a client
// sends a waypoint the original destination as authority.
func waypointOf(m *mesh.Snapshot, self *mesh.Workload, addr netip.Addr) bool {
	if w := m.WorkloadByAddr(self.Network, addr); w != nil {
		return isGateway(m, self, w.Waypoint)
	}
	svc := m.ServiceByVIP(self.Network, addr, self.Namespace)
	return svc != nil && waypointOfService(m, self, svc)
}

func waypointOfService(m *mesh.Snapshot, self *mesh.Workload, svc *mesh.Service) bool {
	for i := range svc.WeightedWaypoints {
		if isGateway(m, self, &svc.WeightedWaypoints[i].Gateway) {
			return true
		}
	}
	return isGateway(m, self, svc.Waypoint)
}

func isGateway(m *mesh.Snapshot, self *mesh.Workload, gw *mesh.GatewayAddress) bool {
	if gw == nil {
		return false
	}
	if gw.Addr.IsValid() {
		if gw.Network == self.Network && self.HasAddr(gw.Addr) {
			return true
		}
		svc := m.ServiceByVIP(gw.Network, gw.Addr, self.Namespace)
		return svc != nil && m.Endpoints(svc.Host).Contains(self.UID)
	}
	return m.Endpoints(gw.Host).Contains(self.UID)
}
