package dns

import (
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/ambit-mesh/ambit/test/lab/cluster"
)

const objects = `
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.1.1, clusterIPs: [10.96.1.1, "fd00:10:96::1"], ports: [{name: http, port: 80, protocol: TCP}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, clusterIPs: [None], ports: [{name: sql, port: 5432, protocol: TCP}]}
---
apiVersion: v1
kind: Service
metadata: {name: alias, namespace: shop}
spec: {type: ExternalName, externalName: web.shop.svc.cluster.local}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: sql, port: 5432, protocol: TCP}]
endpoints:
- {addresses: [10.244.1.2], hostname: db-0, conditions: {ready: true}}
- {addresses: [10.244.1.3], hostname: db-1, conditions: {ready: false}}
- {addresses: [10.244.1.4], conditions: {ready: true}}
`

func zone(t *testing.T) *Zone {
	t.Helper()
	s, err := cluster.New("")
	if err != nil {
		t.Fatal(err)
	}
	all, err := cluster.Decode(strings.NewReader(objects), "objects")
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range all {
		if err := s.Put(o); err != nil {
			t.Fatal(err)
		}
	}
	return &Zone{Store: s}
}

func TestAnswersOfTheSpecification(t *testing.T) {
	z := zone(t)
	tests := []struct {
		name  string
		qtype uint16
		rcode int
		want  []string // data of the answers
	}{
		{"web.shop.svc.cluster.local.", dns.TypeA, 0, []string{"10.96.1.1"}},
		{"WEB.shop.SVC.cluster.local.", dns.TypeA, 0, []string{"10.96.1.1"}},
		{"web.shop.svc.cluster.local.", dns.TypeAAAA, 0, []string{"fd00:10:96::1"}},
		{"web.shop.svc.cluster.local.", dns.TypeMX, 0, nil},
		{"_http._tcp.web.shop.svc.cluster.local.", dns.TypeSRV, 0, []string{"0 100 80 web.shop.svc.cluster.local."}},
		{"_http._udp.web.shop.svc.cluster.local.", dns.TypeSRV, dns.RcodeNameError, nil},
		{"db.shop.svc.cluster.local.", dns.TypeA, 0, []string{"10.244.1.2", "10.244.1.4"}},
		{"db.shop.svc.cluster.local.", dns.TypeAAAA, 0, nil},
		{"db-0.db.shop.svc.cluster.local.", dns.TypeA, 0, []string{"10.244.1.2"}},
		{"db-1.db.shop.svc.cluster.local.", dns.TypeA, dns.RcodeNameError, nil},
		{"_sql._tcp.db.shop.svc.cluster.local.", dns.TypeSRV, 0, []string{"0 100 5432 10-244-1-4.db.shop.svc.cluster.local.", "0 100 5432 db-0.db.shop.svc.cluster.local."}},
		{"alias.shop.svc.cluster.local.", dns.TypeA, 0, []string{"10.96.1.1", "web.shop.svc.cluster.local."}},
		{"10-244-1-2.shop.pod.cluster.local.", dns.TypeA, 0, []string{"10.244.1.2"}},
		{"1.1.96.10.in-addr.arpa.", dns.TypePTR, 0, []string{"web.shop.svc.cluster.local."}},
		{"9.9.9.9.in-addr.arpa.", dns.TypePTR, dns.RcodeNameError, nil},
		{"none.shop.svc.cluster.local.", dns.TypeA, dns.RcodeNameError, nil},
		{"a.web.shop.svc.cluster.local.", dns.TypeA, dns.RcodeNameError, nil},
		{"svc.cluster.local.", dns.TypeA, 0, nil},
		{"cluster.local.", dns.TypeA, dns.RcodeNameError, nil},
		{"example.com.", dns.TypeA, dns.RcodeNameError, nil},
		{".", dns.TypeA, dns.RcodeNameError, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name+dns.TypeToString[tt.qtype], func(t *testing.T) {
			m := new(dns.Msg)
			z.Answer(m, dns.Question{Name: tt.name, Qtype: tt.qtype, Qclass: dns.ClassINET})
			var got []string
			for _, rr := range m.Answer {
				got = append(got, strings.TrimPrefix(rr.String(), rr.Header().String()))
			}
			slices.Sort(got)
			if m.Rcode != tt.rcode || !slices.Equal(got, tt.want) {
				t.Errorf("%s %v, want %s %v", dns.RcodeToString[m.Rcode], got, dns.RcodeToString[tt.rcode], tt.want)
			}
		})
	}
}

func FuzzAnswer(f *testing.F) {
	for _, s := range []string{"web.shop.svc.cluster.local.", "_a._b.db.shop.svc.cluster.local.", ".", "....", "svc.cluster.local.", "x.svc.cluster.local.", "a.b.c.pod.cluster.local."} {
		f.Add(s, uint16(1))
	}
	s, err := cluster.New("")
	if err != nil {
		f.Fatal(err)
	}
	z := &Zone{Store: s}
	f.Fuzz(func(t *testing.T, name string, qtype uint16) {
		z.Answer(new(dns.Msg), dns.Question{Name: name, Qtype: qtype, Qclass: dns.ClassINET})
	})
}
