package flow

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// decisionBounds are the upper bounds of the buckets: a decision takes some tens of microseconds, or the seconds that a
// workload is waited for.
var decisionBounds = [...]time.Duration{
	10 * time.Microsecond, 25 * time.Microsecond, 50 * time.Microsecond,
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

var descDecision = desc("ambit_ztunnel_decision_seconds", "From a connection's acceptance until it was decided where it may go.")

// latencies count durations by bucket. Any goroutine may add.
type latencies struct {
	counts [len(decisionBounds) + 1]atomic.Uint64
	sum    atomic.Int64 // nanoseconds
}

func (l *latencies) add(d time.Duration) {
	i := 0
	for i < len(decisionBounds) && d > decisionBounds[i] {
		i++
	}
	l.counts[i].Add(1)
	l.sum.Add(int64(d))
}

// Decided says that it is clear where the connection goes, or that it goes nowhere. The first time counts: an endpoint
// that is tried instead of another is not waited for by the mesh.
func (c *Conn) Decided() {
	if !c.decided {
		c.decided = true
		c.t.metrics.decisions(c.rec.Direction).add(time.Since(c.started))
	}
}

func (m *metrics) decisions(d Direction) *latencies {
	if d == Inbound {
		return &m.inDecided
	}
	return &m.outDecided
}

// histogram is latencies as they are scraped.
type histogram struct {
	l     *latencies
	pairs []*dto.LabelPair
}

func (h *histogram) Desc() *prometheus.Desc { return descDecision }

func (h *histogram) Write(m *dto.Metric) error {
	var n uint64
	out := &dto.Histogram{}
	for i := range h.l.counts {
		n += h.l.counts[i].Load()
		if i < len(decisionBounds) { // all others are the count's
			out.Bucket = append(out.Bucket, &dto.Bucket{UpperBound: proto.Float64(decisionBounds[i].Seconds()), CumulativeCount: proto.Uint64(n)})
		}
	}
	out.SampleCount, out.SampleSum = proto.Uint64(n), proto.Float64(time.Duration(h.l.sum.Load()).Seconds())
	m.Label, m.Histogram = h.pairs, out
	return nil
}
