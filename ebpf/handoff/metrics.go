package handoff

import (
	"errors"
	"os"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	connected   prometheus.Gauge
	ack         prometheus.Histogram
	rejections  prometheus.Counter
	disconnects *prometheus.CounterVec
}

// Reasons of ambit_node_zds_disconnects_total.
const (
	reasonProtocol = "protocol"
	reasonTimeout  = "timeout"
	reasonClosed   = "closed"
)

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ambit_node_zds_connections", Help: "Proxies connected to the agent.",
		}),
		ack: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "ambit_node_zds_ack_seconds", Help: "Time a proxy took to answer a message.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 8),
		}),
		rejections: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ambit_node_zds_rejections_total", Help: "Messages a proxy refused.",
		}),
		disconnects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ambit_node_zds_disconnects_total", Help: "Ended proxy connections by reason.",
		}, []string{"reason"}),
	}
	if r != nil {
		r.MustRegister(m.connected, m.ack, m.rejections, m.disconnects)
	}
	return m
}

func (m *metrics) dropped(err error) {
	reason := reasonClosed
	if _, ok := errors.AsType[*ProtocolError](err); ok {
		reason = reasonProtocol
	} else if errors.Is(err, os.ErrDeadlineExceeded) {
		reason = reasonTimeout
	}
	m.disconnects.WithLabelValues(reason).Inc()
}
