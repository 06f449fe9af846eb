package hbone

import (
	"context"
	"errors"
	"testing"

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
