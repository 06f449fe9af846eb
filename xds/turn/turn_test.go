package turn

import (
	"testing"
	"testing/synctest"
	"time"
)

// Whoever comes again only after all others have had their turn takes a part of the time that they took, and nobody
// waits where nobody else wants to run.
func TestTurns(t *testing.T) {
	const n, work = 64_000, 400 * time.Nanosecond
	for _, tt := range []struct {
		name  string
		round time.Duration // of the others
		most  time.Duration // of all of it
	}{
		{"nobody else", 0, n * work},
		{"one connection", 10 * time.Microsecond, 2 * n * work},
		{"busy", time.Millisecond, 10 * n * work},
		{"saturated", 320 * time.Millisecond, 4 * 320 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began, yields := time.Now(), 0
				tn := Taker{yield: func() { yields++; time.Sleep(tt.round) }}
				for range n {
					time.Sleep(work)
					tn.Next()
				}
				if got := time.Since(began); got > tt.most {
					t.Errorf("it took %v and %d turns, want %v at most", got, yields, tt.most)
				}
				if least := int(n * work / (2 * slice)); tt.round == 0 && yields < least {
					t.Errorf("%d turns, want %d at least", yields, least)
				}
			})
		})
	}
}
