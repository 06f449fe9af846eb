package hbone

import (
	"crypto/tls"
	"io"
	"net"
	"slices"
	"testing"

	"github.com/ambit-mesh/ambit/test/sockets"
	"github.com/ambit-mesh/ambit/ztunnel/record"
)

func TestBatchesFillPackets(t *testing.T) {
	for _, tt := range []struct{ mss, batch int }{
		{1448, 2*45*1448 - 8*record.Overhead},
		{8948, 2*7*8948 - 8*record.Overhead},
		{536, 2*121*536 - 8*record.Overhead},
		{65483, largeBlock}, // the loopback's: one segment is more than a packet
		{0, largeBlock},
		{-1, largeBlock},
	} {
		if got := batchOf(tt.mss); got != tt.batch {
			t.Errorf("mss %d: %d, want %d", tt.mss, got, tt.batch)
		}
	}
	for mss := 1; mss <= 1<<16; mss++ {
		if got := batchOf(mss); got > largeBlock || got < largeBlock/2 {
			t.Fatalf("mss %d: %d", mss, got)
		}
	}
}

// A batch's frames and their headers are what batchOf says, whatever frames the peer takes.
func TestFramesFillBatches(t *testing.T) {
	for _, limit := range []int{16384, 32759, 1 << 20} {
		for _, mss := range []int{0, 536, 1448, 8948} {
			w := newWriter(nil, nil)
			w.batch = batchOf(mss)
			w.setMaxFrameLocked(limit)
			n := w.mostLocked()
			if size := framedLen(n, w.frame); size > w.batch || size < w.batch-frameHeaderLen {
				t.Errorf("frames of %d, mss %d: %d bytes in frames, want %d", limit, mss, size, w.batch)
			}
		}
	}
}

// Blocks grow while reads fill them, and only then.
func TestReadsTakeWhatIsThere(t *testing.T) {
	out, c := sockets.Pair(t)
	g := newGatherConn(c)
	largest, last := 0, 0
	read := func(total int) {
		for total > 0 {
			if err := g.fill(); err != nil {
				t.Fatal(err)
			}
			last = len(g.in.data)
			largest = max(largest, last)
			for _, b := range g.unread() {
				if b != byte(total) {
					t.Fatalf("%d bytes before the end: %d", total, b)
				}
				total--
			}
			g.r = g.w
			g.giveBack()
		}
	}
	send := func(n int) {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(n - i)
		}
		go func() { _, _ = out.Write(p) }()
		read(n)
	}
	send(100)
	if last != largeBlock {
		t.Errorf("little was read into a block of %d", last)
	}
	for sent := 0; largest < hugeBlock && sent < 64<<20; sent += 2 << 20 {
		send(2 << 20)
	}
	if largest != hugeBlock {
		t.Errorf("much was read into blocks of %d", largest)
	}
	send(100) // the read before may have filled its block
	send(100)
	if last != largeBlock {
		t.Errorf("little was read into a block of %d", last)
	}
	_ = out.CloseWrite()
	if err := g.fill(); err != io.EOF {
		t.Errorf("got %v", err)
	}
}

// sizedConn notes how much each write brings.
type sizedConn struct {
	net.Conn
	sizes []int
}

func (c *sizedConn) Write(p []byte) (int, error) {
	c.sizes = append(c.sizes, len(p))
	return c.Conn.Write(p)
}

// However many blocks a batch has, each leaves by itself; what is small leaves together.
func TestBulkBlocksLeaveByThemselves(t *testing.T) {
	p := testPKI()
	c, s, err := memPair(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	peer := tls.Server(s, p.serverConfig())
	got := make(chan int64)
	go func() {
		n, _ := io.Copy(io.Discard, peer)
		got <- n
	}()
	sized := &sizedConn{Conn: c}
	rc, _, err := clientRecords(t.Context(), sized, p.clientConfig(), true, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := rc.(*ambitRecords); !ok {
		t.Skip("records of crypto/tls")
	}
	n := batchOf(1448)
	var parts []segment
	for _, size := range []int{100, n, n, n, 100, 100} {
		parts = append(parts, segment{getBlock(size), size})
	}
	sized.sizes = nil
	if err := rc.WriteBatch(parts); err != nil {
		t.Fatal(err)
	}
	whole := n + 8*record.Overhead
	if want := []int{100 + record.Overhead + whole, whole, whole + 200 + record.Overhead}; !slices.Equal(sized.sizes, want) {
		t.Errorf("writes of %d, want %d", sized.sizes, want)
	}
	_ = rc.Close()
	if got := <-got; got != int64(3*n+300) {
		t.Errorf("%d bytes arrived", got)
	}
}
