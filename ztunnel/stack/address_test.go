package stack

import "unsafe"

// address is where p is now: the runtime moves what is on a stack with it.
//
//go:noinline
func address(p *byte) uintptr { return uintptr(unsafe.Pointer(p)) }
