package agent

import (
	"context"
	"fmt"
	"time"
)

// rewriteTimeout bounds Rewrite: a worker may be waiting for a proxy's answer.
const rewriteTimeout = 15 * time.Second

// Rewrite has the rules of all captured pods applied again, because what they all
// contain has changed, and returns when that is done or has failed pod by pod.
// It may be called from any goroutine but a worker's.
func (a *Agent) Rewrite() error {
	ctx, cancel := context.WithTimeout(context.Background(), rewriteTimeout)
	defer cancel()
	asked := map[*worker]uint64{}
	a.eachWorker(func(w *worker) {
		w.mu.Lock()
		w.rewrite = true
		w.asked++
		asked[w] = w.asked
		w.mu.Unlock()
		w.wake()
	})
	for {
		a.mu.Lock()
		changed := a.admission.changed
		for w, n := range asked {
			w.mu.Lock()
			done := w.done >= n
			w.mu.Unlock()
			if done || a.workers[w.uid] != w {
				delete(asked, w)
			}
		}
		a.mu.Unlock()
		if len(asked) == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-a.endc:
			return context.Canceled
		case <-ctx.Done():
			return fmt.Errorf("apply rules again: %d pods are not done after %v", len(asked), rewriteTimeout)
		}
	}
}
