package hbone

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// BenchmarkAccept is a tunnel that is opened and closed, 16 at a time: what the server does beside a plain crypto/tls
// server that answers a byte. Clients are the same, and their work is in the figures: with -cpu 1 differences are the
// servers'.
func BenchmarkAccept(b *testing.B) {
	p := testPKI()
	cfg := p.serverConfig()
	plain := func(c net.Conn) {
		defer c.Close()
		t := tls.Server(c, cfg)
		var buf [512]byte
		if _, err := t.Read(buf[:]); err == nil {
			_, _ = t.Write(buf[:1])
			_, _ = t.Read(buf[:])
			_ = t.Close()
		}
	}
	srv := NewServer(ServerConfig{AmbitRecords: true, Account: ledger.New(ledger.DefaultLimits()).Pod("pod"), Handler: func(context.Context, *Request) {},
		TLS: func(context.Context, netip.AddrPort) (*tls.Config, error) { return cfg, nil }})
	defer srv.Close()
	for _, bc := range []struct {
		name  string
		serve func(net.Conn)
	}{{"hbone", func(c net.Conn) { _ = srv.ServeConn(context.Background(), c) }}, {"tls", plain}} {
		b.Run(bc.name, func(b *testing.B) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer ln.Close()
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					go bc.serve(c)
				}
			}()
			hail := append([]byte(preface), appendSettings(nil, setting{settingEnablePush, 0})...)
			var left atomic.Int64
			left.Store(int64(b.N))
			b.ReportAllocs()
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					var one [1]byte
					for left.Add(-1) >= 0 {
						raw, err := net.Dial("tcp", ln.Addr().String())
						if err != nil {
							b.Error(err)
							return
						}
						c := tls.Client(raw, p.clientConfig())
						if _, err := c.Write(hail); err != nil {
							b.Error(err)
						} else if _, err := io.ReadFull(c, one[:]); err != nil {
							b.Error(err)
						}
						_ = raw.(*net.TCPConn).SetLinger(0) // ports would run out
						_ = raw.Close()
					}
				})
			}
			wg.Wait()
		})
	}
}
