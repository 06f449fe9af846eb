package outbound

import (
	"errors"
	"maps"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/mesh"
)

const (
	// avoidFor is how long an endpoint that could not be reached comes last.
	// The control plane needs about that long to take it away for good.
	avoidFor = 10 * time.Second
	// maxFailed bounds the endpoints remembered: while it is reached, further
	// failures are only retried.
	maxFailed = 512
)

// Health is what the node's proxy has just learnt about endpoints. It only
// orders choices: what there is no alternative to is dialled all the same.
// Reading it takes no lock. Safe for use by any goroutine.
type Health struct {
	retries *prometheus.CounterVec
	now     func() time.Time

	cur atomic.Pointer[map[failure]time.Time] // until when; never changed, only replaced
	mu  sync.Mutex                            // one writer
}

// failure names who failed, and for whom. Silence may be a NetworkPolicy that
// concerns one client, so it counts for that one only: no pod can talk an
// endpoint down for others. A refused tunnel is the endpoint's own word; what its
// application refuses may be a port that only this client asks for.
type failure struct{ pod, uid string }

// NewHealth returns a Health that knows of no failure.
func NewHealth(reg prometheus.Registerer) *Health {
	h := &Health{now: time.Now, retries: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "ambit_ztunnel_endpoint_retries_total",
		Help: "Connections tried on a second endpoint because the first could not be reached, by result.",
	}, []string{"result"})}
	for _, result := range []string{"ok", "error"} {
		h.retries.WithLabelValues(result) // exist before the first
	}
	if reg != nil {
		reg.MustRegister(h.retries)
	}
	return h
}

// avoid returns what a pod should rather not dial, nil if there is nothing. It
// gives the same answers however long it is used.
func (h *Health) avoid(pod string) mesh.Skip {
	failed := h.cur.Load()
	if failed == nil {
		return nil
	}
	now := h.now()
	return func(w *mesh.Workload) bool {
		return (*failed)[failure{"", w.UID}].After(now) || (*failed)[failure{pod, w.UID}].After(now)
	}
}

// failed notes that a workload could not be reached.
func (h *Health) failed(pod string, w *mesh.Workload, err error) {
	if w == nil {
		return
	}
	f := failure{pod, w.UID}
	if _, app := errors.AsType[*neighbourError](err); !app && errors.Is(err, syscall.ECONNREFUSED) {
		f.pod = ""
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	next := map[failure]time.Time{}
	if old := h.cur.Load(); old != nil {
		maps.Copy(next, *old)
		maps.DeleteFunc(next, func(_ failure, until time.Time) bool { return !until.After(now) })
	}
	if _, known := next[f]; !known && len(next) >= maxFailed {
		return
	}
	next[f] = now.Add(avoidFor)
	h.cur.Store(&next)
}

func (h *Health) retried(err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	h.retries.WithLabelValues(result).Inc()
}
