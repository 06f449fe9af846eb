package hbone

import (
	"sync"
	"sync/atomic"
)

const (
	// tinyBlock is for what a stream holds of which nobody reads, where many such must fit a small memory.
	tinyBlock  = 4 << 10
	smallBlock = recordLen
	// largeBlock is the knee of the curve: smaller batches lose throughput to syscalls, larger ones gain nothing.
	largeBlock = 8 * recordLen
	// hugeBlock is for reading from a tunnel that has more at hand than a large block takes: whoever its bytes are for is
	// woken half as often.
	hugeBlock = 16 * recordLen
)

// block is pooled memory, with one byte of capacity more than length: a record's content type goes there.
//
// Whoever holds a reference may use the part it was given; the last one to let go returns it.
type block struct {
	data []byte
	kept bool // of no pool: its size is that of what it was made for
	refs atomic.Int32
}

var (
	tinyBlocks  = sync.Pool{New: func() any { return &block{data: make([]byte, tinyBlock)} }}
	smallBlocks = sync.Pool{New: func() any { return &block{data: make([]byte, smallBlock+1)[:smallBlock]} }}
	largeBlocks = sync.Pool{New: func() any { return &block{data: make([]byte, largeBlock+1)[:largeBlock]} }}
	hugeBlocks  = sync.Pool{New: func() any { return &block{data: make([]byte, hugeBlock+1)[:hugeBlock]} }}
)

// getBlock returns a block of at least n bytes (at most hugeBlock) with one reference.
func getBlock(n int) *block {
	p := &smallBlocks
	switch {
	case n > largeBlock:
		p = &hugeBlocks
	case n > smallBlock:
		p = &largeBlocks
	}
	b := p.Get().(*block)
	b.refs.Store(1)
	return b
}

// getTinyBlock returns a block for n bytes or a few more, with one reference.
func getTinyBlock(n int) *block {
	if n > tinyBlock {
		b := &block{data: make([]byte, n), kept: true}
		b.refs.Store(1)
		return b
	}
	b := tinyBlocks.Get().(*block)
	b.refs.Store(1)
	return b
}

func (b *block) retain() { b.refs.Add(1) }

func (b *block) release() {
	switch n := b.refs.Add(-1); {
	case n > 0:
	case n < 0:
		panic("BUG: hbone: block released twice")
	case b.kept:
	case len(b.data) == tinyBlock:
		tinyBlocks.Put(b)
	case len(b.data) == smallBlock:
		smallBlocks.Put(b)
	case len(b.data) == largeBlock:
		largeBlocks.Put(b)
	default:
		hugeBlocks.Put(b)
	}
}
