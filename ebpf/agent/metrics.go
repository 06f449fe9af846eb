package agent

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	failures prometheus.Counter
	repairs  prometheus.Counter
}

func newMetrics(r prometheus.Registerer, counts func() (enabled, pending int)) *metrics {
	m := &metrics{
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ambit_node_enrol_failures_total", Help: "Attempts to bring a pod into the mesh that failed and are repeated.",
		}),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ambit_node_redirect_repairs_total", Help: "Pods whose redirection somebody else had changed.",
		}),
	}
	gauge := func(state string, get func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ambit_node_pods", Help: "Pods that shall be in the mesh, by state.",
			ConstLabels: prometheus.Labels{"redirection": state},
		}, func() float64 { return float64(get()) })
	}
	if r != nil {
		r.MustRegister(m.failures, m.repairs,
			gauge(string(Enabled), func() int { n, _ := counts(); return n }),
			gauge(string(Pending), func() int { _, n := counts(); return n }),
		)
	}
	return m
}
