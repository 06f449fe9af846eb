package hbone

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// delivery is a stream that delivers to an application's socket, without a tunnel's reader: the test is that.
type delivery struct {
	t     testing.TB
	s     *Stream
	app   *net.TCPConn
	dst   *net.TCPConn
	n     atomic.Uint64
	donec chan [2]error
	sent  int
}

func newDelivery(t testing.TB) *delivery {
	t.Helper()
	dst, app, err := tcpPair(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tun, _ := looseTunnel()
	d := &delivery{t: t, s: tun.newStream(1), app: app.(*net.TCPConn), dst: dst.(*net.TCPConn), donec: make(chan [2]error, 1)}
	tun.streams[1] = d.s
	d.s.window, d.s.recvWindow = 64<<20, 64<<20
	_ = d.dst.SetWriteBuffer(64 << 10)
	_ = d.app.SetReadBuffer(256 << 10)
	t.Cleanup(func() { _, _ = d.app.Close(), d.dst.Close() })
	if !d.s.DeliverTo(d.dst, &d.n, func(readErr, writeErr error) { d.donec <- [2]error{readErr, writeErr} }) {
		t.Fatal("a socket is not delivered to")
	}
	return d
}

// feed is what the tunnel's reader does with one DATA frame.
func (d *delivery) feed(p []byte) {
	blk := getBlock(len(p))
	n := copy(blk.data, p)
	if code := d.s.beginData(n, 0); code != CodeNo {
		d.t.Fatalf("DATA: %v", code)
	}
	d.sent += n
	if d.s.deliver(blk, blk.data[:n]) {
		d.s.wakeReader()
	}
	blk.release()
}

func (d *delivery) busy() bool {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	return d.s.out != nil && d.s.out.busy
}

// fill feeds more than the buffers of both sockets hold, and returns what it fed: the rest waits until the app reads.
func (d *delivery) fill() (fed []byte) {
	chunk := make([]byte, 16<<10)
	for i := range 2 << 20 / len(chunk) {
		for k := range chunk {
			chunk[k] = byte(i + k)
		}
		d.feed(chunk)
		fed = append(fed, chunk...)
	}
	return fed
}

func (d *delivery) want(why string, want []byte) {
	d.t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(d.app, got); err != nil || !bytes.Equal(got, want) {
		d.t.Fatalf("%s: read %v, equal %v", why, err, bytes.Equal(got, want))
	}
}

// settle waits until nobody delivers, and checks the accounts.
func (d *delivery) settle() {
	d.t.Helper()
	for d.busy() {
	}
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	if d.s.inFlight != 0 || d.s.buffered != 0 || d.s.recvWindow+d.s.owed != d.s.window {
		d.t.Errorf("in flight %d, buffered %d, window %d + %d of %d", d.s.inFlight, d.s.buffered, d.s.recvWindow, d.s.owed, d.s.window)
	}
	if d.n.Load() != uint64(d.sent) {
		d.t.Errorf("counted %d of %d", d.n.Load(), d.sent)
	}
}

// What the socket takes is written by who received it; what it does not, by a goroutine that ends when it has.
func TestDeliverSwitches(t *testing.T) {
	d := newDelivery(t)
	for range 5 {
		d.feed([]byte("small"))
		if d.busy() {
			t.Error("a small message waits")
		}
		d.want("small", []byte("small"))
		want := d.fill()
		for i := range 20 { // behind what waits
			more := bytes.Repeat([]byte{byte(i)}, 1+i*1000)
			d.feed(more)
			want = append(want, more...)
		}
		if d.n.Load() >= uint64(d.sent) || !d.busy() {
			t.Errorf("%d of %d bytes written to an app that does not read", d.n.Load(), d.sent)
		}
		d.want("bulk", want)
		d.settle()
	}
	d.s.endOfStream()
	if errs := <-d.donec; errs != [2]error{} {
		t.Errorf("ended with %v", errs)
	}
}

func TestDeliverEnds(t *testing.T) {
	reset := &ResetError{CodeInternal, true}
	for name, tt := range map[string]struct {
		end         func(d *delivery)
		read, write error
		data        bool // what came before is delivered
	}{
		"END_STREAM":  {end: func(d *delivery) { d.s.endOfStream() }, data: true},
		"RST":         {end: func(d *delivery) { d.s.resetByPeer(CodeInternal) }, read: reset, data: true},
		"CANCEL":      {end: func(d *delivery) { d.s.resetByPeer(CodeCancel) }, data: true},
		"tunnel lost": {end: func(d *delivery) { d.s.t.cut(&lostError{io.ErrUnexpectedEOF}) }, read: &lostError{io.ErrUnexpectedEOF}, data: true},
		"app resets":  {end: func(d *delivery) { _, _ = d.app.SetLinger(0), d.app.Close() }, write: syscall.ECONNRESET},
		"socket cut":  {end: func(d *delivery) { _ = d.dst.Close() }, write: net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDelivery(t)
			d.s.answered.Store(true)
			fed := d.fill()
			tt.end(d)
			if tt.data {
				d.want("before the end", fed)
			}
			errs := <-d.donec
			for i, want := range []error{tt.read, tt.write} {
				if (errs[i] == nil) != (want == nil) {
					t.Errorf("error %d: %v, want %v", i, errs[i], want)
				}
			}
			if tt.read != nil && !strings.HasSuffix(errs[0].Error(), tt.read.Error()) {
				t.Errorf("read: %v, want %v", errs[0], tt.read)
			}
			if tt.write != nil && !errors.Is(errs[1], tt.write) && !errors.Is(errs[1], syscall.EPIPE) {
				t.Errorf("write: %v, want %v", errs[1], tt.write)
			}
			if d.s.out != nil || d.s.inFlight != 0 && tt.write == nil {
				t.Errorf("left: outlet %v, %d in flight", d.s.out, d.s.inFlight)
			}
		})
		t.Run(name+", idle", func(t *testing.T) {
			d := newDelivery(t)
			d.s.answered.Store(true)
			tt.end(d)
			if tt.write != nil { // found out by the next write
				for d.s.recvWindow > 1<<20 && len(d.donec) == 0 {
					d.feed([]byte("x"))
				}
			}
			errs := <-d.donec
			if (errs[0] == nil) != (tt.read == nil) || (errs[1] == nil) != (tt.write == nil) {
				t.Errorf("ended with %v", errs)
			}
		})
	}
}

// A stream that is closed while its data waits is over at the next opportunity, and writes nothing more of it.
func TestDeliverAfterClose(t *testing.T) {
	d := newDelivery(t)
	fed := d.fill()
	before := d.n.Load()
	d.feed(make([]byte, recordLen))
	_ = d.s.Close()
	go func() { _, _ = io.ReadFull(d.app, make([]byte, len(fed))) }()
	if errs := <-d.donec; !errors.Is(errs[0], net.ErrClosed) || errs[1] != nil {
		t.Errorf("ended with %v", errs)
	}
	if d.n.Load() < before || d.n.Load() > uint64(len(fed)) {
		t.Errorf("counted %d, %d before Close of %d", d.n.Load(), before, len(fed))
	}
}

// Only what is a socket and nothing more is written to without its Write.
func TestDeliverToSocketsOnly(t *testing.T) {
	tun, _ := looseTunnel()
	s := tun.newStream(1)
	c, _, err := tcpPair(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	wrapped := struct{ *net.TCPConn }{c.(*net.TCPConn)}
	if s.DeliverTo(wrapped, new(atomic.Uint64), nil) || s.out != nil {
		t.Error("delivers around a Write that counts or limits")
	}
}

// Bytes keep their order both ways, whatever the sizes of writes and reads, through readers that fall behind and catch up.
func TestDeliverKeepsBytes(t *testing.T) {
	m, apps := relayed(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	for range 4 {
		c, s := through(t, m, apps, &wg)
		for _, way := range [][2]*net.TCPConn{{c, s}, {s, c}} {
			from, to := way[0], way[1]
			_ = to.SetReadBuffer(128 << 10)
			seed := rand.Uint64()
			sumc := make(chan [32]byte, 1)
			wg.Go(func() {
				r := rand.New(rand.NewPCG(seed, 1))
				h := sha256.New()
				for left := 6 << 20; left > 0; {
					p := make([]byte, min(left, 1+r.IntN(1<<r.IntN(19))))
					for i := 0; i < len(p); i += 7 {
						p[i] = byte(r.Uint32())
					}
					_, _ = h.Write(p)
					if _, err := from.Write(p); err != nil {
						t.Error(err)
						return
					}
					left -= len(p)
				}
				_ = from.CloseWrite()
				sumc <- [32]byte(h.Sum(nil))
			})
			wg.Go(func() {
				r := rand.New(rand.NewPCG(seed, 2))
				h := sha256.New()
				buf := make([]byte, 256<<10)
				for {
					n, err := to.Read(buf[:1+r.IntN(1<<r.IntN(18))])
					_, _ = h.Write(buf[:n])
					if err == io.EOF {
						break
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
				if got := [32]byte(h.Sum(nil)); got != <-sumc {
					t.Error("bytes are not those that were sent")
				}
			})
		}
	}
}

// A reader that never reads costs the others of its tunnel nothing, and is cut at once whatever is under way to it.
func TestDeliverSlowBesideFast(t *testing.T) {
	m, apps := relayed(t)
	var wg sync.WaitGroup
	defer wg.Wait()
	slow, deafApp := through(t, m, apps, &wg)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			if _, err := slow.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}()
	for range 3 {
		c, s := through(t, m, apps, &wg)
		go func() {
			_, _ = c.Write(make([]byte, 8<<20))
			_ = c.CloseWrite()
		}()
		if n, err := io.Copy(io.Discard, s); n != 8<<20 || err != nil {
			t.Errorf("beside a stream that is not read: %d, %v", n, err)
		}
		_, _ = c.Close(), s.Close()
	}
	_ = deafApp.SetLinger(0)
	_ = deafApp.Close()
	<-stopped
	_ = slow.Close()
}

// What cuts a pair takes effect while its data waits for a socket.
func TestDeliverIsCut(t *testing.T) {
	d := newDelivery(t)
	d.s.mu.Lock()
	d.s.out = nil
	d.s.mu.Unlock()
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("policy changed")
	donec := make(chan error, 1)
	go func() { donec <- relay.Join(ctx, d.s, d.dst, nil) }()
	for joined := false; !joined; {
		d.s.mu.Lock()
		joined = d.s.out != nil
		d.s.mu.Unlock()
	}
	d.fill()
	cancel(why)
	if err := <-donec; !errors.Is(err, why) {
		t.Errorf("Join: %v, want the cause", err)
	}
	for { // not cut short in a way that looks whole
		if _, err := d.app.Read(make([]byte, 64<<10)); err != nil {
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("app reads %v, want ECONNRESET", err)
			}
			break
		}
	}
}

// A message to an application that reads costs one write and no goroutine.
func BenchmarkDeliver(b *testing.B) {
	for _, size := range []int{1 << 10, recordLen - frameHeaderLen} {
		b.Run("", func(b *testing.B) {
			d := newDelivery(b)
			_ = d.dst.SetWriteBuffer(1 << 20)
			p, buf := make([]byte, size), make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				d.feed(p)
				if _, err := io.ReadFull(d.app, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
