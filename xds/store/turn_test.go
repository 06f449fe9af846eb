package store

import (
	"testing"
	"testing/synctest"
	"time"
)

// Whoever comes again only after all others have had their turn takes a part of the time that they took, and nobody
// waits where nobody else wants to run.
func TestTurns(t *testing.T) {
	const blocks, work = 1000, 20 * time.Microsecond
	for _, tt := range []struct {
		name  string
		round time.Duration // of the others
		most  time.Duration // of all of it
	}{
		{"nobody else", 0, blocks * work},
		{"one connection", 10 * time.Microsecond, 3 * blocks * work},
		{"busy", time.Millisecond, 10 * blocks * work},
		{"saturated", 320 * time.Millisecond, 3 * 320 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began, yields := time.Now(), 0
				tn := turn{yield: func() { yields++; time.Sleep(tt.round) }}
				for i := range blocks * turnResources {
					if i%turnResources == 0 {
						time.Sleep(work)
					}
					tn.next(i)
				}
				if got := time.Since(began); got > tt.most {
					t.Errorf("it took %v and %d turns, want %v at most", got, yields, tt.most)
				}
				if tt.round == 0 && yields != blocks {
					t.Errorf("%d turns, want one for each of %d", yields, blocks)
				}
			})
		})
	}
}
