// Package stack makes room on a goroutine's stack at its start.
//
// A goroutine begins with 2 KiB, and each time that is not enough the runtime
// doubles it and copies all frames: a connection's goroutine did so two or three
// times, at its deepest. At the start there is nothing to copy.
//
// Reserve may be called by any goroutine, once, before it goes deep. The room goes
// when the goroutine does, or when a collection finds three quarters of it unused.
package stack

// room is what a connection needs from being accepted to its line in the log, so
// that the stack becomes 8 KiB.
const room = 6 << 10

// filled is never true, which the compiler does not know: a frame that is used
// would be cleared first.
var filled bool

// Reserve makes the stack large enough: the runtime has done so when it begins.
//
//go:noinline
func Reserve() {
	if filled {
		var frame [room]byte
		touch(&frame)
	}
}

//go:noinline
func touch(*[room]byte) {}
