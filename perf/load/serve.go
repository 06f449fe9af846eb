package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Port is the server's; HTTPPort is where it speaks HTTP/1.1.
const (
	Port     = 9000
	HTTPPort = 9080
)

const readSize = 256 << 10

// Serve answers on an address until ctx ends.
func Serve(ctx context.Context, addr string) error {
	ln, err := listen(ctx, addr)
	if err != nil {
		return err
	}
	return acceptLoop(ctx, ln, func(c *net.TCPConn) error { return answer(c) })
}

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

func answer(c *net.TCPConn) error {
	var header [headerSize]byte
	if _, err := io.ReadFull(c, header[:]); err != nil {
		return err
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
