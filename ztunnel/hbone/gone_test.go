package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/ambit-mesh/ambit/test/memnet"
)

func always() bool { return true }

// pingAnswerer serves CONNECTs up to the first that it does not answer; then
// it answers PINGs, or nothing at all.
func pingAnswerer(answers int, pings bool) func(int, *framer) {
	return func(n int, f *framer) {
		f.accept()
		for i := 0; n > 1 || i < answers; i++ {
			id := f.nextConnect()
			if id == 0 {
				return
			}
			f.answer(id)
		}
		for {
			fr, err := f.ReadFrame()
			if err != nil {
				return
			}
			if p, ok := fr.(*http2.PingFrame); ok && pings && !p.IsAck() {
				f.ok(f.WritePing(true, p.Data))
			}
		}
	}
}

// A request to a peer that has fallen silent is given up early if there is
// somebody else, and only then: an application may be slow behind a proxy that
// lives, and without another peer nothing is won.
func TestConnectGivesUpASilentPeer(t *testing.T) {
	for _, tt := range []struct {
		name      string
		pings     bool
		elsewhere func() bool
		gone      bool
		after     time.Duration
		dials     int64 // with the next request's
	}{
		{"silent, another peer", false, always, true, Silence, 2},
		{"silent, no other peer", false, func() bool { return false }, false, 10 * time.Second, 2},
		{"silent, caller does not say", false, nil, false, 10 * time.Second, 2},
		{"slow application", true, always, false, 10 * time.Second, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var dials atomic.Int64
				serve := pingAnswerer(1, tt.pings)
				d, k := dialTo(t, DialerConfig{}, func(n int, f *framer) { dials.Add(1); serve(n, f) })
				live, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1"})
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				_, _, err = d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Elsewhere: tt.elsewhere})
				de, ok := errors.AsType[*DialError](err)
				if !ok || de.Stage != StageConnect || de.Gone() != tt.gone || !de.Timeout() {
					t.Errorf("connect: %v, want gone %v", err, tt.gone)
				}
				if took := time.Since(begin); took != tt.after {
					t.Errorf("given up after %v, want %v", took, tt.after)
				}
				if _, err := live.Write([]byte("x")); err != nil {
					t.Errorf("an open stream was cut: %v", err)
				}
				if tt.dials > 1 {
					s, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1"})
					if err != nil {
						t.Fatalf("connect again: %v", err)
					}
					defer s.Close()
				}
				if n := dials.Load(); n != tt.dials {
					t.Errorf("%d tunnels dialled, want %d", n, tt.dials)
				}
				_ = d.Close()
			})
		})
	}
}

// When a peer leaves, what waits for it turns elsewhere at once if it can; what
// is open, and what can only wait, goes on. Nobody is sent to it again.
func TestGone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		answerc := make(chan struct{})
		var dials atomic.Int64
		d, k := dialTo(t, DialerConfig{}, func(n int, f *framer) {
			dials.Add(1)
			f.accept()
			f.answer(f.nextConnect())
			if n > 1 {
				f.drainInput()
				return
			}
			waiting := f.nextConnect()
			turning := f.nextConnect()
			f.wantReset("a request that turns elsewhere", turning, http2.ErrCodeCancel)
			<-answerc
			f.answer(waiting)
			f.drainInput()
		})
		live, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "live:1"})
		if err != nil {
			t.Fatal(err)
		}
		connect := func(r ConnectRequest) <-chan error {
			errc := make(chan error, 1)
			go func() {
				_, _, err := d.Connect(t.Context(), k, r)
				errc <- err
			}()
			synctest.Wait()
			return errc
		}
		waiting := connect(ConnectRequest{Authority: "waiting:1"})
		turning := connect(ConnectRequest{Authority: "turning:1", Elsewhere: always})
		other := k
		other.Addr = netip.MustParseAddrPort("192.0.2.9:15008")
		d.Gone(func(k Key) bool { return k.Addr == other.Addr })
		synctest.Wait()
		if len(turning) > 0 {
			t.Fatalf("the end of another peer ended a request: %v", <-turning)
		}
		begin := time.Now()
		for range 2 { // the second time there is nothing left to do
			d.Gone(func(o Key) bool { return o == k })
		}
		if err := <-turning; !errors.Is(err, ErrGone) || time.Since(begin) > 0 {
			t.Errorf("connect: %v after %v, want %v at once", err, time.Since(begin), ErrGone)
		}
		close(answerc)
		if err := <-waiting; err != nil {
			t.Errorf("a request without another peer was not waited for: %v", err)
		}
		if _, err := live.Write([]byte("x")); err != nil {
			t.Errorf("an open stream was cut: %v", err)
		}
		if _, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "next:1"}); err != nil || dials.Load() != 2 {
			t.Errorf("connect again: %v, %d tunnels; want another one", err, dials.Load())
		}
		_ = d.Close()
	})
}

// A dial under way to a peer that leaves is of no use to who can turn
// elsewhere, and begins anew for who cannot: another may have the address now.
func TestGoneWhileDialling(t *testing.T) {
	for name, elsewhere := range map[string]bool{"elsewhere": true, "nowhere": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				dials := make(chan struct{}, 2)
				d, k := dialTo(t, DialerConfig{DialTransport: func(ctx context.Context, _ Key) (net.Conn, error) {
					dials <- struct{}{}
					<-ctx.Done()
					return nil, context.Cause(ctx)
				}}, nil)
				errc := make(chan error, 1)
				go func() {
					_, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Elsewhere: func() bool { return elsewhere }})
					errc <- err
				}()
				<-dials
				d.Gone(func(Key) bool { return true })
				if !elsewhere {
					<-dials
				}
				de, ok := errors.AsType[*DialError](<-errc)
				if !ok || de.Stage != StageTCP || de.Gone() != elsewhere || de.Timeout() == elsewhere {
					t.Errorf("connect: %v", de)
				}
				_ = d.Close()
			})
		})
	}
}

// Who asks a peer whose TCP says nothing at all turns elsewhere early if it can, and nobody else with it. That a peer is
// slow later, or that we are before, is no such silence.
func TestDialGivesUpASilentPeer(t *testing.T) {
	const early, late = Silence, 10 * time.Second
	for _, tt := range []struct {
		name      string
		elsewhere func() bool
		ours      time.Duration // before we dial
		connects  bool          // the transport does, and then the peer is silent
		after     time.Duration
	}{
		{"another peer", always, 0, false, early},
		{"another peer, our certificate is late", always, 2 * time.Second, false, 2*time.Second + early},
		{"another peer, a slow handshake", always, 0, true, late},
		{"no other peer", func() bool { return false }, 0, false, late},
		{"caller does not say", nil, 0, false, late},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var far net.Conn
				cfg := DialerConfig{DialTransport: func(ctx context.Context, _ Key) (net.Conn, error) {
					if tt.connects {
						c, s := memnet.Pipe()
						far = s
						return c, nil
					}
					<-ctx.Done()
					return nil, context.Cause(ctx)
				}, TLS: func(context.Context, Key) (*tls.Config, error) {
					time.Sleep(tt.ours)
					return testPKI().clientConfig(), nil
				}}
				d := NewDialer(cfg)
				k := Key{Addr: netip.MustParseAddrPort("192.0.2.2:15008")}
				begin := time.Now()
				waiting := make(chan time.Duration, 1)
				go func() { // somebody else, who cannot but wait
					time.Sleep(tt.ours)
					_, _, _ = d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1"})
					waiting <- time.Since(begin)
				}()
				_, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Elsewhere: tt.elsewhere})
				if de, ok := errors.AsType[*DialError](err); !ok || !de.Timeout() || de.Stage == StageLocal {
					t.Errorf("connect: %v", err)
				}
				if took := time.Since(begin); took != tt.after {
					t.Errorf("given up after %v, want %v", took, tt.after)
				}
				if took := <-waiting; took != tt.ours+late {
					t.Errorf("who waits gave up after %v, want %v", took, tt.ours+late)
				}
				if tt.after < late { // it is as silent for who comes now
					begin := time.Now()
					go func() { _, _, _ = d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1"}) }()
					time.Sleep(tt.ours + early)
					if _, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Elsewhere: tt.elsewhere}); time.Since(begin) != tt.ours+early {
						t.Errorf("later: %v after %v", err, time.Since(begin))
					}
				}
				_ = d.Close()
				if far != nil {
					_ = far.Close()
				}
			})
		})
	}
}

// A dial for which nobody waits any more ends.
func TestDialOfNobodyEnds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ended := make(chan time.Time, 1)
		d, k := dialTo(t, DialerConfig{DialTransport: func(ctx context.Context, _ Key) (net.Conn, error) {
			<-ctx.Done()
			ended <- time.Now()
			return nil, context.Cause(ctx)
		}}, nil)
		begin := time.Now()
		_, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Elsewhere: always})
		if took := (<-ended).Sub(begin); took != Silence || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("dialled for %v: %v", took, err)
		}
		_ = d.Close()
	})
}

// Who comes while a dial of nobody's ends dials anew: that others gave up says nothing to him.
func TestDialOfNobodyIsNotJoined(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var dials atomic.Int64
		d, k := dialTo(t, DialerConfig{DialTransport: func(ctx context.Context, _ Key) (net.Conn, error) {
			dials.Add(1)
			<-ctx.Done()
			time.Sleep(time.Second) // to end takes a while
			return nil, context.Cause(ctx)
		}}, nil)
		if _, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Elsewhere: always}); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the first gave up with %v", err)
		}
		begin := time.Now()
		_, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1", Elsewhere: always})
		if took := time.Since(begin); took != Silence || !errors.Is(err, os.ErrDeadlineExceeded) || dials.Load() != 2 {
			t.Errorf("the second: %v after %v and %d dials, want its own one to be given up after %v", err, took, dials.Load(), Silence)
		}
		_ = d.Close()
	})
}
