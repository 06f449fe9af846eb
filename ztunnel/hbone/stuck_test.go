package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/ztunnel/relay"
)

// stall is a transport that can stop taking bytes, for ever: writes wait until it is closed.
type stall struct {
	net.Conn
	once    sync.Once
	closedc chan struct{}
	mu      sync.Mutex
	stopped bool
}

func newStall(c net.Conn) *stall { return &stall{Conn: c, closedc: make(chan struct{})} }

func (s *stall) stop() {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
}

func (s *stall) Write(p []byte) (int, error) {
	s.mu.Lock()
	stopped := s.stopped
	s.mu.Unlock()
	if stopped {
		<-s.closedc
		return 0, net.ErrClosed
	}
	return s.Conn.Write(p)
}

func (s *stall) Close() error {
	s.once.Do(func() { close(s.closedc) })
	return s.Conn.Close()
}

// Whatever cuts a stream takes effect at once, also while the tunnel's transport takes nothing and the stream's own
// goroutine wrote last.
func TestCutWhileTransportIsStuck(t *testing.T) {
	for name, cut := range map[string]func(m *mesh, s *Stream, cancel context.CancelFunc){
		"relay's context": func(_ *mesh, _ *Stream, cancel context.CancelFunc) { cancel() },
		"Reset":           func(_ *mesh, s *Stream, _ context.CancelFunc) { _ = s.Reset() },
		"Close":           func(_ *mesh, s *Stream, _ context.CancelFunc) { _ = s.Close() },
		"ClosePod":        func(m *mesh, _ *Stream, _ context.CancelFunc) { m.ClosePod("pod-a") },
		"server":          func(m *mesh, _ *Stream, _ context.CancelFunc) { _ = m.srv.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var wire *stall
				m, acc := newPairs(t, func(ctx context.Context) (net.Conn, net.Conn, error) {
					c, s, err := memPair(ctx)
					wire = newStall(c)
					return wire, s, err
				})
				defer m.close()
				c, s := streamPair(t, m, acc)
				defer s.Close()
				synctest.Wait()
				wire.stop()

				app, in := memnet.Pipe()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				donec := make(chan error, 1)
				go func() { donec <- relay.Join(ctx, in, c, nil) }()
				go func() { _, _ = app.Write(make([]byte, 1<<20)) }()
				synctest.Wait() // all are stuck
				start := time.Now()
				cut(m, c, cancel)
				if err := <-donec; err == nil {
					t.Error("relay ended in order")
				}
				if d := time.Since(start); d != 0 {
					t.Errorf("took effect after %v", d)
				}
				_ = app.Close()
			})
		})
	}
}

// The same over sockets, whose writers flush inline: the writer returns while the tunnel still lives.
func TestResetWhileSocketIsFull(t *testing.T) {
	deafc := make(chan struct{})
	m, acc := newPairs(t, func(ctx context.Context) (net.Conn, net.Conn, error) {
		c, s, err := tcpPair(ctx)
		if err != nil {
			return nil, nil, err
		}
		_ = c.(*net.TCPConn).SetWriteBuffer(4 << 10)
		_ = s.(*net.TCPConn).SetReadBuffer(4 << 10)
		return c, &deaf{Conn: s, deafc: deafc, closedc: make(chan struct{})}, nil
	})
	c, s := streamPair(t, m, acc)
	defer s.Close()
	close(deafc)
	errc := make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			_, err = c.Write(make([]byte, 64<<10))
		}
		errc <- err
	}()
	w := c.t.w
	for stuck := uint64(0); ; { // until a batch is under way that does not get on
		rounds, writing := w.progress()
		if writing && rounds == stuck {
			w.mu.Lock()
			full := w.queued > 0 && c.sendWindow == 0 || w.queued >= queueLimit
			w.mu.Unlock()
			if full {
				break
			}
		}
		stuck = rounds
	}
	_ = c.Reset()
	if err := <-errc; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	c.t.mu.Lock()
	defer c.t.mu.Unlock()
	if c.t.err != nil {
		t.Errorf("the write returned only when the tunnel ended: %v", c.t.err)
	}
}

// deaf stops reading when deafc closes.
type deaf struct {
	net.Conn
	deafc   <-chan struct{}
	once    sync.Once
	closedc chan struct{}
}

func (d *deaf) Read(p []byte) (int, error) {
	select {
	case <-d.deafc:
		<-d.closedc
		return 0, io.EOF
	default:
		return d.Conn.Read(p[:min(len(p), 1<<10)])
	}
}

func (d *deaf) Close() error {
	d.once.Do(func() { close(d.closedc) })
	return d.Conn.Close()
}
