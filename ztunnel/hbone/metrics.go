package hbone

import (
	"errors"
	"io"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/ztunnel/sockopt"
)

// RefusedStreamsMetric says at the node that answered REFUSED_STREAM, which has no room for words, why it did.
const RefusedStreamsMetric = "ambit_ztunnel_hbone_refused_streams_total"

// metrics of all dialers and servers of the process: one per pod would be without bound.
type metrics struct {
	dials      *prometheus.CounterVec
	handshakes *prometheus.CounterVec
	tunnels    *prometheus.GaugeVec
	streams    prometheus.Counter
	retries    prometheus.Counter
	requests   prometheus.Counter
	refused    *prometheus.CounterVec
	resent     prometheus.Counter
	rtt        prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return register(reg, prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help}))
	}
	m := &metrics{
		dials: register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ambit_ztunnel_hbone_dials_total",
			Help: "HBONE tunnels dialled, by the stage that was reached and the result.",
		}, []string{"stage", "result"})),
		handshakes: register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ambit_ztunnel_hbone_handshakes_total",
			Help: "TLS handshakes of HBONE tunnels, by side and result; limited were refused before they began, and of left the client hung up before they were complete: port checks do.",
		}, []string{"side", "result"})),
		tunnels: register(reg, prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ambit_ztunnel_hbone_tunnels_open",
			Help: "HBONE tunnels now open, by side.",
		}, []string{"side"})),
		streams:  counter("ambit_ztunnel_hbone_streams_total", "CONNECT streams opened to peers."),
		retries:  counter("ambit_ztunnel_hbone_retries_total", "CONNECTs tried again because a pooled tunnel was lost or refused them."),
		requests: counter("ambit_ztunnel_hbone_requests_total", "CONNECT requests received."),
		refused: register(reg, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: RefusedStreamsMetric,
			Help: "CONNECT requests that were refused before they were looked at, which clients try again: exhausted for want of room on the node (its memory limit bounds streams), limit beyond what a tunnel may have at once, draining because the tunnel ends.",
		}, []string{"reason"})),
		resent: counter("ambit_ztunnel_hbone_retransmits_total", "TCP segments that sockets of HBONE tunnels sent again, seen when streams begin and end."),
		rtt: register(reg, prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "ambit_ztunnel_hbone_rtt_seconds",
			Help:    "Smoothed TCP round trip of HBONE tunnels when streams begin and end, ten times per second and tunnel at most.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1},
		})),
	}
	for _, reason := range []string{refusedExhausted, refusedLimit, refusedDraining} {
		m.refused.WithLabelValues(reason) // exist before the first
	}
	return m
}

// register returns the collector that counts: c, or one of the same name that is registered already.
func register[C prometheus.Collector](reg prometheus.Registerer, c C) C {
	if reg == nil {
		return c
	}
	err := reg.Register(c)
	if are, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
		if old, ok := are.ExistingCollector.(C); ok {
			return old
		}
	}
	return c
}

func (m *metrics) dial(stage Stage, err error) {
	m.dials.WithLabelValues(string(stage), result(err)).Inc()
}

// socket counts what has happened to a tunnel's socket since the last look.
func (m *metrics) socket(i sockopt.TCPInfo) {
	if m == nil {
		return
	}
	m.resent.Add(float64(i.Retransmits))
	if i.RTT > 0 {
		m.rtt.Observe(i.RTT.Seconds())
	}
}

// Why a request was refused, as metric labels.
const (
	refusedExhausted = "exhausted"
	refusedLimit     = "limit"
	refusedDraining  = "draining"
)

// The two sides of a tunnel, as metric labels.
const (
	clientSide = "client"
	serverSide = "server"
)

func (m *metrics) handshake(side string, err error) {
	r := result(err)
	if side == serverSide && errors.Is(err, io.EOF) {
		r = "left"
	}
	m.handshakes.WithLabelValues(side, r).Inc()
}

// open counts a tunnel until closed is called.
func (m *metrics) open(side string) (closed func()) {
	g := m.tunnels.WithLabelValues(side)
	g.Inc()
	return g.Dec
}

func result(err error) string {
	if err == nil {
		return "ok"
	}
	if errors.Is(err, ErrTooManyHandshakes) {
		return "limited"
	}
	if (&DialError{Err: err}).Timeout() {
		return "timeout"
	}
	return "error"
}
