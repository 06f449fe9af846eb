package serve

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestLargeResponsesTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turn := make(turns, 1)
		stopc := make(chan struct{})
		_, ok := turn.wait(t.Context(), stopc) // a client that never reads
		if !ok {
			t.Fatal("no turn, though nobody else had one")
		}
		begin := time.Now()
		done, ok := turn.wait(t.Context(), stopc)
		if took := time.Since(begin); !ok || took != turnLimit {
			t.Fatalf("turn %v after %v, want one after %v", ok, took, turnLimit)
		}
		done()
		done() // idempotent: it must not end somebody else's turn
		done, _ = turn.wait(t.Context(), stopc)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, ok := turn.wait(ctx, stopc); ok {
			t.Error("a turn for a stream that has ended")
		}
		close(stopc)
		if _, ok := turn.wait(t.Context(), stopc); ok {
			t.Error("a turn during shutdown")
		}
		done()
		if len(turn) != 0 {
			t.Error("a turn was not given back")
		}
	})
}
