// Package dns is the lab's cluster DNS: A, AAAA and SRV records of Services,
// headless Services and StatefulSet pods, PTR for their addresses, as the
// Kubernetes DNS specification 1.1.0 has them
// (https://github.com/kubernetes/dns/blob/master/docs/specification.md).
//
// A Server answers on every address it is given, in the network namespace it is
// given; several serve one Zone. Names outside the cluster do not exist: the lab
// has no way out.
package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/test/lab/cluster"
)

// Domain is the cluster's domain.
const Domain = "cluster.local."

// ttl is that of CoreDNS in Kubernetes: short, so that changes are seen.
const ttl = 5

// Zone answers questions from the objects of a store.
type Zone struct{ Store *cluster.Store }

// Serve answers UDP and TCP on port 53 of the addresses until ctx ends.
func (z *Zone) Serve(ctx context.Context, ns *netns.NS, addrs []netip.Addr) error {
	var servers []*dns.Server
	defer func() {
		for _, s := range servers {
			_ = s.Shutdown() // a server that did not start has nothing to end
		}
	}()
	errc := make(chan error, 2*len(addrs))
	for _, a := range addrs {
		at := netip.AddrPortFrom(a, 53).String()
		var pc net.PacketConn
		var ln net.Listener
		err := ns.Do(func() (err error) {
			if pc, err = net.ListenPacket("udp", at); err != nil {
				return err
			}
			ln, err = net.Listen("tcp", at)
			return err
		})
		if err != nil {
			return fmt.Errorf("serve DNS on %s: %w", at, err)
		}
		servers = append(servers, &dns.Server{PacketConn: pc, Handler: z}, &dns.Server{Listener: ln, Handler: z})
	}
	for _, s := range servers {
		go func() { errc <- s.ActivateAndServe() }()
	}
	select {
	case err := <-errc:
		return fmt.Errorf("serve DNS: %w", err)
	case <-ctx.Done():
		return nil
	}
}

// ServeDNS implements dns.Handler.
func (z *Zone) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	m.RecursionAvailable = true
	if len(q.Question) == 1 {
		z.Answer(m, q.Question[0])
	} else {
		m.Rcode = dns.RcodeFormatError
	}
	size := dns.MinMsgSize
	if o := q.IsEdns0(); o != nil {
		size = int(o.UDPSize())
		m.SetEdns0(o.UDPSize(), false)
	}
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		m.Truncate(size)
	}
	_ = w.WriteMsg(m) // the client asks again
}

// Answer fills in the reply to one question.
func (z *Zone) Answer(m *dns.Msg, q dns.Question) {
	m.Authoritative = true
	name := strings.ToLower(q.Name)
	if strings.HasSuffix(name, ".arpa.") {
		z.pointer(m, q, name)
		return
	}
	labels, ok := strings.CutSuffix(name, "."+Domain)
	if !ok {
		m.Rcode = dns.RcodeNameError
		return
	}
	parts := strings.Split(labels, ".")
	n := len(parts)
	switch {
	case n >= 3 && parts[n-1] == "svc":
		z.service(m, q, parts[n-3], parts[n-2], parts[:n-3])
	case n == 3 && parts[2] == "pod":
		z.pod(m, q, parts[0])
	case n == 2 && parts[1] == "svc" || n == 1 && parts[0] == "svc":
		// A node of the tree without records.
	default:
		m.Rcode = dns.RcodeNameError
	}
	if len(m.Answer) == 0 {
		m.Ns = append(m.Ns, &dns.SOA{
			Hdr: dns.RR_Header{Name: Domain, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: ttl},
			Ns:  "ns.dns." + Domain, Mbox: "hostmaster." + Domain, Serial: uint32(time.Now().Unix()), Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: ttl,
		})
	}
}

func header(name string, t uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: t, Class: dns.ClassINET, Ttl: ttl}
}

// address adds an A or AAAA record when the question wants that family.
func address(m *dns.Msg, q dns.Question, name string, a netip.Addr) {
	switch {
	case a.Is4() && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY):
		m.Answer = append(m.Answer, &dns.A{Hdr: header(name, dns.TypeA), A: a.AsSlice()})
	case a.Is6() && (q.Qtype == dns.TypeAAAA || q.Qtype == dns.TypeANY):
		m.Answer = append(m.Answer, &dns.AAAA{Hdr: header(name, dns.TypeAAAA), AAAA: a.AsSlice()})
	}
}

// target is one endpoint of a headless service.
type target struct {
	host  string // first label of its own name
	addr  netip.Addr
	ports []discoveryv1.EndpointPort
}

func (z *Zone) targets(s *corev1.Service) []target {
	var out []target
	for _, e := range cluster.List[*discoveryv1.EndpointSlice](z.Store, s.Namespace) {
		if e.Labels[discoveryv1.LabelServiceName] != s.Name {
			continue
		}
		for _, ep := range e.Endpoints {
			if ep.Conditions.Ready != nil && !*ep.Conditions.Ready && !s.Spec.PublishNotReadyAddresses {
				continue
			}
			for _, addr := range ep.Addresses {
				a, err := netip.ParseAddr(addr)
				if err != nil {
					continue
				}
				host := strings.NewReplacer(".", "-", ":", "-").Replace(a.StringExpanded())
				if a.Is4() {
					host = strings.ReplaceAll(a.String(), ".", "-")
				}
				if ep.Hostname != nil {
					host = *ep.Hostname
				}
				out = append(out, target{host, a, e.Ports})
			}
		}
	}
	return out
}

// service answers for [_port._proto.|endpoint.]service.namespace.svc.
func (z *Zone) service(m *dns.Msg, q dns.Question, name, ns string, prefix []string) {
	s, ok := cluster.Get[*corev1.Service](z.Store, ns, name)
	if !ok {
		m.Rcode = dns.RcodeNameError
		return
	}
	base := name + "." + ns + ".svc." + Domain
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		if len(prefix) > 0 {
			m.Rcode = dns.RcodeNameError
			return
		}
		to := dns.Fqdn(s.Spec.ExternalName)
		m.Answer = append(m.Answer, &dns.CNAME{Hdr: header(q.Name, dns.TypeCNAME), Target: to})
		if strings.HasSuffix(strings.ToLower(to), "."+Domain) && to != q.Name {
			next := new(dns.Msg)
			z.Answer(next, dns.Question{Name: to, Qtype: q.Qtype, Qclass: q.Qclass})
			m.Answer = append(m.Answer, next.Answer...)
		}
		return
	}
	headless := s.Spec.ClusterIP == corev1.ClusterIPNone
	switch {
	case len(prefix) == 2 && strings.HasPrefix(prefix[0], "_") && strings.HasPrefix(prefix[1], "_"):
		z.srv(m, q, s, base, prefix[0][1:], prefix[1][1:])
	case len(prefix) == 1 && headless:
		found := false
		for _, t := range z.targets(s) {
			if t.host == prefix[0] {
				found = true
				address(m, q, q.Name, t.addr)
			}
		}
		if !found {
			m.Rcode = dns.RcodeNameError
		}
	case len(prefix) > 0:
		m.Rcode = dns.RcodeNameError
	case q.Qtype == dns.TypeSRV:
		z.srv(m, q, s, base, "", "")
	case headless:
		for _, t := range z.targets(s) {
			address(m, q, q.Name, t.addr)
		}
	default:
		for _, ip := range s.Spec.ClusterIPs {
			if a, err := netip.ParseAddr(ip); err == nil {
				address(m, q, q.Name, a)
			}
		}
	}
}

// srv answers for the ports of a service: one record per port, or for a headless
// one per port and endpoint.
func (z *Zone) srv(m *dns.Msg, q dns.Question, s *corev1.Service, base, port, proto string) {
	if q.Qtype != dns.TypeSRV && q.Qtype != dns.TypeANY {
		return
	}
	wanted := func(name string, p corev1.Protocol) bool {
		return port == "" || strings.EqualFold(name, port) && strings.EqualFold(string(p), proto)
	}
	seen := map[string]bool{} // an endpoint with two addresses has one record
	add := func(host string, p int32) {
		rr := &dns.SRV{Hdr: header(q.Name, dns.TypeSRV), Priority: 0, Weight: 100, Port: uint16(p), Target: host}
		if !seen[rr.String()] {
			seen[rr.String()] = true
			m.Answer = append(m.Answer, rr)
		}
	}
	if s.Spec.ClusterIP != corev1.ClusterIPNone {
		for _, p := range s.Spec.Ports {
			if wanted(p.Name, p.Protocol) {
				add(base, p.Port)
			}
		}
	} else {
		for _, t := range z.targets(s) {
			for _, p := range t.ports {
				if p.Port != nil && p.Name != nil && p.Protocol != nil && wanted(*p.Name, *p.Protocol) {
					host := t.host + "." + base
					add(host, *p.Port)
					extra := new(dns.Msg)
					address(extra, dns.Question{Qtype: dns.TypeANY}, host, t.addr)
					m.Extra = append(m.Extra, extra.Answer...)
				}
			}
		}
	}
	if len(m.Answer) == 0 {
		m.Rcode = dns.RcodeNameError
	}
}

// pod answers for a-b-c-d.namespace.pod with the address in the name.
func (z *Zone) pod(m *dns.Msg, q dns.Question, label string) {
	a, err := netip.ParseAddr(strings.ReplaceAll(label, "-", "."))
	if err != nil {
		a, err = netip.ParseAddr(strings.ReplaceAll(label, "-", ":"))
	}
	if err != nil {
		m.Rcode = dns.RcodeNameError
		return
	}
	address(m, q, q.Name, a)
}

func (z *Zone) pointer(m *dns.Msg, q dns.Question, name string) {
	for _, s := range cluster.List[*corev1.Service](z.Store, "") {
		base := s.Name + "." + s.Namespace + ".svc." + Domain
		for _, ip := range s.Spec.ClusterIPs {
			if r, err := dns.ReverseAddr(ip); err == nil && r == name {
				m.Answer = append(m.Answer, &dns.PTR{Hdr: header(q.Name, dns.TypePTR), Ptr: base})
			}
		}
		if s.Spec.ClusterIP != corev1.ClusterIPNone {
			continue
		}
		for _, t := range z.targets(s) {
			if r, err := dns.ReverseAddr(t.addr.String()); err == nil && r == name {
				m.Answer = append(m.Answer, &dns.PTR{Hdr: header(q.Name, dns.TypePTR), Ptr: t.host + "." + base})
			}
		}
	}
	if len(m.Answer) == 0 {
		m.Rcode = dns.RcodeNameError
	}
}

// Conf is the resolv.conf of a pod.
func Conf(server netip.Addr, namespace string) string {
	d := strings.TrimSuffix(Domain, ".")
	return fmt.Sprintf("search %s.svc.%s svc.%s %s\nnameserver %s\noptions ndots:5\n", namespace, d, d, d, server)
}
