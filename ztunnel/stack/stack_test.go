package stack

import (
	"runtime"
	"testing"
)

// deep is as connections are: frame by frame.
//
//go:noinline
func deep(n int) int {
	var frame [200]byte
	frame[n] = byte(n)
	if n == 0 {
		return int(frame[n])
	}
	return deep(n-1) + int(frame[n])
}

// BenchmarkReserve is a goroutine that needs some 5 KiB, with and without.
func BenchmarkReserve(b *testing.B) {
	for _, bc := range []struct {
		name  string
		start func()
	}{{"without", func() {}}, {"with", Reserve}} {
		b.Run(bc.name, func(b *testing.B) {
			for b.Loop() {
				donec := make(chan int)
				go func() { bc.start(); donec <- deep(18) }()
				<-donec
			}
		})
	}
}

// What has been reserved is there: going deep moves nothing.
func TestReserve(t *testing.T) {
	moved := make(chan bool)
	go func() {
		Reserve()
		var here byte
		at := address(&here)
		runtime.KeepAlive(deep(18))
		moved <- at != address(&here)
	}()
	if <-moved {
		t.Error("the stack was moved")
	}
}
