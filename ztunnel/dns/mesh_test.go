package dns

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/leak"
	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

func TestMain(m *testing.M) { leak.Main(m) }

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// service makes "namespace/host" with VIPs; a VIP of another network is
// "network/address".
func service(host string, vips ...string) *mesh.Service {
	h, err := mesh.ParseHostname(host)
	if err != nil {
		panic("BUG: " + err.Error())
	}
	name, _, _ := strings.Cut(h.Name, ".")
	s := &mesh.Service{Name: name, Namespace: h.Namespace, Host: h}
	for _, v := range vips {
		network, a, ok := strings.Cut(v, "/")
		if !ok {
			network, a = "", v
		}
		s.VIPs = append(s.VIPs, mesh.NetAddr{Network: network, Addr: ip(a)})
	}
	return s
}

func with(s *mesh.Service, f func(*mesh.Service)) *mesh.Service { f(s); return s }

func portNames(names ...mesh.PortName) func(*mesh.Service) {
	return func(s *mesh.Service) {
		s.PortNames = names
		for _, n := range names {
			s.Ports = append(s.Ports, mesh.Port{Service: n.Port, Target: n.Port + 8000})
		}
	}
}

// endpoint makes a pod behind services; its name of its own, if any, is that of a
// StatefulSet's pod.
func endpoint(ns, name, addrs string, own string, hosts ...string) *mesh.Workload {
	w := &mesh.Workload{UID: "Kubernetes//Pod/" + ns + "/" + name, Name: name, Node: "n1", Traits: &mesh.Traits{Namespace: ns, ServiceAccount: "default", Healthy: true, Capacity: 1, Services: map[mesh.Hostname][]mesh.Port{}, CanonicalName: name, CanonicalRevision: "v1"}}
	for a := range strings.FieldsSeq(addrs) {
		w.Addrs = append(w.Addrs, ip(a))
	}
	for _, h := range hosts {
		w.Services[mesh.Hostname{Namespace: ns, Name: h}] = nil
	}
	if own != "" {
		w.DNSNames = []string{own}
	}
	return w
}

func snapshot(things ...any) *mesh.Snapshot {
	txn := mesh.Empty().Edit()
	for _, x := range things {
		switch v := x.(type) {
		case *mesh.Service:
			txn.PutService(v)
		case *mesh.Workload:
			txn.PutWorkload(v)
		default:
			panic(fmt.Sprintf("BUG: a mesh has no %T", x))
		}
	}
	return txn.Commit()
}

// shop is a mesh with one of each.
func shop() *mesh.Snapshot {
	const db = "db.shop.svc.cluster.local"
	sick := endpoint("shop", "db-2", "10.1.0.3", "db-2."+db, db)
	sick.Healthy = false
	late := endpoint("shop", "late-0", "10.1.1.1", "late-0.late.shop.svc.cluster.local", "late.shop.svc.cluster.local")
	late.Healthy = false
	far := endpoint("shop", "db-far", "10.1.0.9", "db-far."+db, db)
	far.Network = "far"
	canonical := func(s *mesh.Service) { s.Canonical = true }
	return snapshot(
		with(service("shop/web.shop.svc.cluster.local", "10.96.0.1", "fd00:96::1"), portNames(mesh.PortName{Name: "http", Port: 80}, mesh.PortName{Name: "admin", Port: 81})),
		service("other/web.other.svc.cluster.local", "10.96.0.2"),
		with(service("shop/v4.shop.svc.cluster.local", "10.96.0.3", "fd00:96::3"), func(s *mesh.Service) { s.Families = workload.IPFamilies_IPV4_ONLY }),
		with(service("shop/"+db), portNames(mesh.PortName{Name: "pg", Port: 5432})),
		endpoint("shop", "db-0", "10.1.0.1 fd00:1::1", "db-0."+db, db),
		endpoint("shop", "db-1", "10.1.0.2 fd00:1::2", "", db), sick, far,
		with(service("shop/late.shop.svc.cluster.local"), func(s *mesh.Service) { s.AllowUnhealthy = true }), late,
		service("shop/nobody.shop.svc.cluster.local"),
		service("shop/api.example.com", "240.240.0.1", "2001:2::1"),
		service("shop/*.wild.example.com", "240.240.0.2"),
		service("shop/*.sub.wild.example.com", "240.240.0.3"),
		service("shop/exact.wild.example.com", "240.240.0.4"),
		service("shop/elsewhere.example.com", "far/240.240.0.5"),
		service("shop/novip.example.com"),
		with(service("other/private.example.com", "240.240.0.6"), func(s *mesh.Service) { s.Visibility = workload.Service_NAMESPACE }),
		service("one/many.example.com", "240.240.1.1"), with(service("two/many.example.com", "240.240.1.2"), canonical), service("three/many.example.com", "240.240.1.3"),
		service("one/pick.example.com", "240.240.2.1"), service("two/pick.example.com", "240.240.2.2"), service("three/pick.example.com", "240.240.2.3"),
		with(service("other/hidden.other.svc.cluster.local"), func(s *mesh.Service) { s.Visibility = workload.Service_NAMESPACE }),
		endpoint("other", "hidden-0", "10.1.2.1", "hidden-0.hidden.other.svc.cluster.local", "hidden.other.svc.cluster.local"),
	)
}
