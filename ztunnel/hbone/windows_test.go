package hbone

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// What a peer is told is what it may do: a window's worth and no byte more, and no frame over the limit.
func TestWindowsAreWhatPeersGet(t *testing.T) {
	hold := func(ctx context.Context, r *Request) {
		s, _ := r.Accept()
		<-ctx.Done()
		_ = s.Close()
	}
	t.Run("stream", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			ts := newTestServer(t, ServerConfig{Handler: hold, Windows: Windows{Stream: 128 << 10}})
			ts.greet()
			ts.raw.SetBuffer(1 << 20)
			ts.connect(1)
			ts.wantStatus("CONNECT", 1, "200")
			for range 128 << 10 / 16384 {
				ts.ok(ts.WriteData(1, false, make([]byte, 16384)))
			}
			ts.ok(ts.WriteData(1, false, []byte("x")))
			ts.wantReset("one byte too many", 1, http2.ErrCodeFlowControl)
			_ = ts.hangUp()
		})
	})
	tun, _ := looseTunnel()
	tun.windows.Frame, tun.in.gotFirst = 20_000, true
	err := tun.in.beginFrame(frameHeader{length: 20_001, typ: frameData, streamID: 1})
	if e, ok := errors.AsType[*ConnError](err); !ok || e.Code != CodeFrameSize {
		t.Errorf("a frame over the limit: %v", err)
	}
}

func TestWindowsGrowNoFurtherThanAsked(t *testing.T) {
	for _, tt := range []struct {
		w          Windows
		base, more int
	}{
		{Windows{}, baseWindow, startWindow - baseWindow},
		{Windows{Stream: 65535}, 65535, 0},
		{Windows{Stream: 100_000}, baseWindow, 100_000 - baseWindow},
		{Windows{Stream: 1}, 65535, 0},
	} {
		w := tt.w.withDefaults()
		if w.base() != tt.base || w.start()-w.base() != tt.more {
			t.Errorf("%+v: %d + %d, want %d + %d", tt.w, w.base(), w.start()-w.base(), tt.base, tt.more)
		}
	}
	tun, _ := looseTunnel()
	tun.windows.Stream, tun.start = 100_000, 100_000
	s := tun.newStream(1)
	s.widen()
	for range 10 {
		s.growLocked()
	}
	if s.window != 100_000 {
		t.Errorf("grew to %d", s.window)
	}
}

// countedRecords is looseRecords that may be looked at while it is used.
type countedRecords struct {
	looseRecords
	n atomic.Int64
}

func (c *countedRecords) TryBatch(parts []segment) (bool, error) { return false, c.WriteBatch(parts) }
func (c *countedRecords) WriteBatch(parts []segment) error {
	for _, p := range parts {
		c.n.Add(int64(p.n))
	}
	return nil
}

// Window that a peer does not need soon leaves with what is sent next, or after lateLimit; what it waits for, at once.
func TestWindowLeavesInTime(t *testing.T) {
	const update = frameHeaderLen + 4
	for _, tt := range []struct {
		name string
		half time.Duration // how long half a window has lasted
		rtt  time.Duration
		talk bool // something is sent meanwhile
		at   time.Duration
	}{
		{"at full speed", time.Microsecond, 0, false, 0},
		{"slowly", 2*2*lateLimit + 1, 0, false, lateLimit},
		{"in a conversation", time.Second, 0, true, lateLimit / 2},
		{"not faster than the round trip lets it", time.Second, time.Second, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tun, _ := looseTunnel()
				rc := new(countedRecords)
				tun.w.rc = rc
				s := tun.newStream(1)
				s.sendWindow = 1 << 20
				tun.rtt.Store(int64(tt.rtt))
				buf := make([]byte, s.window/2)
				half := func() {
					d := delivery{t: t, s: s}
					d.feed(buf)
					if n, err := s.Read(buf); n != len(buf) || err != nil {
						t.Fatal(n, err)
					}
				}
				half()
				synctest.Wait()
				if n := int(rc.n.Load()); n != update {
					t.Fatalf("%d bytes sent after the first half, want %d", n, update)
				}
				time.Sleep(tt.half)
				half()
				synctest.Wait()
				began, want := time.Now(), 2*update
				if tt.talk {
					time.Sleep(lateLimit / 2)
					if _, err := s.Write([]byte("x")); err != nil {
						t.Fatal(err)
					}
					want += frameHeaderLen + 1
				}
				for int(rc.n.Load()) < want && time.Since(began) < time.Second {
					time.Sleep(lateLimit / 4)
					synctest.Wait()
				}
				if n, d := int(rc.n.Load()), time.Since(began); n != want || d != tt.at {
					t.Errorf("%d bytes sent after %v, want %d after %v", n, d, want, tt.at)
				}
			})
		})
	}
}
