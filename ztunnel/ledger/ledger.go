// Package ledger shares every bounded resource of the node among the pods that use it.
//
// Each pod has an account. Its share of a resource is the limit divided by the number of open accounts. Half of the share
// is reserved: nobody else ever has it, so that it is to be had at once. All else is lent to whoever asks; it is not taken
// away again, but when another account wants its share, no more is lent until enough has come back, and what comes back
// goes to those below their share first, in turn. So one heavy pod can fill most of an idle node and cannot keep a second
// one out.
//
//	Acquire ──► reserved, or free and nobody below their share waits ──► granted
//	        └─► below share: waits                                   ──► granted in turn when something is released
//	        └─► above share: waits behind these                      ──► granted when they have, or ctx ends
//
// Turns are of another kind: a goroutine holds one only while it computes, so that as many run as there are processors
// for it, and each pod's wait for theirs in turn.
//
// All methods may be called from any goroutine. TryAcquire and Release are constant-time while nobody waits: a critical
// section under one mutex per resource.
package ledger

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"sync"
	"sync/atomic"
)

// Resource is one bounded thing.
type Resource int

const (
	Handshakes  Resource = iota // TLS handshakes under way, both directions
	Connections                 // accepted and dialled connections
	Streams                     // HBONE streams
	Bytes                       // receive windows granted beyond each stream's minimum
	Dials                       // TCP connects under way
	Queries                     // DNS queries under way
	Turns                       // goroutines that compute for handshakes
	Openings                    // accepted connections that are not open yet; see Opening
	numResources
)

var resourceNames = [numResources]string{"handshakes", "connections", "streams", "bytes", "dials", "queries", "turns", "openings"}

// String is a metric label: the set is closed.
func (r Resource) String() string { return resourceNames[r] }

// Limits bound the whole node; zero means no limit.
type Limits [numResources]int64

// DefaultLimits suit a node of a few hundred pods: memory for windows stays below 1 GiB, and handshakes, which cost CPU,
// are few at a time and have at most half of the processors at once: the other half relays.
func DefaultLimits() Limits {
	return Limits{Handshakes: 1024, Connections: 1 << 18, Streams: 1 << 18, Bytes: 1 << 30, Dials: 1 << 14, Queries: 1 << 14,
		Turns: int64(max(1, runtime.GOMAXPROCS(0)/2)), Openings: 32 * int64(runtime.GOMAXPROCS(0))}
}

// ExhaustedError says which bound refused whom.
type ExhaustedError struct {
	Pod      string
	Resource Resource
	Limit    int64 // of the node
	InUse    int64 // by this pod
	Cause    error // why waiting ended; nil when the caller did not wait
}

func (e *ExhaustedError) Error() string {
	s := fmt.Sprintf("pod %s: no %s left: uses %d of the node's %d", e.Pod, e.Resource, e.InUse, e.Limit)
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

func (e *ExhaustedError) Unwrap() error { return e.Cause }

// Ledger holds the accounts of one node.
type Ledger struct {
	pools   [numResources]pool
	memory  atomic.Int64 // see SetMemory
	unasked atomic.Int64 // see Account.Unasked

	mu   sync.Mutex
	pods map[string]*Account // guarded by mu
}

// New returns a ledger with the given limits.
func New(l Limits) *Ledger {
	g := &Ledger{pods: make(map[string]*Account)}
	for r := range g.pools {
		g.pools[r].limit = l[r]
	}
	return g
}

// Account is one pod's view of the ledger. A nil Account has no limits: every call succeeds.
type Account struct {
	pod  string
	l    *Ledger
	refs int // guarded by l.mu

	used [numResources]use // used[r] is guarded by l.pools[r].mu
}

// Pod returns the account of a pod, opening it if needed; each call needs one Close.
func (l *Ledger) Pod(key string) *Account {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.pods[key]
	if a == nil {
		a = &Account{pod: key, l: l}
		l.pods[key] = a
		l.resizeLocked(nil)
	}
	a.refs++
	return a
}

// Accounts is the number of open accounts.
func (l *Ledger) Accounts() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.pods)
}

// SetLimit changes how much of r the node has, at most; zero is no limit. What is held beyond that stays with who holds it.
func (l *Ledger) SetLimit(r Resource, limit int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.pools[r]
	p.mu.Lock()
	p.limit = limit
	p.mu.Unlock()
	l.resizeLocked(nil)
}

// Close gives the account back. What it still holds stays counted until released.
func (a *Account) Close() {
	if a == nil {
		return
	}
	a.l.mu.Lock()
	defer a.l.mu.Unlock()
	if a.refs == 0 {
		return
	}
	if a.refs--; a.refs == 0 {
		delete(a.l.pods, a.pod)
		a.l.resizeLocked(a)
	}
}

// resizeLocked tells the pools that an account was opened, or that one has closed.
func (l *Ledger) resizeLocked(closed *Account) {
	for r := range l.pools {
		p := &l.pools[r]
		p.mu.Lock()
		if closed != nil {
			closed.used[r].closed = true
		}
		p.resizeLocked(len(l.pods), func(yield func(int64) bool) {
			for a := range maps.Values(l.pods) {
				if !yield(a.used[r].held) {
					return
				}
			}
		})
		p.mu.Unlock()
	}
}

// Pressure reports whether the account lives on loan while most of what may be lent is: a sign to ask for less. Who is
// within what is reserved feels none, whatever others do.
func (a *Account) Pressure(r Resource) bool {
	if a == nil {
		return false
	}
	p := &a.l.pools[r]
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pressureLocked(&a.used[r])
}

// InUse returns what the account holds of r.
func (a *Account) InUse(r Resource) int64 {
	if a == nil {
		return 0
	}
	p := &a.l.pools[r]
	p.mu.Lock()
	defer p.mu.Unlock()
	return a.used[r].held
}

// TryAcquire takes n of r if they are to be had at once.
func (a *Account) TryAcquire(r Resource, n int64) bool {
	if a == nil {
		return true
	}
	p := &a.l.pools[r]
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tryLocked(&a.used[r], n)
}

// Acquire takes n of r, waiting until they are to be had or ctx ends; the error is then an *ExhaustedError.
func (a *Account) Acquire(ctx context.Context, r Resource, n int64) error {
	if a == nil {
		return nil
	}
	p := &a.l.pools[r]
	p.mu.Lock()
	if p.tryLocked(&a.used[r], n) {
		p.mu.Unlock()
		return nil
	}
	if p.neverFitsLocked(&a.used[r], n) { // waiting could never help
		defer p.mu.Unlock()
		return a.exhausted(r, nil)
	}
	w := p.enqueueLocked(&a.used[r], n)
	p.mu.Unlock()

	select {
	case <-w.grantedc:
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if w.el == nil { // granted meanwhile
		return nil
	}
	p.removeLocked(w)
	p.wakeLocked()
	return a.exhausted(r, context.Cause(ctx))
}

func (a *Account) exhausted(r Resource, cause error) error {
	return &ExhaustedError{Pod: a.pod, Resource: r, Limit: a.l.pools[r].limit, InUse: a.used[r].held, Cause: cause}
}

// Release gives n of r back.
func (a *Account) Release(r Resource, n int64) {
	if a == nil || n == 0 {
		return
	}
	p := &a.l.pools[r]
	p.mu.Lock()
	defer p.mu.Unlock()
	u := &a.used[r]
	if u.held < n {
		panic("BUG: ledger: release of more than was acquired: " + r.String())
	}
	p.addLocked(u, -n)
	p.wakeLocked()
}
