package outbound

import (
	"net/url"
	"strings"

	"github.com/ambit-mesh/ambit/xds/api/workload"
	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/xds/mesh"
)

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

// maxBaggageValue bounds what is taken over: names in Kubernetes have at most
// 253 bytes.
const maxBaggageValue = 253

// FromBaggage is the workload that a peer in another network says it is, for
// telemetry only, nil if it says nothing. Its name is its workload's: nothing
// tells the pod. What the peer proved wins over what it says.
func FromBaggage(lines []string, peer identity.ID) *mesh.Workload {
	w, said := &mesh.Workload{Traits: &mesh.Traits{}}, false
	for _, line := range lines {
		for item := range strings.SplitSeq(line, ",") {
			key, value, _ := strings.Cut(item, "=")
			if value, _, _ = strings.Cut(value, ";"); value == "" { // properties follow
				continue
			}
			said = baggageItem(w, strings.TrimSpace(key), unescape(strings.TrimSpace(value))) || said
		}
	}
	if !said {
		return nil
	}
	w.Name, w.Identity = w.WorkloadName, peer
	if !peer.IsZero() {
		w.Namespace, w.ServiceAccount, w.TrustDomain = peer.Namespace(), peer.ServiceAccount(), peer.TrustDomain()
	}
	return w
}

// baggageItem takes over what is known and reports whether it was.
func baggageItem(w *mesh.Workload, key, value string) bool {
	switch key {
	case "k8s.cluster.name":
		w.ClusterID = value
	case "k8s.namespace.name":
		w.Namespace = value
	case "service.name":
		w.CanonicalName = value
	case "service.version":
		w.CanonicalRevision = value
	case "cloud.region":
		w.Locality.Region = value
	case "cloud.availability_zone":
		w.Locality.Zone = value
	default:
		kind, k8s := strings.CutPrefix(key, "k8s.")
		kind, name := strings.CutSuffix(kind, ".name")
		n, known := workload.WorkloadType_value[strings.ToUpper(kind)]
		if !k8s || !name || !known {
			return false
		}
		w.WorkloadType, w.WorkloadName = workload.WorkloadType(n), value
	}
	return true
}

// unescape undoes escape; what is no percent-encoding is taken as it is, since
// the reference sends values bare. Control characters are dropped: the value
// goes into logs and labels.
func unescape(s string) string {
	if u, err := url.PathUnescape(s); err == nil {
		s = u
	}
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > maxBaggageValue {
		s = strings.ToValidUTF8(s[:maxBaggageValue], "")
	}
	return s
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
