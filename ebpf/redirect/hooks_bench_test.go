package redirect_test

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// BenchmarkConnect opens and resets connections of one thread in a pod: to another
// namespace without and with programs at the cgroup root, and captured by either
// redirector. It counts connect(2) only, which ends when the listener's kernel
// answered.
func BenchmarkConnect(b *testing.B) {
	none := func(b *testing.B, s *stage) {}
	for _, bc := range []struct {
		name  string
		hooks bool
		setUp func(b *testing.B, s *stage)
	}{
		{"no mesh", false, none},
		{"hooks, pod not enrolled", true, none},
		{"hooks", true, func(b *testing.B, s *stage) { check(b, s.hooks.Apply(s.pod.NS, everything)) }},
		{"nftables", false, func(b *testing.B, s *stage) {
			d, err := redirect.New(redirect.Config{})
			check(b, err)
			check(b, d.Apply(s.pod.NS, everything))
		}},
	} {
		b.Run(bc.name, func(b *testing.B) {
			var s *stage
			if bc.hooks {
				s = newStage(b)
			} else {
				s = quietStage(b)
			}
			discard(b, listen(b, s.app, s.client.NS, "[::]:8080", nil))
			discard(b, listen(b, s.proxy, s.pod.NS, "[::]:15001", proxyOptions))
			bc.setUp(b, s)
			to := sockaddr(netip.AddrPortFrom(clientV4, 8080))
			check(b, in(s.app, s.pod.NS, func() error {
				for b.Loop() {
					fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
					if err != nil {
						return err
					}
					if err := unix.Connect(fd, to); err != nil {
						return err
					}
					_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
					_ = unix.Close(fd)
				}
				return nil
			}))
		})
	}
}

func discard(b *testing.B, ln net.Listener) {
	donec := make(chan struct{})
	b.Cleanup(func() { ln.Close(); <-donec })
	go func() {
		defer close(donec)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
}

// BenchmarkEnrol captures and releases one pod with either redirector.
func BenchmarkEnrol(b *testing.B) {
	b.Run("hooks", func(b *testing.B) {
		s := newStage(b)
		for b.Loop() {
			check(b, s.hooks.Apply(s.pod.NS, everything), s.hooks.Remove(s.pod.NS))
		}
	})
	b.Run("nftables", func(b *testing.B) {
		s := quietStage(b)
		d, err := redirect.New(redirect.Config{})
		check(b, err)
		for b.Loop() {
			check(b, d.Apply(s.pod.NS, everything), d.Remove(s.pod.NS))
		}
	})
}
