package hbone

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// source is a TCP socket to read from, and who writes to it.
func source(t *testing.T) (in, app *net.TCPConn) {
	t.Helper()
	a, b, err := tcpPair(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// onFd calls f with c's descriptor.
func onFd(t *testing.T, c *net.TCPConn, f func(fd uintptr)) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(f)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func lowat(t *testing.T, c *net.TCPConn) (n int) {
	t.Helper()
	onFd(t, c, func(fd uintptr) { n, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT) })
	return n
}

// In a bubble reads take no time unless the test says so.
func TestWhoIsReadByTheClock(t *testing.T) {
	reads := func(n, size int) func(*talker, uintptr) {
		return func(k *talker, fd uintptr) {
			for range n {
				k.note(fd, size, false, true)
			}
		}
	}
	for _, tt := range []struct {
		name string
		do   func(*talker, uintptr)
		on   bool
	}{
		{"too few", reads(talkReads-1, 1024), false},
		{"many small ones", reads(talkReads, 1024), true},
		{"large ones", reads(4*talkReads, smallPiece), false},
		{"some large ones", func(k *talker, fd uintptr) {
			reads(talkReads/4, largeBlock)(k, fd)
			reads(talkReads-talkReads/4, 100)(k, fd)
		}, true},
		{"too slow", func(k *talker, fd uintptr) {
			for range 4 * talkReads {
				k.note(fd, 1024, false, true)
				time.Sleep(time.Second * 1024 / talkRate * 11 / 10)
			}
		}, false},
		{"with answers", func(k *talker, fd uintptr) {
			for i := range 4 * talkReads {
				k.note(fd, 1024, false, i%(talkReads/2) != 0)
			}
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in, _ := source(t)
			synctest.Test(t, func(t *testing.T) {
				onFd(t, in, func(fd uintptr) {
					var k talker
					defer func() {
						k.end(fd)
						if k.clock != nil {
							k.clock.close()
						}
					}()
					if tt.do(&k, fd); k.on != tt.on || k.nap != tt.on {
						t.Errorf("on %v, nap %v; want %v", k.on, k.nap, tt.on)
					}
				})
			})
		})
	}
}

func TestReadingByTheClockEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(*talker, uintptr)
		on   bool
		need int
	}{
		{"enough came", func(k *talker, fd uintptr) { k.note(fd, talkLump, false, true) }, true, 0},
		{"enough came, in parts", func(k *talker, fd uintptr) {
			k.note(fd, talkLump-1, true, true)
			k.note(fd, 1, false, true)
		}, true, 0},
		{"enough came and no more is there", func(k *talker, fd uintptr) {
			k.note(fd, talkLump, true, true)
			k.drained(fd, true)
		}, true, 0},
		{"little came", func(k *talker, fd uintptr) { k.note(fd, talkLump-1, false, true) }, false, 2 * talkReads},
		{"nothing came", func(k *talker, fd uintptr) { k.drained(fd, true) }, false, 2 * talkReads},
		{"an answer came", func(k *talker, fd uintptr) { k.note(fd, talkLump, false, false) }, false, 2 * talkReads},
		{"its term is over", func(k *talker, fd uintptr) {
			time.Sleep(talkTerm)
			k.note(fd, talkLump, false, true)
		}, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in, _ := source(t)
			synctest.Test(t, func(t *testing.T) {
				onFd(t, in, func(fd uintptr) {
					k := talker{clock: &clock{}}
					k.begin(fd)
					k.nap = false
					if tt.do(&k, fd); k.on != tt.on || k.nap != tt.on || k.need != tt.need {
						t.Errorf("on %v, nap %v, to look at %d; want %v, %v, %d", k.on, k.nap, k.need, tt.on, tt.on, tt.need)
					}
				})
			})
			if got := lowat(t, in) > 1; got != tt.on {
				t.Errorf("wakes by a single byte: %v, want %v", !got, !tt.on)
			}
		})
	}
}

// What one writes who is read by the clock arrives, with its end, and the socket is left as it was.
func TestReadingByTheClockLosesNothing(t *testing.T) {
	for _, size := range []int{0, 1, 1000, talkLump, 3 << 20} {
		in, app := source(t)
		tun, rc := looseTunnel()
		s := tun.newStream(1)
		s.sendWindow, tun.w.window = 1<<60, 1<<60
		r := relayIn{s: s, want: smallBlock - frameHeaderLen}
		s.talking.Store(true)
		onFd(t, in, func(fd uintptr) { r.talk.begin(fd) })
		if !r.talk.on {
			t.Fatal("not read by the clock")
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			for left, p := size, make([]byte, 1000); left > 0; left -= min(left, len(p)) {
				if _, err := app.Write(p[:min(left, len(p))]); err != nil {
					t.Error(err)
				}
			}
			if err := app.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		raw, err := in.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var n atomic.Uint64
		if readErr, writeErr := r.socket(raw, &n); readErr != nil || writeErr != nil {
			t.Fatal(readErr, writeErr)
		}
		wg.Wait()
		tun.w.finish()
		if n.Load() != uint64(size) || rc.sent < size {
			t.Errorf("%d of %d bytes, and %d with frames", n.Load(), size, rc.sent)
		}
		if got := lowat(t, in); got != 1 || r.talk.clock != nil {
			t.Errorf("left behind: SO_RCVLOWAT %d, clock %v", got, r.talk.clock)
		}
	}
}

// Whoever asks for the socket back while it is read by the clock gets it as it was.
func TestReadingByTheClockIsInterrupted(t *testing.T) {
	in, _ := source(t)
	tun, _ := looseTunnel()
	r := relayIn{s: tun.newStream(1), want: smallBlock - frameHeaderLen}
	onFd(t, in, func(fd uintptr) { r.talk.begin(fd) })
	if err := in.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	raw, err := in.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if readErr, _ := r.socket(raw, new(atomic.Uint64)); readErr == nil {
		t.Error("not interrupted")
	}
	if got := lowat(t, in); got != 1 {
		t.Errorf("SO_RCVLOWAT %d", got)
	}
}

// Through a mesh, in order, however it is read; and the other way works meanwhile.
func TestSmallPiecesArriveInOrder(t *testing.T) {
	m, apps := relayed(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	c, s := through(t, m, apps, &wg)
	const words = 1 << 20
	var writer sync.WaitGroup
	writer.Go(func() {
		b := make([]byte, 0, 1024)
		for i := range uint64(words) {
			if b = binary.LittleEndian.AppendUint64(b, i); len(b) == cap(b) {
				if _, err := c.Write(b); err != nil {
					t.Error(err)
					return
				}
				b = b[:0]
			}
		}
		_ = c.CloseWrite()
	})
	got, err := io.ReadAll(s)
	if err != nil || len(got) != 8*words {
		t.Fatal(len(got), err)
	}
	writer.Wait()
	for i := range uint64(words) {
		if w := binary.LittleEndian.Uint64(got[8*i:]); w != i {
			t.Fatalf("word %d is %d", i, w)
		}
	}
	_, _ = s.Write([]byte("answer"))
	_ = s.Close()
	if got, err := io.ReadAll(c); !bytes.Equal(got, []byte("answer")) || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	_ = c.Close()
}

// The whole way of a connection: who says much in small pieces is read by the clock, and by each piece again as soon as
// less comes; answers pass, and nothing is left behind. Time stands still for the talker: only what it reads counts.
func TestTalkerIsReadByTheClockAndNotForLong(t *testing.T) {
	m, apps := relayed(t)
	in, app := source(t)
	s, _, err := m.Connect(t.Context(), m.key, ConnectRequest{Authority: "192.0.2.2:80"})
	if err != nil {
		t.Fatal(err)
	}
	server := <-apps
	raw, err := in.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	began, clocks := time.Now(), talkers.Load()
	r := relayIn{s: s, want: smallBlock - frameHeaderLen, talk: talker{time: func() time.Time { return began }}}
	var n atomic.Uint64
	var wg sync.WaitGroup
	wg.Go(func() {
		if readErr, writeErr := r.socket(raw, &n); readErr != nil || writeErr != nil {
			t.Error(readErr, writeErr)
		}
	})
	piece, sent := make([]byte, 1024), 0
	say := func() { // and wait until it has been read, so that each read is of one piece
		if _, err := app.Write(piece); err != nil {
			t.Fatal(err)
		}
		for sent += len(piece); n.Load() < uint64(sent); {
			runtime.Gosched()
		}
	}
	pieces := 0
	for ; talkers.Load() == clocks && pieces < 2*talkReads; pieces++ {
		say()
	}
	if pieces < talkReads || pieces == 2*talkReads { // the first may be a question
		t.Errorf("%d clocks after %d pieces of %d that are looked at", talkers.Load()-clocks, pieces, talkReads)
	}
	say() // alone in its nap
	if got := lowat(t, in); got != 1 {
		t.Errorf("SO_RCVLOWAT %d after a piece that came alone", got)
	}
	got := make([]byte, sent)
	if _, err := io.ReadFull(server, got); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(s, got[:6]); err != nil || string(got[:6]) != "answer" {
		t.Fatalf("%q, %v", got[:6], err)
	}
	if err := app.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if got := talkers.Load(); got != clocks {
		t.Errorf("%d clocks are left behind", got-clocks)
	}
	_ = s.Close()
	if rest, err := io.ReadAll(server); len(rest) > 0 || err != nil {
		t.Errorf("%d bytes more, %v", len(rest), err)
	}
	_ = server.Close()
}

func TestClocksAreBounded(t *testing.T) {
	var clocks []*clock
	for range maxTalkers {
		c := newClock()
		if c == nil {
			t.Fatal("too few")
		}
		clocks = append(clocks, c)
	}
	if newClock() != nil {
		t.Error("too many")
	}
	clocks[0].close()
	clocks[0] = newClock()
	if clocks[0] == nil {
		t.Error("one that was closed counts")
	}
	clocks[0].wait()
	for _, c := range clocks {
		c.close()
	}
}
