package dns

import (
	"bytes"
	"net/netip"
	"strings"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

// resolveSRV answers for "_port._tcp.service": a port of the service, or of each
// endpoint of a headless one. The control plane of the reference sends no names
// of ports; then the question is not ours.
func (l *lookup) resolveSRV() {
	port, rest, ok := cutUnderscore(l.q.name)
	if !ok {
		return
	}
	proto, rest, ok := cutUnderscore(rest)
	if !ok || string(proto) != "tcp" || l.q.labels < 3 {
		return
	}
	h, ok := l.find(rest, l.q.labels-2)
	if !ok || h.pods != nil || h.one != nil || h.wildcard() || len(h.svc.PortNames) == 0 {
		return
	}
	l.a.owned, l.a.cluster = true, h.cluster
	if h.cname != nil {
		l.a.cname = l.q.name[:len(l.q.name)-len(rest)+len(h.cname)]
	}
	for _, p := range h.svc.PortNames {
		if !strings.EqualFold(p.Name, view(port)) {
			continue
		}
		if !headless(h.svc) {
			l.a.targets = append(l.a.targets, target{host: h.svc.Host.Name, port: p.Port})
			continue
		}
		l.eachEndpoint(h.svc, func(e mesh.Endpoint) bool {
			l.addTarget(h.svc, e, p.Port)
			return len(l.a.targets) < l.q.max
		})
	}
}

// cutUnderscore splits "_first.rest" (RFC 2782).
func cutUnderscore(name []byte) (first, rest []byte, ok bool) {
	first, rest, ok = bytes.Cut(name, dot)
	if !ok || len(first) < 2 || first[0] != '_' {
		return nil, nil, false
	}
	return first[1:], rest, true
}

// addTarget names an endpoint: by its own name, else by its address.
func (l *lookup) addTarget(s *mesh.Service, e mesh.Endpoint, port uint16) {
	if !l.usable(s, e.Workload) {
		return
	}
	t := target{svc: s.Host.Name, port: port}
	if p, ok := s.Port(port); ok && p.Target > 0 {
		t.port = p.Target
	}
	for _, p := range e.Ports {
		if p.Service == port && p.Target > 0 {
			t.port = p.Target
		}
	}
	for _, a := range e.Workload.Addrs {
		if l.family(s, a) {
			t.addr = a
			break
		}
	}
	if !t.addr.IsValid() {
		return
	}
	for _, n := range e.Workload.DNSNames {
		if i := strings.IndexByte(n, '.'); i > 0 && n[i+1:] == s.Host.Name {
			t.host = n
			break
		}
	}
	l.a.targets = append(l.a.targets, t)
}

// appendHost appends the target's name on the wire.
func (t *target) appendHost(out []byte) []byte {
	if t.host != "" {
		return appendName(out, []byte(t.host))
	}
	var buf [maxName]byte
	b := appendDashed(buf[:0], t.addr)
	b = append(b, '.')
	return appendName(out, append(b, t.svc...))
}

// appendDashed writes an address as Kubernetes does: "10-0-0-1", and all eight
// groups of an IPv6 address, since a label must not begin with a dash.
func appendDashed(b []byte, a netip.Addr) []byte {
	start := len(b)
	if a.Is4() {
		b = a.AppendTo(b)
	} else {
		b = append(b, a.StringExpanded()...)
	}
	for i := start; i < len(b); i++ {
		if b[i] == '.' || b[i] == ':' {
			b[i] = '-'
		}
	}
	return b
}
