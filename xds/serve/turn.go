package serve

import (
	"context"
	"sync"
	"time"
)

const (
	// largeResponse is the number of resources from which a response waits for
	// its turn: each is encoded whole, some 2 MB here.
	largeResponse = 4096
	// largeTurns is how many are encoded and sent at a time. When a thousand
	// proxies come back at once, they would otherwise need a thousand whole
	// states in memory.
	largeTurns = 8
	// turnLimit gives the turn of a client that reads slowly, or not at all,
	// to the next one. Its response goes on meanwhile.
	turnLimit = 5 * time.Second
)

// turns bounds the large responses under way.
type turns chan struct{}

// wait returns when it is the caller's turn; done ends it. ok is false when
// ctx or stopc ended first.
func (t turns) wait(ctx context.Context, stopc <-chan struct{}) (done func(), ok bool) {
	select {
	case t <- struct{}{}:
	case <-ctx.Done():
		return nil, false
	case <-stopc:
		return nil, false
	}
	release := sync.OnceFunc(func() { <-t })
	timer := time.AfterFunc(turnLimit, release)
	return func() { timer.Stop(); release() }, true
}
