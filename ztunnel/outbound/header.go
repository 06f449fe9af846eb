package outbound

import (
	"strings"

	"github.com/ambit-mesh/ambit/xds/mesh"
	"github.com/ambit-mesh/ambit/ztunnel/flow"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// headers of the CONNECT request, the reference's three.
func headers(c *flow.Conn, plan Plan, self *mesh.Workload) []hbone.HeaderField {
	forwarded := `for="` + c.Record().SrcAddr.String() + `"`
	if plan.Service != nil {
		forwarded += ";host=" + plan.Service.Host.Name
	}
	return []hbone.HeaderField{
		{Name: "baggage", Value: Baggage(self)},
		{Name: "forwarded", Value: forwarded},
		{Name: "traceparent", Value: c.TraceParent()},
	}
}

// Baggage describes a workload to the other side's telemetry. Empty items are
// left out. Values are escaped as the W3C baggage format asks where the
// reference would send a list that parses differently; names in Kubernetes
// never need it.
func Baggage(w *mesh.Workload) string {
	var b strings.Builder
	item := func(key, value string) {
		if value == "" {
			return
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(key)
		b.WriteByte('=')
		escape(&b, value)
	}
	item("k8s.cluster.name", w.ClusterID)
	item("k8s.namespace.name", w.Namespace)
	item("k8s."+strings.ToLower(w.WorkloadType.String())+".name", w.WorkloadName)
	item("service.name", w.CanonicalName)
	item("service.version", w.CanonicalRevision)
	item("cloud.region", w.Locality.Region)
	item("cloud.availability_zone", w.Locality.Zone)
	return b.String()
}

// escape percent-encodes what the list format (W3C Baggage §3.3.1,
// baggage-octet) does not allow in a value.
func escape(b *strings.Builder, s string) {
	const hex = "0123456789ABCDEF"
	for i := range len(s) {
		c := s[i]
		if c > ' ' && c < 0x7f && c != '"' && c != ',' && c != ';' && c != '\\' && c != '%' {
			b.WriteByte(c)
			continue
		}
		b.WriteByte('%')
		b.WriteByte(hex[c>>4])
		b.WriteByte(hex[c&15])
	}
}
