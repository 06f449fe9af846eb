package app

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/ambit-mesh/ambit/xds/boot"

	_ "github.com/ambit-mesh/ambit/xds/api/security" // so that /debug/resources can print it
)

// handler serves the monitoring port. What names objects and proxies, or changes
// the process, answers this host only: every pod reaches the port.
func (a *ambitd) handler(levels *boot.LevelControl, reg *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	metrics := boot.Metrics(reg)
	mux.Handle("GET /metrics", metrics)
	mux.Handle("GET /stats/prometheus", metrics)
	mux.Handle("GET /ready", a.ready)
	mux.Handle("GET /healthz/ready", a.ready)
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(boot.BuildOf("ambitd")) // the client has gone: nothing to do
	})
	mux.Handle("/", boot.AdminMux(boot.AdminConfig{
		Levels: levels,
		Handlers: map[string]http.Handler{
			"GET /status":          http.HandlerFunc(a.serveStatus),
			"GET /debug/resources": http.HandlerFunc(a.serveResources),
		},
	}))
	return mux
}

// serveResources prints what proxies are served:
// /debug/resources[?type=Address][&name=PART].
func (a *ambitd) serveResources(w http.ResponseWriter, r *http.Request) {
	wantType, wantName := r.URL.Query().Get("type"), r.URL.Query().Get("name")
	type item struct {
		Type     string          `json:"type"`
		Name     string          `json:"name"`
		Aliases  []string        `json:"aliases,omitempty"`
		Version  string          `json:"version"`
		Resource json.RawMessage `json:"resource"`
	}
	w.Header().Set("Content-Type", "application/json")
	sep := "[\n"
	for _, t := range a.store.Types() {
		if !strings.HasSuffix(t, wantType) {
			continue
		}
		for _, res := range a.store.Resources(t) {
			if !strings.Contains(res.Name, wantName) {
				continue
			}
			body, err := protojson.Marshal(res.Resource)
			if err != nil {
				body, _ = json.Marshal(err.Error()) // a string always marshals
			}
			line, _ := json.Marshal(item{Type: t, Name: res.Name, Aliases: res.Aliases, Version: res.Version, Resource: body})
			if _, err := w.Write(append([]byte(sep), line...)); err != nil {
				return
			}
			sep = ",\n"
		}
	}
	if sep == "[\n" {
		sep = "["
	}
	_, _ = w.Write([]byte(strings.TrimSuffix(sep, ",\n") + "\n]\n")) // the client has gone: nothing to do
}

func registerMetrics(reg prometheus.Registerer, a *ambitd) error {
	gauge := func(name, help string, f func(*report) float64) error {
		return reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "ambit_ambitd_" + name, Help: help}, func() float64 {
			a.pipe.mu.RLock()
			defer a.pipe.mu.RUnlock()
			return f(&a.pipe.report)
		}))
	}
	return errors.Join(
		gauge("source_problems", "Objects or fields that are not in force as written.", func(r *report) float64 { return float64(len(r.problems) + len(r.conditions)) }),
		gauge("source_objects", "Objects in the source.", func(r *report) float64 { return float64(len(r.kinds)) }),
		gauge("source_changes", "Changes of the source applied since the start.", func(r *report) float64 { return float64(r.changes) }),
		gauge("source_last_apply_seconds", "Time from the latest change to its resources.", func(r *report) float64 { return r.took.Seconds() }),
		reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ambit_ambitd_ca_expiry_timestamp_seconds", Help: "When the CA certificate ends, as Unix time.",
		}, func() float64 { return float64(a.authority.Info().NotAfter.Unix()) })),
		reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ambit_ambitd_trust_followers", Help: "Proxies that learn of roots and revocations at once.",
		}, func() float64 { return float64(a.server.TrustFollowers()) })),
		reg.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "ambit_ambitd_ca_files_broken", Help: "1 while the CA's files are not in force as they are.",
		}, func() float64 {
			if a.authority.Problem() != nil {
				return 1
			}
			return 0
		})),
		reg.Register(caExpiry{a}),
	)
}

// caExpiry has a series per CA certificate, so that one that went leaves none
// behind. There are as many as the CA's files hold.
type caExpiry struct{ a *ambitd }

var caExpiryDesc = prometheus.NewDesc("ambit_ambitd_ca_certificate_expiry_seconds",
	"Seconds until a CA certificate expires, by role (signing, intermediate, root) and the start of its SHA-256 fingerprint.", []string{"role", "fingerprint"}, nil)

func (c caExpiry) Describe(ch chan<- *prometheus.Desc) { ch <- caExpiryDesc }

// maxExpirySeries bounds what a file with many roots makes of a scrape.
const maxExpirySeries = 32

func (c caExpiry) Collect(ch chan<- prometheus.Metric) {
	seen := map[string]bool{}
	for _, cert := range c.a.authority.Info().Certs {
		key := cert.Role + cert.Fingerprint
		if seen[key] || len(seen) == maxExpirySeries {
			continue
		}
		seen[key] = true
		ch <- prometheus.MustNewConstMetric(caExpiryDesc, prometheus.GaugeValue, time.Until(cert.NotAfter).Seconds(), cert.Role, cert.Fingerprint)
	}
}
