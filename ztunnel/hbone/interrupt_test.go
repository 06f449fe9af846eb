package hbone

import (
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Who relays may interrupt RelayFrom's waiting at any moment, with a deadline, and go on later: no byte is lost, comes
// twice or changes places, and no window stays reserved, also while the stream's is exhausted.
func TestInterruptedRelayFrom(t *testing.T) {
	m, acc := newPairs(t, tcpPair)
	c, s := streamPair(t, m, acc)
	src, app, err := tcpPair(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	defer src.Close()
	const total = 8 << 20 // several windows
	var stop atomic.Bool
	var wg, asking sync.WaitGroup
	sent, got := sha256.New(), sha256.New()
	wg.Go(func() {
		buf := make([]byte, 64<<10)
		for left := total; left > 0; {
			k := min(left, 1+rand.IntN(len(buf)))
			if rand.IntN(4) == 0 {
				k = min(left, 1+rand.IntN(64))
			}
			for i := range k {
				buf[i] = byte(left + i)
			}
			sent.Write(buf[:k])
			if _, err := app.Write(buf[:k]); err != nil {
				t.Error(err)
				return
			}
			left -= k
		}
		_ = app.(*net.TCPConn).CloseWrite()
	})
	asking.Go(func() {
		for !stop.Load() {
			_ = src.SetReadDeadline(time.Unix(1, 0))
		}
	})
	var up atomic.Uint64
	interrupted := 0
	wg.Go(func() {
		for {
			rerr, werr := c.RelayFrom(src, &up)
			if errors.Is(rerr, os.ErrDeadlineExceeded) && werr == nil {
				interrupted++
				_ = src.SetReadDeadline(time.Time{})
				continue
			}
			if rerr != nil || werr != nil {
				t.Errorf("RelayFrom: %v, %v", rerr, werr)
			}
			_ = c.CloseWrite()
			return
		}
	})
	buf := make([]byte, 200<<10)
	for {
		k, err := s.Read(buf[:1+rand.IntN(len(buf))])
		got.Write(buf[:k])
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	stop.Store(true)
	asking.Wait()
	if string(got.Sum(nil)) != string(sent.Sum(nil)) || up.Load() != total {
		t.Errorf("other bytes arrived, or were counted: %d of %d", up.Load(), total)
	}
	if interrupted == 0 {
		t.Error("nothing was interrupted")
	}
	t.Logf("interrupted %d times", interrupted)
	_, _ = s.Close(), c.Close()
}
