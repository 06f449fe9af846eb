package netns

import (
	"net"
	"net/netip"
	"runtime"
	"testing"
)

func BenchmarkDo(b *testing.B) {
	ns := fresh(b)
	for b.Loop() {
		if err := ns.Do(func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

// sink accepts and closes.
func sink(b *testing.B, ln net.Listener) string {
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	b.Cleanup(func() { ln.Close() })
	return ln.Addr().String()
}

func dials(b *testing.B, dial func(addr string) (net.Conn, error), addr string) {
	for b.Loop() {
		c, err := dial(addr)
		if err != nil {
			b.Fatal(err)
		}
		_ = c.(*net.TCPConn).SetLinger(0) // no TIME_WAIT, the ports would run out
		c.Close()
	}
}

// BenchmarkDial compares Dial with the same dialer without a namespace to enter,
// and with what is simpler: the dialer's whole work on a thread inside.
func BenchmarkDial(b *testing.B) {
	ns := fresh(b)
	home, err := Current()
	if err != nil {
		b.Fatal(err)
	}
	defer home.Close()
	stock := ns.NewStock(nil)
	defer stock.Close()
	b.Run("own namespace", func(b *testing.B) {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		d := &net.Dialer{}
		d.SetMultipathTCP(false)
		dials(b, func(addr string) (net.Conn, error) { return d.DialContext(b.Context(), "tcp", addr) }, sink(b, ln))
	})
	for _, bc := range []struct {
		name string
		dial func(addr string) (net.Conn, error)
	}{
		{"Stock", func(addr string) (net.Conn, error) {
			return stock.Dial(b.Context(), netip.AddrPort{}, netip.MustParseAddrPort(addr), 0, nil)
		}},
		{"Dial", func(addr string) (net.Conn, error) { return ns.Dial(b.Context(), &net.Dialer{}, "tcp", addr) }},
		{"whole dial inside", func(addr string) (c net.Conn, err error) {
			err = ns.Do(func() error {
				var derr error
				c, derr = (&net.Dialer{}).DialContext(b.Context(), "tcp", addr)
				return derr
			})
			return c, err
		}},
		{"thread of the caller", func(addr string) (c net.Conn, err error) {
			d := &net.Dialer{}
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if err := setns(ns.FD()); err != nil {
				return nil, err
			}
			c, err = d.DialContext(b.Context(), "tcp", addr)
			if herr := setns(home.FD()); herr != nil {
				b.Fatal(herr)
			}
			return c, err
		}},
	} {
		b.Run(bc.name, func(b *testing.B) {
			ln, err := ns.Listen(b.Context(), &net.ListenConfig{}, "tcp4", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			dials(b, bc.dial, sink(b, ln))
		})
	}
}
