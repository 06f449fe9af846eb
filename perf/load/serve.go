package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Port is the server's. HTTPPort is where it speaks HTTP: the same.
const (
	Port     = 9000
	HTTPPort = Port
)

const readSize = 256 << 10

// Serve answers on an address until ctx ends. One port does for everything: the
// first byte of a connection tells what it is.
func Serve(ctx context.Context, addr string) error {
	ln, err := listen(ctx, addr)
	if err != nil {
		return err
	}
	return serveOn(ctx, ln)
}

func serveOn(ctx context.Context, ln net.Listener) error {
	web, rpc := newHandover(ln.Addr()), newHandover(ln.Addr())
	hs, gs := httpServer(), grpcServer()
	var live sync.WaitGroup
	live.Go(func() { _ = hs.Serve(web) }) // until it is closed, below
	live.Go(func() { _ = gs.Serve(rpc) }) // as above
	err := acceptLoop(ctx, ln, func(c *net.TCPConn) error { return answer(c, web, rpc) })
	err = errors.Join(err, hs.Close())
	gs.Stop()
	live.Wait()
	return err
}

// handover is a listener whose connections were accepted elsewhere.
type handover struct {
	addr  net.Addr
	connc chan net.Conn
	donec chan struct{}
	end   func()
}

func newHandover(addr net.Addr) *handover {
	h := &handover{addr: addr, connc: make(chan net.Conn), donec: make(chan struct{})}
	h.end = sync.OnceFunc(func() { close(h.donec) })
	return h
}

// Accept waits for a connection.
func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.connc:
		return c, nil
	case <-h.donec:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (h *handover) Close() error { h.end(); return nil }

// Addr is where connections were accepted.
func (h *handover) Addr() net.Addr { return h.addr }

// serve hands a connection over and returns when it is closed.
func (h *handover) serve(c net.Conn, read []byte) error {
	h1 := &handed{Conn: c, read: read, donec: make(chan struct{})}
	h1.end = sync.OnceFunc(func() { close(h1.donec) })
	select {
	case h.connc <- h1:
	case <-h.donec:
		return net.ErrClosed
	}
	select {
	case <-h1.donec:
	case <-h.donec:
	}
	return nil
}

// handed is a connection of which something was read.
type handed struct {
	net.Conn
	read  []byte
	donec chan struct{}
	end   func()
}

func (h *handed) Read(b []byte) (int, error) {
	if len(h.read) > 0 {
		n := copy(b, h.read)
		h.read = h.read[n:]
		return n, nil
	}
	return h.Conn.Read(b)
}

func (h *handed) Close() error { defer h.end(); return h.Conn.Close() }

// listen does without MPTCP, which other servers do not use either.
func listen(ctx context.Context, addr string) (net.Listener, error) {
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(false)
	return cfg.Listen(ctx, "tcp", addr)
}

// acceptLoop hands connections to f, which owns them, until ctx ends. It does not
// wait for those that live: the process ends with it.
func acceptLoop(ctx context.Context, ln net.Listener, f func(*net.TCPConn) error) error {
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accept on %s: %w", ln.Addr(), err)
		}
		go func() {
			defer c.Close()
			_ = f(c.(*net.TCPConn)) // clients end loads in the middle and count what fails
		}()
	}
}

// answer serves a connection. HTTP begins with a method, in capital letters.
func answer(c net.Conn, web, rpc *handover) error {
	var header [headerSize]byte
	if _, err := io.ReadFull(c, header[:]); err != nil {
		return err
	}
	switch {
	case web == nil: // a plain hop's
	case header[0] >= 'A' && header[0] <= 'Z':
		return web.serve(c, header[:])
	case header[0] == verbGRPC:
		return rpc.serve(c, nil)
	}
	size := int(binary.BigEndian.Uint32(header[1:]))
	if size < headerSize || size > maxSize {
		return fmt.Errorf("size %d: want %d to %d", size, headerSize, maxSize)
	}
	switch header[0] {
	case verbSink:
		b := make([]byte, readSize)
		for {
			if _, err := c.Read(b); err != nil {
				return err
			}
		}
	case verbSource:
		b := make([]byte, size)
		for {
			if _, err := c.Write(b); err != nil {
				return err
			}
		}
	case verbAnswer:
		b := make([]byte, size)
		for have := copy(b, header[:]); ; have = 0 {
			if _, err := io.ReadFull(c, b[have:]); err != nil {
				return err
			}
			if _, err := c.Write(b); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("unknown verb %q", header[0])
}

// Tune prepares a process that runs inside the lab: it may open many connections,
// and its namespace does not keep the ports of closed ones. With thousands of
// connections per second the search for a free port is what would be measured.
// Where that is not allowed figures of connects are worse, for every mode alike.
func Tune() {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
		want := unix.Rlimit{Cur: 1 << 20, Max: max(lim.Max, 1<<20)}
		if unix.Setrlimit(unix.RLIMIT_NOFILE, &want) != nil {
			lim.Cur = lim.Max
			_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &lim) // what there is
		}
	}
	for file, value := range map[string]string{"tcp_max_tw_buckets": "256", "tcp_tw_reuse": "1"} {
		_ = os.WriteFile("/proc/sys/net/ipv4/"+file, []byte(value), 0) // see above
	}
}
