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

// Target is where a CONNECT to a pod leads: always the address at which the
// tunnel arrived, and the port that the authority means. A peer can thereby
// reach nothing but this pod, whatever it asks for.
func Target(m *mesh.Snapshot, self *mesh.Workload, method, authority string, local netip.Addr) (netip.AddrPort, error) {
	if method != "CONNECT" {
		return netip.AddrPort{}, badRequest("method %.20q: only CONNECT is served here", method)
	}
	host, port, err := splitAuthority(authority)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr = addr.Unmap(); addr != local && self.AppTunnel == nil && !waypointOf(m, self, addr) {
			return netip.AddrPort{}, badRequest("authority %s is not this pod's address %s", authority, local)
		}
	} else if port, err = servicePort(m, self, host, port); err != nil {
		return netip.AddrPort{}, err
	}
	if outbound.OwnPort(port) {
		return netip.AddrPort{}, unavailable("port %d belongs to the proxy", port)
	}
	if t := self.AppTunnel; t != nil {
		if t.Protocol != workload.ApplicationTunnel_NONE {
			return netip.AddrPort{}, unavailable("application tunnel %s is not supported by this build", t.Protocol)
		}
		if t.Port != 0 {
			port = t.Port
		}
	}
	return netip.AddrPortFrom(local, port), nil
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

// servicePort maps a service's port to this pod's.
func servicePort(m *mesh.Snapshot, self *mesh.Workload, host string, port uint16) (uint16, error) {
	svc := m.ServiceByHostname(host, self.Namespace)
	if svc == nil {
		return 0, unavailable("service %.253q is not known", host)
	}
	ports, ok := self.Services[svc.Host]
	if !ok {
		return 0, unavailable("this pod is no endpoint of service %s", svc.Host)
	}
	for _, p := range ports {
		if p.Service == port && p.Target > 0 {
			return p.Target, nil
		}
	}
	if p, ok := svc.Port(port); ok && p.Target > 0 {
		return p.Target, nil
	}
	return 0, unavailable("service %s has no port %d", svc.Host, port)
}

// waypointOf reports whether self is the waypoint of what addr is: a client
// sends a waypoint the original destination as authority.
func waypointOf(m *mesh.Snapshot, self *mesh.Workload, addr netip.Addr) bool {
	if w := m.WorkloadByAddr(self.Network, addr); w != nil {
		return isGateway(m, self, w.Waypoint)
	}
	svc := m.ServiceByVIP(self.Network, addr, self.Namespace)
	if svc == nil {
		return false
	}
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

// addressedService is the service that the client connected to, as its
// Forwarded header says. It only labels telemetry, and only with services that
// this pod really serves: the header is the peer's word.
func addressedService(m *mesh.Snapshot, self *mesh.Workload, forwarded string) *mesh.Service {
	for part := range strings.SplitSeq(forwarded, ";") {
		host, ok := strings.CutPrefix(strings.TrimSpace(part), "host=")
		if !ok {
			continue
		}
		svc := m.ServiceByHostname(strings.Trim(host, `"`), self.Namespace)
		if svc == nil {
			return nil
		}
		if _, serves := self.Services[svc.Host]; serves {
			return svc
		}
		return nil
	}
	return nil
}
