package ledger

import (
	"context"
	"sync/atomic"
	"time"
)

// openingTime is how long a connection counts as opening. One that takes longer waits, for a peer or a name, and costs
// no processor: counting it would let peers that do not answer stop the pod's other connections.
const openingTime = 20 * time.Millisecond

// Opening is a connection that was accepted and is not open yet. Accepting costs the pod's processes nothing and the
// node much, so a pod that connects faster than the node can follow would otherwise leave it with a backlog that
// everybody waits for. While a pod has its share of openings its listeners wait, and what it dials waits in its own
// kernel's queues.
//
// A nil Opening is over. Done may be called from any goroutine.
type Opening struct {
	account *Account
	over    atomic.Bool
	timer   *time.Timer
}

// Open begins an opening; it waits until the account may have one more, or ctx ends.
func (a *Account) Open(ctx context.Context) (*Opening, error) {
	if a == nil {
		return nil, nil
	}
	if err := a.Acquire(ctx, Openings, 1); err != nil {
		return nil, err
	}
	o := &Opening{account: a}
	o.timer = time.AfterFunc(openingTime, o.end)
	return o, nil
}

// Done says that the connection is open, or that there will be none.
func (o *Opening) Done() {
	if o != nil {
		o.timer.Stop()
		o.end()
	}
}

func (o *Opening) end() {
	if !o.over.Swap(true) {
		o.account.Release(Openings, 1)
	}
}

type openingKey struct{}

// With makes o known to who serves the connection.
func (o *Opening) With(ctx context.Context) context.Context {
	if o == nil {
		return ctx
	}
	return context.WithValue(ctx, openingKey{}, o)
}

// Opened says that the connection served under ctx is open.
func Opened(ctx context.Context) {
	o, _ := ctx.Value(openingKey{}).(*Opening)
	o.Done()
}
