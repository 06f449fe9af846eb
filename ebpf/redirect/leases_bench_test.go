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
// no mesh, in turns so short that both meet the same machine. x-none is the median
// of the turns' ratios, of times: less is better.
func BenchmarkLeases(b *testing.B) {
	s := newPairStage(b)
	s.leases.SetTTL(time.Hour) // nobody renews here
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
	open := func() (fd int) {
		check(b, in(s.app, s.pod.NS, func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			return errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), unix.Connect(fd, sockaddr(direct)))
		}))
		return fd
	}
	// A connection that is older than the mesh passes no program, as one without.
	streams := func(turn func(fd int)) func(b *testing.B) {
		return func(b *testing.B) {
			none()
			plain := open()
			defer unix.Close(plain)
			leased()
			fast := open()
			defer unix.Close(fast)
			compare(b, func() { turn(plain) }, func() { turn(fast) })
		}
	}
	b.Run("pingpong", streams(func(fd int) {
		msg := []byte("p")
		for range 20 {
			if _, err := unix.Write(fd, msg); err != nil {
				b.Fatal(err)
			}
			if n, err := unix.Read(fd, msg); n != 1 || err != nil {
				b.Fatal(n, err)
			}
		}
	}))
	chunk := make([]byte, 256<<10)
	chunk[0] = 'b'
	b.Run("bulk", streams(func(fd int) {
		for range 40 {
			for sent := 0; sent < len(chunk); {
				n, err := unix.Write(fd, chunk[sent:])
				if err != nil {
					b.Fatal(err)
				}
				sent += n
			}
		}
	}))
	b.Run("connect", func(b *testing.B) {
		turn := func() {
			for range 50 {
				unix.Close(open())
			}
		}
		var ratios, base []float64
		for b.Loop() {
			none()
			turn() // warm
			n := timed(turn)
			leased()
			turn()
			ratios, base = append(ratios, timed(turn)/n), append(base, n/50)
		}
		report(b, ratios, base)
	})
}

func timed(f func()) float64 {
	at := time.Now()
	f()
	return float64(time.Since(at))
}

// compare runs both in turns, each first as often as the other.
func compare(b *testing.B, none, leased func()) {
	var ratios, base []float64
	none()
	leased()
	for i := 0; b.Loop(); i++ {
		var n, l float64
		if i%2 == 0 {
			n, l = timed(none), timed(leased)
		} else {
			l, n = timed(leased), timed(none)
		}
		ratios, base = append(ratios, l/n), append(base, n)
	}
	report(b, ratios, base)
}

func report(b *testing.B, ratios, base []float64) {
	slices.Sort(ratios)
	slices.Sort(base)
	b.ReportMetric(ratios[len(ratios)/2], "x-none")
	b.ReportMetric(base[len(base)/2], "ns-none")
	b.ReportMetric(0, "ns/op")
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
