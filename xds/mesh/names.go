package mesh

import (
	"google.golang.org/protobuf/proto"

	"github.com/ambit-mesh/ambit/xds/api"
	"github.com/ambit-mesh/ambit/xds/api/ambit"
	"github.com/ambit-mesh/ambit/xds/hamt"
)

// What DNS asks of a snapshot: names as they are on the wire, lower case and
// without the final dot. The lists are the snapshot's own and must not be
// changed.

// ServicesByHostname returns every service with a host name, first seen first.
// A wildcard host is found by its own name ("*.example.com").
func (s *Snapshot) ServicesByHostname(host string) []*Service {
	list, _ := s.orEmpty().hosts.Get(host)
	return list
}

// WorkloadsByDNSName returns the workloads with a name of their own, which are
// pods of a headless service ("web-0.web.shop.svc.cluster.local"), best first.
// There are several when clusters share a name.
func (s *Snapshot) WorkloadsByDNSName(name string) []*Workload {
	list, _ := s.orEmpty().names.Get(name)
	return list
}

func newNames() hamt.Map[string, []*Workload] {
	return hamt.NewMap[string, []*Workload](hamt.HashString)
}

// indexNames replaces what the index has of old by what w has; either may be
// nil.
func (t *Txn) indexNames(old, w *Workload) {
	if w != nil {
		for _, name := range w.DNSNames {
			list, _ := t.s.names.Get(name)
			t.s.names = t.s.names.Set(t.ed, name, withWorkload(list, w, old))
		}
	}
	if old == nil {
		return
	}
	for _, name := range old.DNSNames {
		if w != nil && w.HasDNSName(name) {
			continue
		}
		list, _ := t.s.names.Get(name)
		t.s.names = setOrDelete(t.s.names, t.ed, name, withoutWorkload(list, old))
	}
}

// HasDNSName reports whether name is one of the workload's own names.
func (w *Workload) HasDNSName(name string) bool {
	for _, have := range w.DNSNames {
		if have == name {
			return true
		}
	}
	return false
}

// PortName names a TCP port of a service.
type PortName struct {
	Name string
	Port uint16
}

// portNames reads Ambit's extension of services.
func (d *decoder) portNames(s *Service) {
	for _, e := range s.Extensions {
		if e.Name != api.ServiceExtension || e.TypeURL != api.ServiceExtensionType {
			continue
		}
		var x ambit.ServiceExtension
		if err := proto.Unmarshal(e.Value, &x); err != nil {
			d.fail("extensions["+e.Name+"]", err)
			return
		}
		for _, p := range x.GetPortNames() {
			s.PortNames = append(s.PortNames, PortName{intern(p.GetName()), d.port("extensions["+e.Name+"].port_names.port", p.GetPort())})
		}
	}
}
