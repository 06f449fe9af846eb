package app

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// lockedBuffer: that time has passed orders nothing.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.b.Reset()
	return l.b.String()
}

func TestDropLogSums(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lockedBuffer
		dropc := make(chan redirect.Drop)
		l := &dropLog{
			watch: func(ctx context.Context, tell func(redirect.Drop)) error {
				for {
					select {
					case d := <-dropc:
						tell(d)
					case <-ctx.Done():
						return nil
					}
				}
			},
			name: func(c uint64) string { return fmt.Sprintf("shop/web-%d", c) },
			log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey {
					return slog.Attr{}
				}
				return a
			}})),
		}
		ctx, cancel := context.WithCancel(t.Context())
		donec := make(chan error, 1)
		go func() { donec <- l.Run(ctx) }()
		leak := func(cookie, n uint64, to string) {
			dropc <- redirect.Drop{Cookie: cookie, Reason: "leak", Meaning: "raw", Count: n, Remote: netip.MustParseAddrPort(to)}
			synctest.Wait()
		}
		want := func(lines ...string) {
			t.Helper()
			if got := strings.TrimSpace(out.take()); got != strings.Join(lines, "\n") {
				t.Errorf("log is\n%s\nwant\n%s", got, strings.Join(lines, "\n"))
			}
		}
		leak(1, 1, "10.0.0.1:80")
		want("pod=shop/web-1 reason=leak why=raw count=1 dst=10.0.0.1:80")
		leak(1, 5, "10.0.0.2:80")
		leak(1, 7, "10.0.0.3:80")
		leak(2, 2, "10.0.0.4:80")
		want("pod=shop/web-2 reason=leak why=raw count=2 dst=10.0.0.4:80")
		time.Sleep(dropLogPause)
		synctest.Wait()
		want("pod=shop/web-1 reason=leak why=raw count=12 dst=10.0.0.3:80")
		time.Sleep(2 * dropLogPause) // all is forgotten
		synctest.Wait()
		want("")
		leak(1, 3, "10.0.0.5:80")
		want("pod=shop/web-1 reason=leak why=raw count=3 dst=10.0.0.5:80")
		out.take()
		for i := range uint64(2 * dropLogPods) {
			leak(100+i, 1, "10.0.0.6:80")
		}
		if n := strings.Count(out.take(), "\n"); n != dropLogPods-1 {
			t.Errorf("%d lines at once, want %d", n, dropLogPods-1)
		}
		cancel()
		if err := <-donec; err != nil {
			t.Error(err)
		}
	})
}
