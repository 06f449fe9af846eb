package hbone

import (
	"context"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"

	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// What a stream took of its tunnel's window and could not send is given back when the stream ends meanwhile: the peer
// will never credit it, and the tunnel's other streams need it.
func TestWindowOfUnsentDataIsGivenBack(t *testing.T) {
	reset := &ResetError{CodeCancel, true}
	t.Run("read from a socket", func(t *testing.T) {
		tun, _ := looseTunnel()
		s := tun.newStream(1)
		s.sendWindow = 1 << 20
		in := relayIn{s: s, want: smallBlock - frameHeaderLen}
		if !in.tryReserve() {
			t.Fatal("no window")
		}
		in.blk, in.n = getBlock(framedLen(in.reserved, in.frame)), in.reserved/2
		s.failWrite(reset)
		if err := in.send(); err == nil {
			t.Error("sent on a stream that was reset")
		}
		if tun.w.window != defaultWindow || s.sendWindow != 1<<20 {
			t.Errorf("window %d of %d, stream's %d", tun.w.window, defaultWindow, s.sendWindow)
		}
	})
	t.Run("written", func(t *testing.T) {
		p := make([]byte, defaultWindow)
		for range 500 {
			tun, _ := looseTunnel()
			w, s := tun.w, tun.newStream(1)
			s.sendWindow = defaultWindow
			var wg sync.WaitGroup
			wg.Go(func() {
				for taken := false; !taken; runtime.Gosched() { // by then it is being framed, or queued
					w.mu.Lock()
					if taken = s.sendWindow < defaultWindow; taken {
						s.sendErr = reset
					}
					w.mu.Unlock()
				}
			})
			n, err := s.Write(p)
			wg.Wait()
			w.mu.Lock()
			if w.window != int64(defaultWindow-n) {
				t.Errorf("%d bytes sent (%v) took %d of the window", n, err, defaultWindow-w.window)
			}
			w.mu.Unlock()
		}
	})
}

// A request that was reset before its answer holds no window afterwards, whenever its handler finds out.
func TestAnswerAfterResetHoldsNoWindow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		acct := ledger.New(ledger.DefaultLimits()).Pod("a")
		answered := make(chan error, 1)
		ts := newTestServer(t, ServerConfig{Account: acct, Handler: func(ctx context.Context, r *Request) {
			<-ctx.Done()
			synctest.Wait() // the stream is over
			_, err := r.Accept()
			answered <- err
		}})
		ts.greet()
		for id := uint32(1); id < 9; id += 2 {
			ts.connect(id)
			ts.ok(ts.WriteRSTStream(id, http2.ErrCodeCancel))
			if err := <-answered; err == nil {
				t.Error("a request that was reset could be accepted")
			}
		}
		if n := acct.InUse(ledger.Bytes); n != 0 {
			t.Errorf("%d bytes of windows are held by nobody", n)
		}
		_ = ts.hangUp()
	})
}
