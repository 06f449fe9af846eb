package dns

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

// Metrics of all pods: the reference's names and labels. Series of a canonical
// service end with the last pod of it on this node. A nil Metrics counts nothing.
type Metrics struct {
	requests, upstreams, failures *prometheus.CounterVec
	duration                      *prometheus.HistogramVec
	dropped                       *prometheus.CounterVec

	mu   sync.Mutex
	used map[source]int // pods with series
}

type source struct{ service, revision string }

// NewMetrics registers the metrics; reg may be nil.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	labels := []string{"request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	m := &Metrics{
		requests:  counter("istio_dns_requests_total", "Total number of DNS requests.", labels...),
		upstreams: counter("istio_dns_upstream_requests_total", "Total number of DNS requests forwarded to upstream.", labels...),
		failures:  counter("istio_dns_upstream_failures_total", "Total number of DNS requests forwarded to upstream that got no answer.", labels...),
		dropped:   counter("ambit_ztunnel_dns_dropped_total", "DNS requests that were refused or not answered, by reason.", "reason"),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "istio_dns_upstream_request_duration_seconds", Help: "Time it took upstream to answer.",
			Buckets: []float64{.0005, .001, .01, .1, 1, 5},
		}, labels),
		used: map[source]int{},
	}
	if reg != nil {
		reg.MustRegister(m.requests, m.upstreams, m.failures, m.duration, m.dropped)
	}
	return m
}

// enter counts a pod of a canonical service in; leave ends its series when it was
// the last.
func (m *Metrics) enter(s source) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used[s]++
}

func (m *Metrics) leave(s source) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.used[s]--; m.used[s] > 0 {
		return
	}
	delete(m.used, s)
	match := prometheus.Labels{"source_canonical_service": s.service, "source_canonical_revision": s.revision}
	m.requests.DeletePartialMatch(match)
	m.upstreams.DeletePartialMatch(match)
	m.failures.DeletePartialMatch(match)
	m.duration.DeletePartialMatch(match)
}

// member is one pod's part in the metrics.
type member struct {
	m *Metrics

	mu     sync.Mutex
	source source
	in     bool
	closed bool
}

// see follows the pod's canonical service, which its workload may change.
func (p *member) see(w *mesh.Workload) {
	if p.m == nil || w == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.in && p.source.service == unknown(w.CanonicalName) && p.source.revision == unknown(w.CanonicalRevision) {
		return
	}
	if p.in {
		p.m.leave(p.source)
	}
	p.source, p.in = source{unknown(w.CanonicalName), unknown(w.CanonicalRevision)}, true
	p.m.enter(p.source)
}

func (p *member) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.in && !p.closed {
		p.m.leave(p.source)
	}
	p.closed = true
}

func unknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

func labelValues(w *mesh.Workload, t dnsmessage.Type, proto string) [4]string {
	if w == nil {
		return [4]string{typeName(t), proto, "unknown", "unknown"}
	}
	return [4]string{typeName(t), proto, unknown(w.CanonicalName), unknown(w.CanonicalRevision)}
}

func (m *Metrics) request(w *mesh.Workload, t dnsmessage.Type, proto string) {
	if m == nil {
		return
	}
	l := labelValues(w, t, proto)
	m.requests.WithLabelValues(l[:]...).Inc()
}

func (m *Metrics) upstream(w *mesh.Workload, t dnsmessage.Type, proto string, d time.Duration, err error) {
	if m == nil {
		return
	}
	l := labelValues(w, t, proto)
	m.upstreams.WithLabelValues(l[:]...).Inc()
	if err != nil {
		m.failures.WithLabelValues(l[:]...).Inc()
		return
	}
	m.duration.WithLabelValues(l[:]...).Observe(d.Seconds())
}

func (m *Metrics) drop(reason string) {
	if m != nil {
		m.dropped.WithLabelValues(reason).Inc()
	}
}

// typeNames are those that become labels; a client chooses among 65536.
var typeNames = map[dnsmessage.Type]string{
	dnsmessage.TypeA: "A", dnsmessage.TypeAAAA: "AAAA", dnsmessage.TypeSRV: "SRV", dnsmessage.TypeCNAME: "CNAME",
	dnsmessage.TypeTXT: "TXT", dnsmessage.TypeMX: "MX", dnsmessage.TypeNS: "NS", dnsmessage.TypePTR: "PTR",
	dnsmessage.TypeSOA: "SOA", dnsmessage.TypeALL: "ANY", typeHTTPS: "HTTPS", typeSVCB: "SVCB",
}

func typeName(t dnsmessage.Type) string {
	if n := typeNames[t]; n != "" {
		return n
	}
	return "other"
}
