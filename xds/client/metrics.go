package client

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type metrics struct {
	terminations *prometheus.CounterVec
	messages     *prometheus.CounterVec
	bytes        *prometheus.CounterVec
	requests     *prometheus.CounterVec
	nacks        *prometheus.CounterVec
	refused      *prometheus.CounterVec
	last         atomic.Int64 // unix nanoseconds of the last applied response
}

func newMetrics(reg prometheus.Registerer) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	m := &metrics{
		terminations: counter("istio_xds_connection_terminations_total", "Streams to the control plane that ended.", "reason"),
		messages:     counter("istio_xds_message_total", "Responses of the control plane.", "url"),
		bytes:        counter("istio_xds_message_bytes_total", "Bytes of the responses of the control plane.", "url"),
		requests:     counter("ambit_ztunnel_xds_requests_total", "Requests sent: subscriptions, ACKs and NACKs.", "url"),
		nacks:        counter("ambit_ztunnel_xds_nacks_total", "Responses of which something was refused.", "url"),
		refused:      counter("ambit_ztunnel_xds_refused_resources_total", "Resources refused.", "url"),
	}
	if reg != nil {
		reg.MustRegister(m.terminations, m.messages, m.bytes, m.requests, m.nacks, m.refused,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "ambit_ztunnel_xds_last_config_age_seconds",
				Help: "Seconds since the control plane's last response was applied, -1 before the first.",
			}, m.age))
	}
	return m
}

func (m *metrics) age() float64 {
	last := m.last.Load()
	if last == 0 {
		return -1
	}
	return time.Since(time.Unix(0, last)).Seconds()
}

func (m *metrics) received(url string, size int) {
	m.messages.WithLabelValues(url).Inc()
	m.bytes.WithLabelValues(url).Add(float64(size))
}

func (m *metrics) sent(url string) { m.requests.WithLabelValues(url).Inc() }

func (m *metrics) applied(url string, refused int) {
	m.last.Store(time.Now().UnixNano())
	if refused > 0 {
		m.nacks.WithLabelValues(url).Inc()
		m.refused.WithLabelValues(url).Add(float64(refused))
	}
}

// terminated sorts the end of a stream into the reasons of istio's metric.
func (m *metrics) terminated(err error) {
	reason := "Error"
	switch code := status.Code(rootCause(err)); {
	case errors.Is(err, io.EOF):
		reason = "Complete"
	case errors.Is(err, context.DeadlineExceeded):
		reason = "ConnectionError"
	case code == codes.Unavailable:
		reason = "ConnectionError"
	case code == codes.Canceled, code == codes.DeadlineExceeded:
		reason = "Reconnect"
	}
	m.terminations.WithLabelValues(reason).Inc()
}

// rootCause unwraps to what grpc said.
func rootCause(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}
