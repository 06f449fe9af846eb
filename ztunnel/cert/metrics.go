package cert

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"maps"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// maxRootSeries bounds the roots that are told apart in metrics: a mesh has one
// or two, and whoever feeds more must not fill the scrape.
const maxRootSeries = 16

type metrics struct {
	issued    *prometheus.CounterVec
	revoked   *prometheus.CounterVec
	untracked *prometheus.CounterVec
	crlBroken prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, m *Manager) metrics {
	counter := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
	}
	ms := metrics{
		issued: counter("ambit_ztunnel_certificate_requests_total", "Requests to the certificate authority, by result (ok, error).", "result"),
		revoked: counter("istio_crl_policy_rejections_total",
			"Handshakes refused and tunnels cut because a certificate of the peer is revoked.", "reporter"),
		untracked: counter("istio_crl_untracked_connections_total",
			"Tunnels that a later revocation would not cut; they were judged at their handshake.", "reporter"),
		crlBroken: prometheus.NewGauge(prometheus.GaugeOpts{Name: "ambit_ztunnel_crl_broken",
			Help: "1 while CRL_PATH cannot be used and the lists before it are in force."}),
	}
	for _, side := range []Side{Source, Destination} { // so that rates start at zero
		ms.revoked.WithLabelValues(string(side))
		ms.untracked.WithLabelValues(string(side))
	}
	if reg == nil {
		return ms
	}
	gauge := func(name, help string, f func(now time.Time) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return f(m.cfg.Now()) })
	}
	reg.MustRegister(ms.issued, ms.revoked, ms.untracked, ms.crlBroken, rootExpiry{m},
		gauge("ambit_ztunnel_certificates", "Identities with a valid certificate.", m.available),
		gauge("ambit_ztunnel_certificate_expiry_seconds",
			"Seconds until the first certificate on this node expires, negative after it, 0 without any.", m.firstExpiry),
		gauge("ambit_ztunnel_ca_last_contact_age_seconds",
			"Seconds since the certificate authority last gave a certificate or its roots, -1 before the first.", m.contactAge))
	return ms
}

func (m *Manager) available(now time.Time) float64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := 0
	for _, e := range m.entries {
		if e.cert.Load().Valid(now) {
			n++
		}
	}
	return float64(n)
}

func (m *Manager) firstExpiry(now time.Time) float64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var first time.Time
	for _, e := range m.entries {
		if c := e.cert.Load(); c != nil && (first.IsZero() || c.Leaf.NotAfter.Before(first)) {
			first = c.Leaf.NotAfter
		}
	}
	if first.IsZero() {
		return 0
	}
	return first.Sub(now).Seconds()
}

func (m *Manager) contactAge(now time.Time) float64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.contact.IsZero() {
		return -1
	}
	return now.Sub(m.contact).Seconds()
}

// rootExpiry has a series per root in force, so that one that went leaves none
// behind.
type rootExpiry struct{ m *Manager }

var rootExpiryDesc = prometheus.NewDesc("ambit_ztunnel_root_expiry_seconds",
	"Seconds until a trusted root expires, negative after it, by the start of its SHA-256 fingerprint.", []string{"trust_domain", "root"}, nil)

func (r rootExpiry) Describe(c chan<- *prometheus.Desc) { c <- rootExpiryDesc }

func (r rootExpiry) Collect(c chan<- prometheus.Metric) {
	now, n := r.m.cfg.Now(), 0
	for _, td := range slices.Sorted(maps.Keys(*r.m.trust.pools.Load())) {
		seen := map[string]bool{}
		for _, root := range r.m.trust.Roots(td) {
			fp := fingerprint(root)
			if seen[fp] || n == maxRootSeries {
				continue
			}
			seen[fp] = true
			n++
			c <- prometheus.MustNewConstMetric(rootExpiryDesc, prometheus.GaugeValue, root.NotAfter.Sub(now).Seconds(), td, fp)
		}
	}
}

func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:8])
}
