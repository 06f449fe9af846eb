package inbound

import (
	"strings"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

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

// likelyService is one of the pod's services that leads to a port of it, for
// clients that do not say which they meant: plain ones, and those that went to the
// pod's own address. It only labels telemetry. A service with an address comes
// before a headless one; then the name decides, so that equal calls count equally.
func likelyService(m *mesh.Snapshot, self *mesh.Workload, port uint16) *mesh.Service {
	var best *mesh.Service
	for host, ports := range self.Services {
		if !leadsTo(ports, port) {
			continue
		}
		svc := m.Service(host)
		if svc == nil {
			continue
		}
		if best == nil || addressed(svc) && !addressed(best) || addressed(svc) == addressed(best) && less(svc.Host, best.Host) {
			best = svc
		}
	}
	return best
}

func leadsTo(ports []mesh.Port, target uint16) bool {
	for _, p := range ports {
		if p.Target == target {
			return true
		}
	}
	return false
}

func addressed(s *mesh.Service) bool { return len(s.VIPs) > 0 }

func less(a, b mesh.Hostname) bool {
	return a.Namespace < b.Namespace || a.Namespace == b.Namespace && a.Name < b.Name
}
