package relay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// joined is a pair under test, the way from the client first.
type joined struct {
	client, server *net.TCPConn
	st             Stats
	endedc         chan error // buffered beyond the one end there may be
	cut            context.CancelCauseFunc
}

func start(t *testing.T) *joined {
	client, a := tcpPair(t)
	server, b := tcpPair(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	p := &joined{client: client.(*net.TCPConn), server: server.(*net.TCPConn), endedc: make(chan error, 2), cut: cancel}
	go Start(ctx, a, b, &p.st, func(err error) { p.endedc <- err })
	t.Cleanup(func() {
		_, _ = p.client.Close(), p.server.Close()
		cancel(nil)
	})
	return p
}

// wait is how the pair ended.
func (p *joined) wait(t *testing.T) error {
	t.Helper()
	err := <-p.endedc
	select {
	case <-p.endedc:
		t.Error("the end was told twice")
	default:
	}
	return err
}

// inUse is how many ways are parked.
func (p *parking) inUse() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(len(p.slots)-1, 0) - len(p.free)
}

// allParked waits until n ways are parked, asking who is silent without waiting for the next look.
func allParked(t *testing.T, n int) {
	t.Helper()
	for parked.inUse() != n {
		askAll()
		runtime.Gosched()
	}
}

// fewGoroutines waits until there are no more than that: who has parked a way is still about to end.
func fewGoroutines(t *testing.T, most int) {
	t.Helper()
	for begun := time.Now(); runtime.NumGoroutine() > most; runtime.Gosched() {
		if time.Since(begun) > 30*time.Second {
			t.Fatalf("%d goroutines, want at most %d", runtime.NumGoroutine(), most)
		}
	}
}

// askAll is a look that finds everybody silent.
func askAll() {
	for range 2 {
		asked, _ := busy.sweep()
		for _, c := range asked {
			_ = c.SetReadDeadline(long)
		}
	}
}

func exchange(t *testing.T, from, to net.Conn, n int) {
	t.Helper()
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	go func() { _, _ = from.Write(data) }()
	got := make([]byte, n)
	if _, err := io.ReadFull(to, got); err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(got) != sha256.Sum256(data) {
		t.Fatal("other bytes arrived")
	}
}

// A parked pair is as good as any: data from either side wakes its way alone, again and again.
func TestParkedWakes(t *testing.T) {
	p := start(t)
	for range 20 {
		allParked(t, 2)
		exchange(t, p.client, p.server, 1+rand.IntN(300<<10))
		allParked(t, 2)
		exchange(t, p.server, p.client, 1+rand.IntN(300<<10))
	}
	allParked(t, 2)
	_, _ = p.client.CloseWrite(), p.server.CloseWrite()
	if err := p.wait(t); err != nil {
		t.Error(err)
	}
}

// Asking at any moment, while bytes move, costs none of them.
func TestParkingLosesNothing(t *testing.T) {
	p := start(t)
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			askAll()
		}
	})
	const n = 4 << 20
	for _, way := range [][2]*net.TCPConn{{p.client, p.server}, {p.server, p.client}} {
		wg.Go(func() {
			sent, got := sha256.New(), sha256.New()
			var w sync.WaitGroup
			w.Go(func() {
				buf := make([]byte, 64<<10)
				for left := n; left > 0; {
					k := min(left, 1+rand.IntN(len(buf)))
					for i := range k {
						buf[i] = byte(left + i)
					}
					sent.Write(buf[:k])
					if _, err := way[0].Write(buf[:k]); err != nil {
						t.Error(err)
						return
					}
					left -= k
					if rand.IntN(4) == 0 {
						runtime.Gosched()
					}
				}
				_ = way[0].CloseWrite()
			})
			if _, err := io.Copy(got, way[1]); err != nil {
				t.Error(err)
			}
			w.Wait()
			if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
				t.Error("other bytes arrived")
			}
		})
	}
	if err := p.wait(t); err != nil {
		t.Error(err)
	}
	stop.Store(true)
	wg.Wait()
}

func TestParkedHalfCloses(t *testing.T) {
	p := start(t)
	allParked(t, 2)
	_ = p.client.CloseWrite()
	if _, err := p.server.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("server reads %v, want EOF", err)
	}
	allParked(t, 1)
	exchange(t, p.server, p.client, 100_000)
	allParked(t, 1)
	_ = p.server.CloseWrite()
	if _, err := p.client.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("client reads %v, want EOF", err)
	}
	if err := p.wait(t); err != nil {
		t.Error(err)
	}
}

func TestParkedIsReset(t *testing.T) {
	for _, side := range []string{"a", "b"} {
		p := start(t)
		allParked(t, 2)
		from, to := p.client, p.server
		if side == "b" {
			from, to = to, from
		}
		resetConn(from)
		if _, err := to.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the other side reads %v, want ECONNRESET", err)
		}
		var e *Error
		if err := p.wait(t); !errors.As(err, &e) || e.Side != side || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("ended with %v, want a reset by %s", err, side)
		}
		allParked(t, 0)
	}
}

// Nobody waits for parked sockets but the kernel: a cut has to end them by itself. A few goroutines serve any number.
func TestParkedAreCut(t *testing.T) {
	const n = 1000 // 4000 descriptors
	raise(t, 5*n)
	before := runtime.NumGoroutine()
	why := errors.New("policy changed")
	pairs := make([]*joined, n)
	for i := range pairs {
		pairs[i] = start(t)
	}
	allParked(t, 2*n)
	fewGoroutines(t, before+30)
	var wg sync.WaitGroup
	for i, p := range pairs {
		if i%3 == 0 { // data and a cut at once
			wg.Go(func() { _, _ = p.client.Write([]byte("x")) })
		}
		wg.Go(func() { p.cut(why) })
	}
	wg.Wait()
	for i, p := range pairs {
		if err := p.wait(t); !errors.Is(err, why) {
			t.Fatalf("ended with %v, want the cause", err)
		}
		if _, err := io.ReadAll(p.server); !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("server reads %v, want ECONNRESET", err)
		}
		if _, err := io.ReadAll(p.client); i%3 != 0 && !errors.Is(err, syscall.ECONNRESET) { // else its write was told
			t.Fatalf("client reads %v, want ECONNRESET", err)
		}
	}
	allParked(t, 0)
}

// raise makes room for descriptors.
func raise(t *testing.T, n uint64) {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	if l.Cur >= n {
		return
	}
	if l.Cur = min(n, l.Max); l.Cur < n {
		t.Skipf("%d descriptors are to be had, %d needed", l.Cur, n)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		t.Skip(err)
	}
}

// Descriptors are used again at once, while events for those that had the number before are on their way: each
// connection still gets its own bytes, and its own end.
func TestParkedDescriptorsAreReused(t *testing.T) {
	var stop atomic.Bool
	var asking sync.WaitGroup
	asking.Go(func() {
		for !stop.Load() {
			askAll()
		}
	})
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 40 {
				p := start(t)
				exchange(t, p.client, p.server, 1+i)
				exchange(t, p.server, p.client, 1+i)
				switch (worker + i) % 4 {
				case 0:
					p.cut(errors.New("cut"))
				case 1:
					_, _ = p.client.Write([]byte("late"))
					p.cut(errors.New("cut"))
				case 2:
					resetConn(p.client)
				case 3:
					exchange(t, p.client, p.server, 1<<16)
					_, _ = p.client.CloseWrite(), p.server.CloseWrite()
				}
				if err := p.wait(t); (err == nil) != ((worker+i)%4 == 3) {
					t.Errorf("ended with %v", err)
				}
				_, _ = p.client.Close(), p.server.Close()
			}
		})
	}
	wg.Wait()
	stop.Store(true)
	asking.Wait()
	allParked(t, 0)
}

// A late event, of a slot that was used again since, wakes nobody.
func TestLateEventsFindNobody(t *testing.T) {
	var p parking
	p.fd, p.slots = -1, make([]slot, 1)
	w := new(way)
	_, first, err := p.enter(w)
	if err != nil || !p.take(w) || p.take(w) {
		t.Fatalf("enter and take once: %v", err)
	}
	other := new(way)
	_, second, _ := p.enter(other)
	if first.Fd != second.Fd {
		t.Fatal("the slot is not used again")
	}
	if got := p.of(first); got != nil {
		t.Error("an event of the one before took who has the slot now")
	}
	if got := p.of(second); got != other || p.take(other) {
		t.Error("its own event does not")
	}
}

// delivering is a tunnel that writes to the socket by itself.
type delivering struct {
	Conn
	done chan func(readErr, writeErr error)
}

func (d delivering) DeliverTo(_ net.Conn, _ *atomic.Uint64, done func(readErr, writeErr error)) bool {
	d.done <- done
	return true
}

func TestDeliveredWays(t *testing.T) {
	for _, tt := range []struct {
		name  string
		flip  bool
		end   error
		whole bool
	}{{"in order", false, nil, true}, {"the other way", true, nil, true}, {"failed", false, io.ErrUnexpectedEOF, false}} {
		t.Run(tt.name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			client, a := tcpPair(t)
			server, m := memPair(t)
			b := delivering{m, make(chan func(error, error), 1)}
			endc := make(chan error, 2)
			x, y := a, Conn(b)
			if tt.flip {
				x, y = y, x
			}
			go Start(t.Context(), x, y, nil, func(err error) { endc <- err })
			done := <-b.done
			allParked(t, 1)
			fewGoroutines(t, before+10)
			done(tt.end, nil)
			if tt.whole {
				_ = client.CloseWrite()
				if _, err := server.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("server reads %v", err)
				}
			}
			if err := <-endc; !errors.Is(err, tt.end) {
				t.Errorf("ended with %v", err)
			}
			_, _ = client.Close(), server.Close()
		})
	}
}
