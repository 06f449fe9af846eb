package ledger

import (
	"container/list"
	"sync"
)

// pool is one resource of the node.
//
// Invariant: inUse is the sum of all accounts' held, and inUse <= limit (limit > 0). A waiter waits only because the
// units are not free, or because a waiter that is within its share has to go first.
type pool struct {
	mu       sync.Mutex
	limit    int64 // 0: unlimited; immutable
	accounts int64
	inUse    int64
	waiters  list.List // of *waiter, in order of arrival
	demand   int64     // units wanted by waiters within their share
}

type waiter struct {
	use      *use
	n        int64
	el       *list.Element
	entitled bool // counted in demand
	granted  bool
	grantedc chan struct{}
}

// shareLocked is what every account may count on.
func (p *pool) shareLocked() int64 {
	if p.accounts <= 1 {
		return p.limit
	}
	return max(1, p.limit/p.accounts)
}

func (p *pool) entitledLocked(u *use, n int64) bool { return u.held+n <= p.shareLocked() }

// tryLocked grants n at once if they are free and, for a borrower, if nobody within their share waits for them.
func (p *pool) tryLocked(u *use, n int64) bool {
	if p.limit > 0 {
		free := p.limit - p.inUse
		if n > free || (p.demand > 0 || p.waiters.Len() > 0) && !p.entitledLocked(u, n) {
			return false
		}
	}
	u.held += n
	p.inUse += n
	return true
}

func (p *pool) enqueueLocked(u *use, n int64) *waiter {
	w := &waiter{use: u, n: n, grantedc: make(chan struct{})}
	w.el = p.waiters.PushBack(w)
	p.markLocked(w)
	return w
}

// markLocked keeps demand true when the share, or what the waiter's account holds, has changed.
func (p *pool) markLocked(w *waiter) {
	if e := p.entitledLocked(w.use, w.n); e != w.entitled {
		w.entitled = e
		if e {
			p.demand += w.n
		} else {
			p.demand -= w.n
		}
	}
}

func (p *pool) removeLocked(w *waiter) {
	p.waiters.Remove(w.el)
	if w.entitled {
		p.demand -= w.n
		w.entitled = false
	}
	p.wakeLocked()
}

// wakeLocked hands out what is free: first to waiters within their share, then to borrowers, each in order of arrival.
// It runs only when there are waiters, so that the common path stays constant-time.
func (p *pool) wakeLocked() {
	if p.waiters.Len() == 0 {
		return
	}
	for _, entitled := range []bool{true, false} {
		for el := p.waiters.Front(); el != nil; {
			w, next := el.Value.(*waiter), el.Next()
			p.markLocked(w)
			if w.entitled == entitled {
				if w.n > p.limit-p.inUse {
					return // those behind must not overtake for ever
				}
				p.grantLocked(w)
			}
			el = next
		}
	}
}

func (p *pool) grantLocked(w *waiter) {
	p.waiters.Remove(w.el)
	if w.entitled {
		p.demand -= w.n
		w.entitled = false
	}
	w.use.held += w.n
	p.inUse += w.n
	w.granted = true
	close(w.grantedc)
}
