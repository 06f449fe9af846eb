package lease

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the agent's. They count what proxies were told, so that they hold
// without one too.
type metrics struct {
	live atomic.Int64
	lost prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{lost: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "ambit_node_direct_connections_lost_total",
		Help: "Connections between accelerated pods whose end went unseen, so that their bytes are not counted, or that another proxy took over.",
	})}
	if r != nil {
		r.MustRegister(m.lost, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ambit_node_direct_connections",
			Help: "Live connections between accelerated pods, which go without the proxy.",
		}, func() float64 { return float64(m.live.Load()) }))
	}
	return m
}
