//go:build !race

package hbone

import (
	"io"
	"sync"
	"testing"
)

// The steady path of a chunk through the engine, in and out, allocates nothing.
func TestChunkAllocs(t *testing.T) {
	tun, _ := looseTunnel()
	tun.client = true
	s := tun.newStream(1)
	tun.streams[1] = s
	tun.nextID = 3
	tun.in.gotFirst = true
	s.sendWindow, tun.w.window = 1<<60, 1<<60
	tun.w.setMaxFrameLocked(ourMaxFrame)

	for _, size := range []int{100, 1 << 10, 16 << 10, 128 << 10} {
		chunk := make([]byte, size)
		if n := testing.AllocsPerRun(100, func() { _, _ = s.Write(chunk) }); n > 0 {
			t.Errorf("writing %d bytes: %v allocations", size, n)
		}
	}

	in := &tun.in
	buf := make([]byte, 64<<10)
	for _, size := range []int{100, 1 << 10, recordLen - frameHeaderLen} {
		n := testing.AllocsPerRun(100, func() {
			s.recvWindow, in.connWindow, in.connCredit = 1<<30, 1<<30, 0
			in.blk = getBlock(smallBlock)
			putFrameHeader(in.blk.data, size, frameData, 0, 1)
			if err := in.handle(in.blk.data[:frameHeaderLen+size]); err != nil {
				t.Fatal(err)
			}
			in.wakeStreams()
			in.blk.release()
			s.owed = 0
			if k, err := s.Read(buf); k != size || err != nil {
				t.Fatalf("read %d, %v", k, err)
			}
		})
		if n > 0 {
			t.Errorf("reading %d bytes: %v allocations", size, n)
		}
	}
}

// Nor does a message on its way to an application's socket.
func TestDeliverAllocs(t *testing.T) {
	d := newDelivery(t)
	d.s.window, d.s.recvWindow = 1<<40, 1<<40
	_ = d.dst.SetWriteBuffer(1 << 20)
	_ = d.app.SetReadBuffer(1 << 20)
	buf := make([]byte, recordLen)
	for _, size := range []int{100, 1 << 10, recordLen - frameHeaderLen} {
		p := make([]byte, size)
		if n := testing.AllocsPerRun(100, func() {
			d.feed(p)
			if k, err := io.ReadFull(d.app, buf[:size]); k != size || err != nil {
				t.Fatalf("read %d, %v", k, err)
			}
		}); n > 0 {
			t.Errorf("delivering %d bytes: %v allocations", size, n)
		}
	}
}

// Nor does a question with its answer through two tunnels' ends and four sockets; crypto/tls takes one for each record.
func TestAskAllocs(t *testing.T) {
	m, apps := relayed(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	c, s := through(t, m, apps, &wg)
	defer c.Close()
	defer s.Close()
	want := 2.0
	if ambitLayer {
		want = 0
	}
	p := make([]byte, 1<<10)
	if n := testing.AllocsPerRun(500, func() {
		_, _ = c.Write(p)
		_, _ = io.ReadFull(s, p)
		_, _ = s.Write(p)
		if _, err := io.ReadFull(c, p); err != nil {
			t.Fatal(err)
		}
	}); n > want {
		t.Errorf("%v allocations, want %v", n, want)
	}
}

// Nor does waiting for the clock, and looking at who might be read by it.
func TestClockAllocs(t *testing.T) {
	c := newClock()
	defer c.close()
	if n := testing.AllocsPerRun(5, c.wait); n > 0 {
		t.Errorf("a nap: %v allocations", n)
	}
	k := talker{need: patience}
	if n := testing.AllocsPerRun(100, func() { k.note(0, 1024, false, true) }); n > 0 {
		t.Errorf("a read: %v allocations", n)
	}
}
