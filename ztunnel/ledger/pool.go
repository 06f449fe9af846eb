package ledger

import (
	"container/list"
	"sync"
)

// pool is one resource of the node.
//
// Half of every open account's share is reserved for it. What is held beyond reserves is lent, out of what remains:
//
//	covered = Σ min(held, reserve)   of the open accounts
//	lent    = inUse − covered
//	lent   <= limit − Σ reserve
//
// Invariant: inUse = Σ held <= limit (limit > 0), unless that has been lowered since. A waiter waits only because its units are not to be had, or because
// one that is to go first waits. When an account opens while everything is lent, reserves shrink and more is lent than
// may be; the new one then waits for the first units to come back.
type pool struct {
	mu       sync.Mutex
	limit    int64 // 0: unlimited
	accounts int64
	reserve  int64 // of each open account
	inUse    int64
	covered  int64
	waiting  list.List // of *use with waiters; the one that was served last is last
}

// use is an account's part in one pool.
type use struct {
	held    int64
	closed  bool
	waiters list.List     // of *waiter, in order of arrival
	el      *list.Element // in pool.waiting; nil without waiters
}

type waiter struct {
	use      *use
	n        int64
	el       *list.Element // nil once granted
	grantedc chan struct{}
}

// shareLocked is what an account is entitled to when all want as much as they can get.
func (p *pool) shareLocked() int64 { return max(1, p.limit/max(1, p.accounts)) }

// entitledLocked reports whether n more keep an account within its share.
func (p *pool) entitledLocked(u *use, n int64) bool { return u.held+n <= p.shareLocked() }

// reserveLocked is what is kept for an account: nothing once it is closed.
func (p *pool) reserveLocked(u *use) int64 {
	if u.closed {
		return 0
	}
	return p.reserve
}

func (p *pool) lendableLocked() int64 { return p.limit - p.reserve*p.accounts }

// addLocked changes what an account holds.
func (p *pool) addLocked(u *use, n int64) {
	p.covered -= min(u.held, p.reserveLocked(u))
	u.held += n
	p.inUse += n
	p.covered += min(u.held, p.reserveLocked(u))
}

// fitsLocked reports whether n more are to be had: out of the account's reserve, and beyond it out of what may be lent.
func (p *pool) fitsLocked(u *use, n int64) bool {
	if p.limit == 0 {
		return true
	}
	borrowed := u.held + n - max(u.held, p.reserveLocked(u))
	return n <= p.limit-p.inUse && (borrowed <= 0 || p.inUse-p.covered+borrowed <= p.lendableLocked())
}

// neverFitsLocked reports whether an account could not have n more although others held nothing.
func (p *pool) neverFitsLocked(u *use, n int64) bool {
	return p.limit > 0 && n > p.lendableLocked()+p.reserveLocked(u)
}

// pressureLocked reports whether an account lives on loan while little is left to lend.
func (p *pool) pressureLocked(u *use) bool {
	return p.limit > 0 && u.held > p.reserveLocked(u) && (p.inUse > p.limit/4*3 || p.inUse-p.covered > p.lendableLocked()/4*3)
}

// tryLocked grants n at once if they are to be had and nobody waits who is to go first: a borrower comes after everyone,
// one within its share after those of its own account.
func (p *pool) tryLocked(u *use, n int64) bool {
	if !p.fitsLocked(u, n) || p.waiting.Len() > 0 && (u.el != nil || !p.entitledLocked(u, n)) {
		return false
	}
	p.addLocked(u, n)
	return true
}

func (p *pool) enqueueLocked(u *use, n int64) *waiter {
	w := &waiter{use: u, n: n, grantedc: make(chan struct{})}
	w.el = u.waiters.PushBack(w)
	if u.el == nil {
		u.el = p.waiting.PushBack(u)
	}
	return w
}

// removeLocked takes a waiter out of its line, and an account without waiters out of the pool's.
func (p *pool) removeLocked(w *waiter) {
	u := w.use
	u.waiters.Remove(w.el)
	w.el = nil
	if u.waiters.Len() == 0 {
		p.waiting.Remove(u.el)
		u.el = nil
	}
}

// wakeLocked hands out what has come back: to accounts within their share first, then to borrowers, among these in
// turn, so that one with a thousand waiters gets no more than one with a single one. The first that does not fit ends
// it: who asks for much must not be overtaken for ever.
func (p *pool) wakeLocked() {
	for p.waiting.Len() > 0 {
		u := p.nextLocked()
		w := u.waiters.Front().Value.(*waiter)
		if !p.fitsLocked(u, w.n) {
			return
		}
		p.addLocked(u, w.n)
		p.removeLocked(w)
		if u.el != nil {
			p.waiting.MoveToBack(u.el)
		}
		close(w.grantedc)
	}
}

// nextLocked is the account whose turn it is: one whose reserve has it, one within its share, or any, and of these the
// one that was served longest ago. Accounts that wait are few, however many waiters each has.
func (p *pool) nextLocked() *use {
	var entitled *use
	for el := p.waiting.Front(); el != nil; el = el.Next() {
		u := el.Value.(*use)
		n := u.waiters.Front().Value.(*waiter).n
		if u.held+n <= p.reserveLocked(u) && p.fitsLocked(u, n) {
			return u
		}
		if entitled == nil && p.entitledLocked(u, n) {
			entitled = u
		}
	}
	if entitled != nil {
		return entitled
	}
	return p.waiting.Front().Value.(*use)
}

// resizeLocked follows a change of the accounts, each of which has another reserve now. held yields what each open one
// has.
func (p *pool) resizeLocked(accounts int, held func(yield func(int64) bool)) {
	p.accounts = int64(accounts)
	p.reserve = p.limit / 2 / max(1, p.accounts)
	p.covered = 0
	for h := range held {
		p.covered += min(h, p.reserve)
	}
	p.wakeLocked()
}
