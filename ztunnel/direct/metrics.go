package direct

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	leases, open prometheus.Gauge
	granted      prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		leases: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ambit_ztunnel_leases", Help: "Pairs of pod and destination that have a lease, or were refused one lately."}),
		open: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ambit_ztunnel_direct_connections", Help: "Live connections between accelerated pods, which go without the proxy."}),
		granted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ambit_ztunnel_leases_granted_total", Help: "Leases that the agent put in force."}),
	}
	if reg != nil {
		reg.MustRegister(m.leases, m.open, m.granted)
	}
	return m
}
