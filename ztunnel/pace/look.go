package pace

import (
	"math"
	"runtime/metrics"
	"time"

	"golang.org/x/sys/unix"
)

// sampled is of how many times that a goroutine became runnable the runtime
// measures one (gTrackingPeriod).
const sampled = 8

// newLooker returns a function that looks; it allocates once.
func newLooker() func() look {
	sample := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	return func() look {
		l := look{at: time.Now()}
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err == nil { // there is always this clock
			l.cpu = time.Duration(ts.Nano())
		}
		metrics.Read(sample)
		if sample[0].Value.Kind() == metrics.KindFloat64Histogram {
			l.waited = sampled * sum(sample[0].Value.Float64Histogram())
		}
		return l
	}
}

// sum is about what was measured together: the buckets are narrow.
func sum(h *metrics.Float64Histogram) time.Duration {
	var s float64
	for i, n := range h.Counts {
		if n == 0 {
			continue
		}
		low, high := h.Buckets[i], h.Buckets[i+1]
		if math.IsInf(low, -1) {
			low = 0
		}
		if math.IsInf(high, 1) {
			high = low
		}
		s += float64(n) * (low + high) / 2
	}
	return time.Duration(s * float64(time.Second))
}
