// Package ledger shares every bounded resource of the node among the pods that use it.
//
// Each pod has an account. Of every resource an account may always use its guaranteed share, limit divided by the number
// of open accounts; what others leave idle it may borrow; when another account wants its share, what was borrowed is
// not taken away but no more is lent until enough has come back, and what comes back goes to those below their share
// first. So one heavy pod can fill an idle node and cannot keep a second one out.
//
//	Acquire ──► free, and nobody below their share waits ──► granted
//	        └─► below share: waits at the head             ──► granted when something is released
//	        └─► above share: waits behind                  ──► granted when nothing else waits, or ctx ends
//
// All methods may be called from any goroutine. TryAcquire and Release are constant-time: two atomic-size critical
// sections under one mutex per resource.
package ledger

import (
	"context"
	"fmt"
	"sync"
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
	numResources
)

var resourceNames = [numResources]string{"handshakes", "connections", "streams", "bytes", "dials", "queries"}

// String is a metric label: the set is closed.
func (r Resource) String() string { return resourceNames[r] }

// Limits bound the whole node; zero means no limit.
type Limits [numResources]int64

// DefaultLimits suit a node of a few hundred pods: memory for windows stays below 1 GiB, and handshakes, which cost CPU,
// are few at a time.
func DefaultLimits() Limits {
	return Limits{Handshakes: 1024, Connections: 1 << 18, Streams: 1 << 18, Bytes: 1 << 30, Dials: 1 << 14, Queries: 1 << 14}
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
	pools [numResources]pool

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

// use is an account's part in one pool.
type use struct {
	held int64
}

// Pod returns the account of a pod, opening it if needed; each call needs one Close.
func (l *Ledger) Pod(key string) *Account {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.pods[key]
	if a == nil {
		a = &Account{pod: key, l: l}
		l.pods[key] = a
		l.addAccountsLocked(1)
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
		a.l.addAccountsLocked(-1)
	}
}

func (l *Ledger) addAccountsLocked(n int64) {
	for r := range l.pools {
		p := &l.pools[r]
		p.mu.Lock()
		p.accounts += n
		p.wakeLocked()
		p.mu.Unlock()
	}
}

// Pressure reports whether more than three quarters of r are in use on the node: a sign to ask for less.
func (a *Account) Pressure(r Resource) bool {
	if a == nil {
		return false
	}
	p := &a.l.pools[r]
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.limit > 0 && p.inUse > p.limit/4*3
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
	if n > p.limit { // waiting could never help
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
	if w.granted {
		return nil
	}
	p.removeLocked(w)
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
	u.held -= n
	p.inUse -= n
	p.wakeLocked()
}
