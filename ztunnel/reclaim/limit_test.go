package reclaim

import (
	"context"
	"math"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// What the runtime may have leaves room for the kernel's part.
func TestRuntimeShare(t *testing.T) {
	for limit, want := range map[Limit]int64{0: math.MaxInt64, 1: 0, 16 << 20: 10905190, 64 << 20: 43620761, 256 << 20: 174483046, 1 << 40: 714682558054} {
		if got := limit.Runtime(); got != want {
			t.Errorf("%d: %d of the runtime, want %d", limit, got, want)
		}
	}
}

func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		donec := make(chan error)
		var now atomic.Uint64
		var got []Limit
		go func() {
			donec <- Follow(ctx, 100, func() Limit { return Limit(now.Load()) }, func(l Limit) { got = append(got, l) })
		}()
		for _, l := range []Limit{100, 200, 200, 0, 200, 50} { // 0: it could not be read
			now.Store(uint64(l))
			time.Sleep(lookAgain)
			synctest.Wait()
		}
		cancel()
		if err := <-donec; err != nil || !slices.Equal(got, []Limit{200, 50}) {
			t.Errorf("%v, %v", got, err)
		}
	})
}
