package boot

import (
	"net/http"
	"net/http/pprof"
	"runtime"
	"sync"
)

// contention answers /debug/pprof/block and /debug/pprof/mutex. The runtime does
// not record waits unless it is told to, since each costs time: it is told to
// while somebody asks for a window of them (?seconds=N), and only then.
type contention struct {
	record  func(on bool)
	handler http.Handler

	mu     sync.Mutex
	asking int // guarded by mu
}

// Of waits about one per 10 µs of waiting is recorded, of fights for a lock one in
// ten: enough for a picture of seconds.
const (
	blockRate     = 10_000
	mutexFraction = 10
)

func blockProfile() *contention {
	return &contention{handler: pprof.Handler("block"), record: func(on bool) {
		rate := 0
		if on {
			rate = blockRate
		}
		runtime.SetBlockProfileRate(rate)
	}}
}

func mutexProfile() *contention {
	return &contention{handler: pprof.Handler("mutex"), record: func(on bool) {
		fraction := 0
		if on {
			fraction = mutexFraction
		}
		runtime.SetMutexProfileFraction(fraction)
	}}
}

func (c *contention) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.FormValue("seconds") != "" {
		c.ask(+1)
		defer c.ask(-1)
	}
	c.handler.ServeHTTP(w, r)
}

func (c *contention) ask(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.asking
	c.asking += n
	if was == 0 || c.asking == 0 {
		c.record(c.asking > 0)
	}
}
