package boot

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// NewRegistry returns a registry of its own (never the library's global one)
// with the collectors of the Go runtime and the process, and
// ambit_build_info.
func NewRegistry(program string) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	b := BuildOf(program)
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "ambit_build_info",
		Help:        "Always 1; the labels describe the running binary.",
		ConstLabels: prometheus.Labels{"program": b.Program, "version": b.Version, "go": b.Go},
	})
	info.Set(1)
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), info)
	return reg
}

// RegisterQueue exports the drops of a log queue.
func RegisterQueue(reg prometheus.Registerer, q *Queue) error {
	return reg.Register(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "ambit_log_dropped_lines_total",
		Help: "Log lines that found the queue full or the output failing.",
	}, func() float64 { return float64(q.Dropped()) }))
}

// Metrics serves reg at /metrics and /stats/prometheus, as OpenMetrics when
// the scraper asks for it.
func Metrics(reg *prometheus.Registry) http.Handler {
	h := promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		Registry:            reg,
		EnableOpenMetrics:   true,
		MaxRequestsInFlight: 4, // a scrape walks every series: several at once help nobody
	})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", h)
	mux.Handle("GET /stats/prometheus", h)
	return mux
}
