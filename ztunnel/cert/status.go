package cert

import (
	"cmp"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// Status of one identity, for /config_dump.
type Status struct {
	ID           identity.ID
	State        string // Available, Initializing, Unavailable: <why>
	Cert         *Certificate
	FailingSince time.Time
}

// Status lists the identities, ordered by name.
func (m *Manager) Status() []Status {
	m.mu.RLock()
	defer m.mu.RUnlock()
	now := m.cfg.Now()
	out := make([]Status, 0, len(m.entries))
	for id, e := range m.entries {
		s := Status{ID: id, Cert: e.cert.Load(), FailingSince: e.failing}
		switch {
		case s.Cert.Valid(now):
			s.State = "Available"
		case e.err != nil:
			s.State = "Unavailable: " + e.err.Error()
		default:
			s.State = "Initializing"
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Status) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	return out
}

type metrics struct {
	issued *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, m *Manager) metrics {
	ms := metrics{issued: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "ambit_ztunnel_certificate_requests_total",
		Help: "Requests to the certificate authority, by result (ok, error).",
	}, []string{"result"})}
	if reg == nil {
		return ms
	}
	reg.MustRegister(ms.issued,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ambit_ztunnel_certificates",
			Help: "Identities with a valid certificate.",
		}, func() float64 {
			n := 0
			for _, s := range m.Status() {
				if s.State == "Available" {
					n++
				}
			}
			return float64(n)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ambit_ztunnel_certificate_expiry_seconds",
			Help: "Unix time at which the first certificate on this node expires, 0 without any.",
		}, func() float64 {
			var first time.Time
			for _, s := range m.Status() {
				if s.Cert != nil && (first.IsZero() || s.Cert.Leaf.NotAfter.Before(first)) {
					first = s.Cert.Leaf.NotAfter
				}
			}
			if first.IsZero() {
				return 0
			}
			return float64(first.Unix())
		}))
	return ms
}
