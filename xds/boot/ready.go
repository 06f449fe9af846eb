package boot

import (
	"net/http"
	"slices"
	"strings"
	"sync"
)

// Ready says whether a process can take traffic, and if not, what is pending.
type Ready struct {
	mu      sync.Mutex
	pending []string // guarded by mu; in the order they were blocked
	changec chan struct{}
}

// NewReady returns a Ready with nothing pending.
func NewReady() *Ready { return &Ready{changec: make(chan struct{})} }

// Block makes the process unready until done is called. done may be called
// more than once.
func (r *Ready) Block(name string) (done func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending = append(r.pending, name)
	return sync.OnceFunc(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		i := slices.Index(r.pending, name)
		r.pending = slices.Delete(r.pending, i, i+1)
		close(r.changec)
		r.changec = make(chan struct{})
	})
}

// Pending lists what is awaited.
func (r *Ready) Pending() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.pending)
}

// Changed returns a channel closed at the next call of a done function.
func (r *Ready) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changec
}

// ServeHTTP answers 200 "ready" or 500 "not ready, pending: a, b".
func (r *Ready) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if p := r.Pending(); len(p) > 0 {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = w.Write([]byte("not ready, pending: " + strings.Join(p, ", ") + "\n")) // the prober has gone: nothing to do
		return
	}
	_, _ = w.Write([]byte("ready\n")) // as above
}

// ReadyMux serves r at /healthz/ready and /ready.
func ReadyMux(r *Ready) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /healthz/ready", r)
	mux.Handle("GET /ready", r)
	return mux
}
