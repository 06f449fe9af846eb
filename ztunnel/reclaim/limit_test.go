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

// A peer's bytes that an application does not read do not fill the container: 1 GiB of windows did one of 64 MiB.
func TestWindows(t *testing.T) {
	const most = 1 << 30
	for limit, want := range map[Limit]int64{0: most, 1: fewestBytes, 16 << 20: fewestBytes, 64 << 20: 4 << 20, 256 << 20: 28 << 20, 1 << 40: most} {
		if got := limit.Windows(most); got != want {
			t.Errorf("%d: %d bytes of windows, want %d", limit, got, want)
		}
	}
}

// What the runtime and the connections may have leaves room for the kernel's part in all limits.
func TestShares(t *testing.T) {
	const most = 1 << 18
	for _, tt := range []struct {
		limit       Limit
		runtime     int64
		connections int64
	}{
		{0, math.MaxInt64, most},
		{1, 0, fewest},
		{16 << 20, 10905190, fewest},
		{64 << 20, 43620761, 2048},
		{256 << 20, 174483046, 14336},
		{1 << 40, 714682558054, most},
	} {
		if r, c := tt.limit.Runtime(), tt.limit.Connections(most); r != tt.runtime || c != tt.connections {
			t.Errorf("%d: %d of the runtime and %d connections, want %d and %d", tt.limit, r, c, tt.runtime, tt.connections)
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
