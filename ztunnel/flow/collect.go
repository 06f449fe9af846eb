package flow

import (
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// The descriptors carry no labels: each sample brings its own, the locality
// only if a workload is known.
var (
	descOpened   = desc("istio_tcp_connections_opened_total", "The total number of TCP connections opened.")
	descClosed   = desc("istio_tcp_connections_closed_total", "The total number of TCP connections closed.")
	descFailed   = desc("istio_tcp_connections_failed_total", "The total number of TCP connections that failed.")
	descSent     = desc("istio_tcp_sent_bytes_total", "The size of total bytes sent during response in case of a TCP connection.")
	descReceived = desc("istio_tcp_received_bytes_total", "The size of total bytes received during request in case of a TCP connection.")
	descSockets  = desc("istio_tcp_sockets_open", "Proxied connections now open.")
	descDenied   = desc("ambit_ztunnel_denied_total", "Connections refused or cut by policy, by the policy that decided.")
	descEarly    = desc("ambit_ztunnel_early_failures_total", "Connections that failed before source and destination were known.")
	descFailures = desc("ambit_ztunnel_failures_total", "Connections that failed, by the reason that the access log and /refusals give.")
	descDryRun   = desc("ambit_ztunnel_policy_dry_run_total", "Connections on which a policy in dry run had something to say, by what it would have done.")
	descOverflow = desc("ambit_ztunnel_metric_overflow_total", "Connections counted without labels because the number of label sets is bounded.")
)

func desc(name, help string) *prometheus.Desc { return prometheus.NewDesc(name, help, nil, nil) }

// Describe sends nothing: the collector is unchecked, since label sets differ.
func (m *metrics) Describe(chan<- *prometheus.Desc) {}

// Collect sends a consistent copy; bytes of live connections are included.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.t.live() {
		c.flush()
	}
	gauge := func(d Direction, n int64) {
		ch <- &sample{desc: descSockets, gauge: true, value: float64(n), pairs: pairs("reporter", d.reporter())}
	}
	gauge(Inbound, m.inOpen.Load())
	gauge(Outbound, m.outOpen.Load())
	for _, d := range []Direction{Inbound, Outbound} {
		ch <- &histogram{m.decisions(d), pairs("reporter", d.reporter())}
	}
	ch <- &sample{desc: descOverflow, value: float64(m.overflowed.Load())}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.byKey {
		send := func(d *prometheus.Desc, n uint64, always bool) {
			if n > 0 || always {
				ch <- &sample{desc: d, value: float64(n), pairs: s.pairs}
			}
		}
		opened := s.opened.Load() > 0
		send(descOpened, s.opened.Load(), false)
		send(descClosed, s.closed.Load(), false)
		send(descFailed, s.failed.Load(), false)
		send(descSent, s.sent.Load(), opened)
		send(descReceived, s.received.Load(), opened)
	}
	for d, n := range m.denials {
		ch <- &sample{desc: descDenied, value: float64(n), pairs: pairs("reason", d.reason, "policy", d.policy)}
	}
	for d, n := range m.dryRuns {
		ch <- &sample{desc: descDryRun, value: float64(n), pairs: pairs("reporter", d.direction.reporter(), "result", d.result)}
	}
	for f, n := range m.fails {
		ch <- &sample{desc: descFailures, value: float64(n), pairs: pairs("reporter", f.direction.reporter(), "reason", string(f.reason))}
	}
	for e, n := range m.earlies {
		ch <- &sample{desc: descEarly, value: float64(n), pairs: pairs("direction", string(e.direction), "reason", string(e.reason))}
	}
}

func pairs(kv ...string) []*dto.LabelPair {
	var out []*dto.LabelPair
	for i := 0; i+1 < len(kv); i += 2 {
		out = append(out, &dto.LabelPair{Name: proto.String(kv[i]), Value: proto.String(kv[i+1])})
	}
	return out
}

type sample struct {
	desc  *prometheus.Desc
	gauge bool
	value float64
	pairs []*dto.LabelPair
}

func (s *sample) Desc() *prometheus.Desc { return s.desc }

func (s *sample) Write(m *dto.Metric) error {
	m.Label = s.pairs
	if s.gauge {
		m.Gauge = &dto.Gauge{Value: proto.Float64(s.value)}
	} else {
		m.Counter = &dto.Counter{Value: proto.Float64(s.value)}
	}
	return nil
}
