package sockopt

import (
	"net"
	"testing"

	"github.com/ambit-mesh/ambit/test/sockets"
)

// BenchmarkAtTheEnds is what the access log adds to a connection, beside one that
// is opened, carries a byte each way and is closed.
func BenchmarkAtTheEnds(b *testing.B) {
	_, c := sockets.Pair(b)
	b.Run("TCP_INFO", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = Info(c)
		}
	})
	b.Run("origin", func(b *testing.B) {
		b.ReportAllocs()
		var o Origin
		for b.Loop() {
			_ = ReadOrigin(c, &o)
		}
	})
	b.Run("connection", func(b *testing.B) {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		defer ln.Close()
		buf := make([]byte, 1)
		for b.Loop() {
			c, err := net.Dial("tcp4", ln.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			a, err := ln.Accept()
			if err != nil {
				b.Fatal(err)
			}
			_, _ = c.Write(buf)
			_, _ = a.Read(buf)
			_, _ = a.Write(buf)
			_, _ = c.Read(buf)
			_ = a.(*net.TCPConn).SetLinger(0)
			_, _ = a.Close(), c.Close()
		}
	})
}
