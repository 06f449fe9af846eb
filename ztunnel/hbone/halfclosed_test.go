package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// wantHangup waits until a socket is told of its end, by which neither reading nor writing is meant.
func wantHangup(t *testing.T, who string, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); time.Since(begun) < 10*time.Second; runtime.Gosched() {
		var got int16
		_ = raw.Control(func(fd uintptr) {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLERR | unix.POLLHUP}}
			_, _ = unix.Poll(p, 10)
			got = p[0].Revents
		})
		if got&(unix.POLLERR|unix.POLLHUP) != 0 {
			return
		}
	}
	t.Errorf("the %s is not told", who)
}

// When a tunnel is lost, both applications of a connection hear of it, also of one that one of them has ended its half
// of: who has read all there is and has nothing to say at the moment as well as who waits for something.
func TestHalfClosedConnectionsHearOfALostTunnel(t *testing.T) {
	for _, ends := range []string{"client", "server"} {
		t.Run(ends+" has ended its half", func(t *testing.T) {
			m, apps := relayed(t)
			var wg sync.WaitGroup
			defer wg.Wait()
			c, s := through(t, m, apps, &wg)
			if ends == "server" {
				c, s = s, c
			}
			_, _ = c.Write([]byte("all there is"))
			_ = c.CloseWrite()
			if _, err := io.ReadFull(s, make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
			eof := make(chan struct{}) // it has been passed on
			go func() {
				defer close(eof)
				raw, _ := s.SyscallConn()
				_ = raw.Read(func(fd uintptr) bool {
					p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
					n, _ := unix.Poll(p, 0)
					return n > 0
				})
			}()
			<-eof
			m.ClosePod(m.key.Pod)
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("who waits reads %v, want a reset", err)
			}
			wantHangup(t, "other one", s)
			if got, err := io.ReadAll(s); string(got) != " there is" || err != nil {
				t.Errorf("then it read %q, %v", got, err) // what has come is still its
			}
			_, _ = c.Close(), s.Close()
		})
	}
}

// told is a Watch's.
type told chan error

func (t told) Lost(err error) { t <- err }

// Who watches a stream that was read to its end is told when what it sends can no longer arrive. That the peer wants no
// more is not that: its answer is complete, and may be on its way to its reader.
func TestWatch(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(c, s *Stream)
		lost bool
	}{
		{"reset by the peer", func(_, s *Stream) { _ = s.Reset() }, true},
		{"peer wants no more", func(_, s *Stream) { _ = s.Close() }, false},
		{"tunnel cut", func(_, s *Stream) { s.t.cut(ErrTunnelClosed) }, true},
		{"transport lost", func(c, _ *Stream) { _ = c.t.rc.Cut() }, true},
		{"ended in order", func(c, _ *Stream) { _ = c.Close() }, false},
	} {
		for _, late := range []bool{false, true} {
			t.Run(tt.name, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					m, acc := newPairs(t, memPair)
					c, s := streamPair(t, m, acc)
					_ = s.CloseWrite()
					if _, err := c.Read(make([]byte, 1)); err != io.EOF {
						t.Fatal(err)
					}
					w := make(told, 2)
					if !late {
						c.Watch(w)
					}
					tt.end(c, s)
					synctest.Wait()
					time.Sleep(2 * lateLimit)
					synctest.Wait()
					if late {
						c.Watch(w)
						synctest.Wait()
					}
					if got := len(w); got > 1 || got == 1 != tt.lost {
						t.Errorf("told %d times, want %v", got, tt.lost)
					}
					_, _ = c.Close(), s.Close()
					m.close()
				})
			})
		}
	}
}

// A tunnel whose peer has died without a word ends its half-closed connections as all others, when PINGs say so.
func TestHalfClosedConnectionsOfASilentPeer(t *testing.T) {
	for _, server := range []bool{true, false} { // who has ended its half
		bubble(t, func(t *testing.T) {
			d, k := dialTo(t, DialerConfig{}, func(_ int, f *framer) {
				f.accept()
				id := f.nextConnect()
				f.answer(id)
				if server {
					f.ok(f.WriteData(id, true, nil))
				}
				f.drainInput()
			})
			s, _, err := d.Connect(t.Context(), k, ConnectRequest{Authority: "a:1"})
			if err != nil {
				t.Fatal(err)
			}
			app, down := memnet.Pipe()
			donec := make(chan error, 1)
			go relay.Start(context.Background(), down, s, nil, func(err error) { donec <- err })
			if !server {
				_ = app.CloseWrite()
			}
			begin := time.Now()
			if err := <-donec; !errors.Is(err, errPingTimeout) || time.Since(begin) > (pingTicks+2)*pingInterval {
				t.Errorf("server ended %v: %v after %v", server, err, time.Since(begin))
			}
			_, _ = app.Close(), d.Close()
		})
	}
}
