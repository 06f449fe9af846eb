package hbone

import (
	"errors"
	"os"
	"sync"
	"time"
)

// Received data lies in the block that it was read into, with that of other streams. A stream whose application does not
// read would keep the whole block for its part, and where memory is scarce thousands of such streams are to fit. So there
// what has waited for stallTime is copied into blocks of its own size, and so is what comes behind it.

// stallTime is long for an application that reads: few copies are made in vain.
const stallTime = 50 * time.Millisecond

// write writes the parcel, or what dst takes of it without waiting.
func (o *outlet) write(p *parcel, wait bool) error {
	switch {
	case !wait:
		return o.raw.Control(p.some)
	case !o.s.t.scarce:
		return o.raw.Write(p.once)
	}
	waiting.add(o)
	err := o.raw.Write(p.once)
	if asked := waiting.remove(o); asked && errors.Is(err, os.ErrDeadlineExceeded) {
		o.stalled(p)
		err = o.raw.Write(p.once)
	}
	return err
}

// waitingSet are the outlets that wait for their applications and have not packed what waits. One look at all of them
// costs less than a deadline each, which most would not need.
type waitingSet struct {
	mu      sync.Mutex
	first   *outlet // guarded by mu
	looking bool    // guarded by mu: a timer is set
}

var waiting waitingSet

// place is an outlet's in the set, whose lock guards it.
type place struct {
	prev, next *outlet
	seen       bool // at the last look
	asked      bool // to stop waiting and pack, by a deadline for writing
}

func (w *waitingSet) add(o *outlet) {
	w.mu.Lock()
	defer w.mu.Unlock()
	o.place = place{next: w.first}
	if w.first != nil {
		w.first.place.prev = o
	}
	w.first = o
	if !w.looking {
		w.looking = true
		time.AfterFunc(stallTime, w.look)
	}
}

// remove reports whether o was asked. From then on it may wait for ever, and so may who writes next.
func (w *waitingSet) remove(o *outlet) (asked bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if o.place.asked {
		_ = o.dst.SetWriteDeadline(time.Time{}) // what is gone fails the next write
		return true
	}
	w.unlinkLocked(o)
	return false
}

func (w *waitingSet) unlinkLocked(o *outlet) {
	at := &o.place
	if at.prev != nil {
		at.prev.place.next = at.next
	} else {
		w.first = at.next
	}
	if at.next != nil {
		at.next.place.prev = at.prev
	}
	at.prev, at.next = nil, nil
}

// look asks those that it sees again, and comes again while others are left.
func (w *waitingSet) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for o := w.first; o != nil; {
		next := o.place.next
		if o.place.seen {
			w.unlinkLocked(o)
			o.place.asked = true
			_ = o.dst.SetWriteDeadline(past)
		}
		o.place.seen = true
		o = next
	}
	if w.looking = w.first != nil; w.looking {
		time.AfterFunc(stallTime, w.look)
	}
}

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// stalled moves what waits out of the blocks that others use, too.
func (o *outlet) stalled(p *parcel) {
	p.pack()
	s := o.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stalled = true
	s.pieces = append([]piece(nil), pack(s.pieces[s.first:])...)
	s.first = 0
}

// pack does for a parcel, whose views say what is left of its pieces.
func (p *parcel) pack() {
	left := p.pieces[p.lo:p.hi]
	for i := range left {
		left[i].lo = left[i].hi - len(p.views[p.lo+i])
	}
	n := copy(p.pieces[:], pack(left))
	clear(p.pieces[n:])
	clear(p.views[:])
	p.lo, p.hi = 0, n
	for i, pc := range p.pieces[:n] {
		p.views[i] = pc.blk.data[pc.lo:pc.hi]
	}
}

// pack copies pieces together, in place, into blocks that have no room to spare, of at most largeBlock each.
func pack(pieces []piece) []piece {
	packed := pieces[:0]
	for len(pieces) > 0 {
		n, k := 0, 0
		for ; k < len(pieces) && (k == 0 || n+pieces[k].hi-pieces[k].lo <= largeBlock); k++ {
			n += pieces[k].hi - pieces[k].lo
		}
		blk := getTinyBlock(n)
		at := 0
		for _, pc := range pieces[:k] {
			at += copy(blk.data[at:], pc.blk.data[pc.lo:pc.hi])
			pc.blk.release()
		}
		pieces = pieces[k:]
		packed = append(packed, piece{blk: blk, hi: n, own: true})
	}
	return packed
}
