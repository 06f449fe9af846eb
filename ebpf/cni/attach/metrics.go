package attach

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	requests *prometheus.CounterVec
	wait     prometheus.Histogram
}

// Outcomes of ambit_node_cni_requests_total.
const (
	outcomeInMesh  = "in_mesh"
	outcomeOutside = "outside"
	outcomeRefused = "refused"
	outcomeDone    = "done" // commands that do not ask for a pod
)

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ambit_node_cni_requests_total", Help: "Requests of the CNI plugin by what came of them.",
		}, []string{"command", "outcome"}),
		wait: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "ambit_node_cni_wait_seconds", Help: "Time that starts of pods waited for their redirection, refused ones too.",
			Buckets: prometheus.ExponentialBuckets(0.002, 4, 8),
		}),
	}
	if r != nil {
		r.MustRegister(m.requests, m.wait)
	}
	return m
}

func (m *metrics) answered(c Command, a Answer, waited time.Duration) {
	if !slices.Contains([]Command{Add, Tell, Del, Check, Status, GC}, c) {
		c = "unknown" // a plugin's word is no label
	}
	outcome := outcomeDone
	switch {
	case a.Refusal != nil:
		outcome = outcomeRefused
	case a.InMesh:
		outcome = outcomeInMesh
	case c == Add || c == Check:
		outcome = outcomeOutside
	}
	m.requests.WithLabelValues(string(c), outcome).Inc()
	if c == Add && outcome != outcomeOutside {
		m.wait.Observe(waited.Seconds())
	}
}
