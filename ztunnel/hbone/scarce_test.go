package hbone

import (
	"bytes"
	"context"
	"io"
	"runtime"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// scarceAccount is a pod's on a node with so much memory.
func scarceAccount(memory int64) *ledger.Account {
	l := ledger.New(ledger.DefaultLimits())
	l.SetMemory(memory)
	return l.Pod("a")
}

// data sends n bytes in frames that any peer may send.
func (ts *testServer) data(id uint32, n int, end bool) {
	ts.t.Helper()
	for n > 16384 {
		ts.ok(ts.WriteData(id, false, make([]byte, 16384)))
		n -= 16384
	}
	ts.ok(ts.WriteData(id, end, make([]byte, n)))
}

// Where memory is limited streams are promised less than the protocol's default. A peer that does not know yet may use
// that; when it knows, its windows are negative (RFC 9113, 6.9.2), and it may end the stream and send nothing more until
// what it has sent is read.
func TestScarceWindows(t *testing.T) {
	const base, early = 4 << 10, 40000
	serve := func(t *testing.T, more int64) (*testServer, chan *Stream, *ledger.Account) {
		acct := scarceAccount(64 << 20)
		if !acct.TryAcquire(ledger.Bytes, 4<<20-more) {
			t.Fatal("the windows of a node of 64 MiB are not 4 MiB")
		}
		streams := make(chan *Stream, 10)
		ts := newTestServer(t, ServerConfig{Account: acct, Handler: func(ctx context.Context, r *Request) {
			s, err := r.Accept()
			if err != nil {
				return // it was reset
			}
			streams <- s
			<-ctx.Done()
			_ = s.Close()
		}})
		ts.raw.SetBuffer(1 << 20)
		if got, _ := ts.hello().Value(http2.SettingInitialWindowSize); got != base {
			t.Errorf("SETTINGS promise %d, want %d", got, base)
		}
		return ts, streams, acct
	}
	t.Run("before the acknowledgement", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			ts, streams, _ := serve(t, 0)
			ts.connect(1)
			ts.data(1, early, false)
			ts.connect(3)
			ts.data(3, 65535-early, true)
			for range 2 {
				s := <-streams
				if _, err := io.ReadFull(s, make([]byte, map[uint32]int{1: early, 3: 65535 - early}[s.id])); err != nil {
					t.Fatalf("what was sent in time: %v", err)
				}
			}
			ts.data(1, 1, false) // what all streams hold together is not counted yet: not even after it was read
			ts.wantGoAway("more than the default window", http2.ErrCodeFlowControl)
			_ = ts.hangUp()
		})
	})
	t.Run("after it", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			ts, streams, _ := serve(t, 0)
			ts.connect(1)
			ts.data(1, early, false)
			ts.connect(3)
			ts.data(3, 65535-early, false)
			ts.ok(ts.WriteSettingsAck())
			ts.connect(5)
			ts.data(5, base, true)
			ts.data(1, 0, true)
			for range 3 {
				s := <-streams
				if s.id == 3 {
					continue
				}
				if b, err := io.ReadAll(s); err != nil || len(b) != map[uint32]int{1: early, 5: base}[s.id] {
					t.Errorf("stream %d: %d bytes, %v", s.id, len(b), err)
				}
			}
			ts.data(3, 1, false)
			ts.wantReset("with a negative window", 3, http2.ErrCodeFlowControl)
			ts.connect(7)
			ts.data(7, base+1, false)
			ts.wantReset("more than was promised", 7, http2.ErrCodeFlowControl)
			_ = ts.hangUp()
		})
	})
	t.Run("never", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			ts, _, _ := serve(t, 0)
			donec := make(chan struct{})
			go func() {
				defer close(donec)
				for { // lives, and does not acknowledge
					time.Sleep(pingInterval / 2)
					if ts.WritePing(true, [8]byte{1}) != nil {
						return
					}
				}
			}()
			ts.wantGoAway("SETTINGS not acknowledged", http2.ErrCodeSettingsTimeout)
			_ = ts.hangUp()
			<-donec
		})
	})
	t.Run("asked for", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			ts, _, acct := serve(t, scarceWindow-base)
			ts.ok(ts.WriteSettingsAck())
			held := acct.InUse(ledger.Bytes)
			ts.connect(1)
			ts.wantStatus("CONNECT", 1, "200")
			if wu, ok := ts.next("what memory allows").(*http2.WindowUpdateFrame); !ok || wu.StreamID != 1 || wu.Increment != scarceWindow-base || acct.InUse(ledger.Bytes) != held+scarceWindow-base {
				t.Errorf("%v, and %d held; want %d more", wu, acct.InUse(ledger.Bytes), scarceWindow-base)
			}
			_ = ts.hangUp()
		})
	})
}

// Who is read gets more, and while others want it, too, gives it back with what it is read.
func TestScarceWindowsComeBack(t *testing.T) {
	tun, _ := looseTunnel()
	tun.bind(scarceAccount(64 << 20))
	tun.acknowledged.Store(true)
	s := tun.newStream(1)
	s.widen()
	read := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.recvWindow -= s.window / 2 // came, and is read at once
		s.grantAt = tun.clock().UnixNano()
		if g := s.takenLocked(s.window / 2); g.n <= 0 || s.recvWindow > s.window || s.owed != 0 {
			t.Fatalf("%d given back: %d of %d, and %d owed", g.n, s.recvWindow, s.window, s.owed)
		}
		if want := int64(s.window - tun.base); s.charged != want || tun.account.InUse(ledger.Bytes) < want {
			t.Fatalf("window of %d, %d charged", s.window, s.charged)
		}
	}
	for s.window < 1<<20 {
		read()
	}
	if s.window != 1<<20 {
		t.Errorf("grew to %d", s.window)
	}
	grown := s.window
	rest := 4<<20 - tun.account.InUse(ledger.Bytes)
	if !tun.account.TryAcquire(ledger.Bytes, rest) || !tun.account.TryAcquire(ledger.Streams, 1) {
		t.Fatal("nothing left")
	}
	for range 100 {
		read()
	}
	if s.window >= grown/2 || s.window < scarceWindow {
		t.Errorf("a window of %d became one of %d", grown, s.window)
	}
	s.release()
	if got := tun.account.InUse(ledger.Bytes); got != rest {
		t.Errorf("%d of %d held after the end", got, rest)
	}
}

// held is how much memory the stream's data keeps, and how much data that is.
func (d *delivery) held() (memory, data int) {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	blocks := make(map[*block]bool)
	for _, pc := range d.s.pieces[d.s.first:] {
		if !blocks[pc.blk] {
			memory += len(pc.blk.data)
		}
		blocks[pc.blk] = true
		data += pc.hi - pc.lo
	}
	return memory, data
}

// What an application does not read lies in blocks of its own size: others' data went through those that it came in.
func TestStalledStreamsKeepNoLargeBlocks(t *testing.T) {
	d := newDelivery(t)
	d.s.t.bind(scarceAccount(64 << 20))
	var want []byte
	feed := func(n int) { // as the reader of a block that is others', too
		blk := getBlock(largeBlock)
		at := len(want) % (largeBlock - n)
		p := blk.data[at : at+n]
		for i := range p {
			p[i] = byte(len(want) + i/3)
		}
		want = append(want, p...)
		if code := d.s.beginData(n, 0); code != CodeNo {
			t.Fatal(code)
		}
		d.sent += n
		if d.s.deliver(blk, p) {
			d.s.wakeReader()
		}
		blk.release()
	}
	stalled := func() bool {
		d.s.mu.Lock()
		defer d.s.mu.Unlock()
		return d.s.stalled
	}
	for round := range 3 {
		want = want[:0]
		for !d.busy() || len(want) < 1<<20 {
			feed(borrowLimit)
		}
		for range 20 {
			feed(borrowLimit + round)
		}
		for !stalled() {
			runtime.Gosched()
		}
		for i := range 50 {
			feed(1 + i*200)
		}
		if memory, data := d.held(); data == 0 || memory > data+data/4+2*tinyBlock {
			t.Errorf("%d bytes that wait keep %d", data, memory)
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(d.app, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("read %v, equal %v", err, bytes.Equal(got, want))
		}
		d.settle()
		if stalled() {
			t.Error("who reads again is still taken for one that does not")
		}
	}
	d.s.endOfStream()
	if errs := <-d.donec; errs != [2]error{} {
		t.Errorf("ended with %v", errs)
	}
}

// Where nobody sees that a stream stalls, nothing of it stays where it came.
func TestScarceStreamsWithoutOutletCopy(t *testing.T) {
	d := newDelivery(t)
	d.s.t.bind(scarceAccount(64 << 20))
	d.s.out = nil
	for range 10 {
		d.feed(make([]byte, borrowLimit))
		d.feed([]byte("small"))
	}
	if memory, data := d.held(); memory > data+2*tinyBlock {
		t.Errorf("%d bytes keep %d", data, memory)
	}
}

// What is given back is what was taken: the rest of a frame that has begun is not here yet, and giving it back, too, would
// have to be made good by taking from a peer what it has been given.
func TestScarceWindowsInTheMiddleOfFrames(t *testing.T) {
	tun, _ := looseTunnel()
	tun.bind(scarceAccount(64 << 20))
	tun.acknowledged.Store(true)
	s := tun.newStream(1)
	s.widen()
	rest := 4<<20 - tun.account.InUse(ledger.Bytes)
	if !tun.account.TryAcquire(ledger.Bytes, rest) {
		t.Fatal("nothing left")
	}
	peer := s.recvWindow
	take := func(n int) {
		t.Helper()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.buffered -= n
		g := s.takenLocked(n)
		if peer += g.n; g.n < 0 || peer != s.recvWindow {
			t.Fatalf("%d given back, peer has %d, we count %d", g.n, peer, s.recvWindow)
		}
	}
	for range 100 {
		n := min(peer, largeBlock)
		if code := s.beginData(n, 0); code != CodeNo {
			t.Fatalf("%d bytes of what was given back: %v", n, code)
		}
		peer -= n
		s.buffered++
		take(s.buffered)
		s.buffered += n - 1
		take(s.buffered * 3 / 4)
	}
}
