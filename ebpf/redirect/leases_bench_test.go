package redirect_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/lease"
)

// BenchmarkLeases compares connections under a lease with those of pods that are in
// no mesh, in turns of one run: metrics are ratios to the latter.
func BenchmarkLeases(b *testing.B) {
	s := newPairStage(b)
	ln := listen(b, s.app, s.client.NS, "[::]:8080", nil)
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); serveBench(c) }()
		}
	}()
	direct := netip.AddrPortFrom(clientV4, 8080)
	none := func() { check(b, s.hooks.Remove(s.pod.NS), s.hooks.Remove(s.client.NS)) }
	leased := func() {
		check(b, s.hooks.Apply(s.pod.NS, s.accelerated), s.hooks.Apply(s.client.NS, s.accelerated))
		s.grant(b, direct, s.target(clientV4, lease.All))
	}
	for _, bm := range []struct {
		name string
		run  func(b *testing.B, fd func() int) float64 // of one turn; less is better
	}{
		{"pingpong-p50", func(b *testing.B, open func() int) float64 {
			fd := open()
			defer unix.Close(fd)
			var took []time.Duration
			msg := []byte("p")
			for range 3000 {
				at := time.Now()
				if _, err := unix.Write(fd, msg); err != nil {
					b.Fatal(err)
				}
				if n, err := unix.Read(fd, msg); n != 1 || err != nil {
					b.Fatal(n, err)
				}
				took = append(took, time.Since(at))
			}
			slices.Sort(took)
			return float64(took[len(took)/2])
		}},
		{"bulk", func(b *testing.B, open func() int) float64 {
			fd := open()
			defer unix.Close(fd)
			buf := make([]byte, 256<<10)
			buf[0] = 'b'
			at := time.Now()
			for range 1000 {
				for sent := 0; sent < len(buf); {
					n, err := unix.Write(fd, buf[sent:])
					if err != nil {
						b.Fatal(err)
					}
					sent += n
				}
			}
			return float64(time.Since(at))
		}},
		{"connect", func(b *testing.B, open func() int) float64 {
			at := time.Now()
			for range 500 {
				unix.Close(open())
			}
			return float64(time.Since(at))
		}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			var ratios, base []float64
			turn := func() (v float64) {
				check(b, in(s.app, s.pod.NS, func() error {
					v = bm.run(b, func() int {
						fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
						check(b, errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), unix.Connect(fd, sockaddr(direct))))
						return fd
					})
					return nil
				}))
				return v
			}
			for b.Loop() {
				none()
				n1 := turn()
				leased()
				l := turn()
				none()
				n2 := turn()
				ratios, base = append(ratios, l/((n1+n2)/2)), append(base, (n1+n2)/2)
			}
			slices.Sort(ratios)
			slices.Sort(base)
			b.ReportMetric(ratios[len(ratios)/2], "x-none")
			b.ReportMetric(base[len(base)/2], "ns-none")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// serveBench echoes bytes of a ping-pong and swallows those of a bulk transfer.
func serveBench(c net.Conn) {
	b := make([]byte, 256<<10)
	n, err := c.Read(b)
	if err != nil {
		return
	}
	if b[0] == 'b' {
		_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, b)
		return
	}
	for err == nil {
		if _, err = c.Write(b[:n]); err == nil {
			n, err = c.Read(b)
		}
	}
}
