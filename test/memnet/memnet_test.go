package memnet

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"
)

func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		a, b := Pipe()
		return a, b, func() { _, _ = a.Close(), b.Close() }, nil
	})
}

func TestEndsAndResets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Pipe()
		_, _ = a.Write([]byte("x"))
		_ = a.CloseWrite()
		if got, err := io.ReadAll(b); string(got) != "x" || err != nil {
			t.Errorf("half-close: %q, %v", got, err)
		}
		_, _ = b.Write([]byte("y"))
		_ = b.Reset()
		if got, err := io.ReadAll(a); string(got) != "y" || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("reset: %q, %v", got, err)
		}

		a, b = Pipe()
		b.SetBuffer(3)
		_ = b.SetWriteDeadline(time.Now().Add(time.Second))
		if n, err := b.Write([]byte("12345")); n != 3 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("backpressure: %d, %v", n, err)
		}
		_ = a.Close()
		if _, err := b.Write([]byte("x")); err == nil {
			t.Error("write to closed peer")
		}
	})
}

func TestListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := Listen(netip.MustParseAddrPort("10.0.0.2:80"))
		go func() {
			c, err := ln.Dial(context.Background(), netip.MustParseAddr("10.0.0.1"))
			if err == nil {
				_ = c.Close()
			}
		}()
		c, err := ln.Accept()
		if err != nil || c.LocalAddr().String() != "10.0.0.2:80" {
			t.Fatalf("accept: %v %v", c, err)
		}
		_ = ln.Close()
		if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept after close: %v", err)
		}
	})
}
