package serve

import (
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

type metrics struct {
	types          []string // served
	authFailures   prometheus.Counter
	certificates   *prometheus.CounterVec
	signSeconds    prometheus.Histogram
	requests       *prometheus.CounterVec
	streamsRefused prometheus.Counter
	behind         prometheus.Counter
	responses      *prometheus.CounterVec
	resources      *prometheus.CounterVec
	removed        *prometheus.CounterVec
	sendSeconds    prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer, s *Server) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "ambit_ambitd_" + name, Help: help})
	}
	vec := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "ambit_ambitd_" + name, Help: help}, []string{label})
	}
	m := &metrics{
		types:          s.cfg.Store.Types(),
		authFailures:   counter("auth_failures_total", "Calls whose token was refused."),
		certificates:   vec("certificates_total", "Certificate requests by gRPC code.", "code"),
		requests:       vec("xds_requests_total", "Discovery requests by what they said: subscribe, ack, nack or bad.", "kind"),
		streamsRefused: counter("xds_streams_refused_total", "Streams beyond the limit of their caller."),
		behind:         counter("xds_streams_behind_total", "Streams ended because the client missed too many removals."),
		responses:      vec("xds_responses_total", "Discovery responses sent, by type.", "type"),
		resources:      vec("xds_resources_total", "Resources sent, by type.", "type"),
		removed:        vec("xds_removed_resources_total", "Removals sent, by type.", "type"),
		signSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "ambit_ambitd_certificate_seconds", Help: "Time to answer a certificate request.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 8),
		}),
		sendSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "ambit_ambitd_xds_send_seconds", Help: "Time until the connection took a response.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
		}),
	}
	streams := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "ambit_ambitd_xds_streams", Help: "Open discovery streams.",
	}, func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(len(s.streams))
	})
	var errs []error
	for _, c := range []prometheus.Collector{
		m.authFailures, m.certificates, m.requests, m.streamsRefused, m.behind, m.responses,
		m.resources, m.removed, m.signSeconds, m.sendSeconds, streams, stored{s},
	} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

// sent counts a response. A client chooses the type of an unserved
// subscription: it must not choose a label.
func (m *metrics) sent(r *discovery.DeltaDiscoveryResponse, took time.Duration) {
	label := "other"
	if slices.Contains(m.types, r.TypeUrl) {
		label = shortType(r.TypeUrl)
	}
	m.responses.WithLabelValues(label).Inc()
	m.resources.WithLabelValues(label).Add(float64(len(r.Resources)))
	m.removed.WithLabelValues(label).Add(float64(len(r.RemovedResources)))
	m.sendSeconds.Observe(took.Seconds())
}

func shortType(url string) string { return url[strings.LastIndexByte(url, '.')+1:] }

// stored exports the number of resources by type.
type stored struct{ s *Server }

var storedDesc = prometheus.NewDesc("ambit_ambitd_xds_stored_resources", "Resources being served, by type.", []string{"type"}, nil)

func (c stored) Describe(ch chan<- *prometheus.Desc) { ch <- storedDesc }

func (c stored) Collect(ch chan<- prometheus.Metric) {
	for _, t := range c.s.cfg.Store.Types() {
		ch <- prometheus.MustNewConstMetric(storedDesc, prometheus.GaugeValue, float64(c.s.cfg.Store.Len(t)), shortType(t))
	}
}
