package hbone

import (
	"errors"
	"os"
	"time"
)

// Received data lies in the block that it was read into, with that of other streams. A stream whose application does not
// read would keep the whole block for its part, and where memory is scarce thousands of such streams are to fit. So there
// what has waited for stallTime is copied into blocks of its own size, and so is what comes behind it.

// stallTime is long for an application that reads: few copies are made in vain.
const stallTime = 20 * time.Millisecond

// write writes the parcel, or what dst takes of it without waiting.
func (o *outlet) write(p *parcel, wait bool) error {
	switch {
	case !wait:
		return o.raw.Control(p.some)
	case !o.s.t.scarce:
		return o.raw.Write(p.once)
	}
	_ = o.dst.SetWriteDeadline(time.Now().Add(stallTime)) // what is gone fails the write
	err := o.raw.Write(p.once)
	_ = o.dst.SetWriteDeadline(time.Time{}) // before anybody else writes
	if errors.Is(err, os.ErrDeadlineExceeded) {
		o.stalled(p)
		err = o.raw.Write(p.once)
	}
	return err
}

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
