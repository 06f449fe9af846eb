package redirect_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
)

// load is numbers of connections.
type load struct {
	ports       int // of the range that a pod's kernel chooses from; 0: as it comes (32768 to 60999)
	concurrent  int // of one pod, to many destinations
	churn, rate int // opened and closed one after another; at most rate in a second, 0: as fast as it goes
	live, more  int // of one client in clear text; more are opened and closed beside them
}

// loads: with AMBIT_LOAD=full they are those that the project claims, which take
// minutes. Those of every day exceed what one range of ports holds as well: a range
// that the test makes small.
func loads() load {
	if os.Getenv("AMBIT_LOAD") == "full" {
		return load{concurrent: 60_000, churn: 240_000, rate: 2000, live: 20_000, more: 10_000}
	}
	return load{ports: 1000, concurrent: 2000, churn: 1000, live: 500, more: 300}
}

// destinations are some that a pod's connections go to by turns.
func destinations(base netip.Addr) []netip.AddrPort {
	var out []netip.AddrPort
	for range 16 {
		base = base.Next()
		out = append(out, at(base, 80), at(base, 443))
	}
	return out
}

// tell is a teller for crowds.
func tell(name uint16) func(int, netip.AddrPort) int {
	return func(fd int, from netip.AddrPort) int {
		local, err := localAddr(fd)
		if err == nil {
			dst := originalDstFD(fd, netip.AddrPortFrom(local.Addr().Unmap(), local.Port()))
			_, _ = fmt.Fprintf(descriptor(fd), "%d %s %s", name, dst, from.Addr()) // the client's test reads it
		}
		return -1
	}
}

type descriptor int

func (d descriptor) Write(b []byte) (int, error) { return unix.Write(int(d), b) }

func (s *stage) proxies(t *testing.T, c *crew, port uint16, most int, of func(int, netip.AddrPort) int) {
	t.Helper()
	c.serve(t, s.proxy, s.pod.NS, listen(t, s.proxy, s.pod.NS, fmt.Sprintf("[::]:%d", port), proxyOptions), most, of)
}

// TestManyConnections has one pod hold more connections than it has ports.
func TestManyConnections(t *testing.T) {
	l := loads()
	forEach(t, func(t *testing.T, s *stage) {
		for _, a := range families() {
			t.Run(a.name, func(t *testing.T) {
				n := l.concurrent
				if l.ports > 0 {
					check(t, s.pod.Sysctl("net/ipv4/ip_local_port_range", fmt.Sprintf("40000 %d", 40000+l.ports-1)))
				}
				c, to := newCrew(t), destinations(a.vip)
				s.proxies(t, c, redirect.PortOutbound, n, tell(redirect.PortOutbound))
				s.enrol(t)
				start := time.Now()
				c.hold(t, s.app, s.pod.NS, n, func(i int) error {
					dst := to[i%len(to)]
					_, err := callWithin(dst, fmt.Sprintf("15001 %s %s", dst, a.pod))
					return err
				})
				t.Logf("%d connections at a time, opened in %v", n, time.Since(start).Round(time.Millisecond))
			})
		}
	})
}

// TestChurn opens connections one after another; the client ends them, so that its
// side remembers each for a minute.
func TestChurn(t *testing.T) {
	l := loads()
	forEach(t, func(t *testing.T, s *stage) {
		for _, a := range families() {
			t.Run(a.name, func(t *testing.T) {
				c, to := newCrew(t), destinations(a.vip)
				s.proxies(t, c, redirect.PortOutbound, 1, tell(redirect.PortOutbound))
				s.enrol(t)
				start := time.Now()
				check(t, in(s.app, s.pod.NS, func() error {
					for i := range l.churn {
						dst := to[i%len(to)]
						fd, err := callWithin(dst, fmt.Sprintf("15001 %s %s", dst, a.pod))
						if err != nil {
							return fmt.Errorf("connection %d, after %v: %w", i, time.Since(start), err)
						}
						_ = unix.Close(fd) // the call is over
						if l.rate > 0 {
							pace(start, i, l.rate)
						}
					}
					return nil
				}))
				t.Logf("%d connections one after another in %v", l.churn, time.Since(start).Round(time.Millisecond))
			})
		}
	})
}

// pace waits until connection n of rate in a second is due.
func pace(start time.Time, n, rate int) {
	due := start.Add(time.Duration(n) * time.Second / time.Duration(rate))
	if wait := time.Until(due); wait > 0 {
		ts := unix.NsecToTimespec(int64(wait))
		_ = unix.Nanosleep(&ts, nil) // early is no harm
	}
}

// TestManyInbound has one client with many live plaintext connections, whose every one
// the proxy carries on in the client's name, open and close more of them.
func TestManyInbound(t *testing.T) {
	l := loads()
	forEach(t, func(t *testing.T, s *stage) {
		for _, a := range families() {
			t.Run(a.name, func(t *testing.T) {
				c, to, want := newCrew(t), at(a.pod, 8080), fmt.Sprintf("app %s", a.client)
				taken := s.carryCrowd(t, c, a, l.live)
				s.enrol(t)
				start := time.Now()
				c.hold(t, s.app, s.client.NS, l.live, func(int) error { _, err := callWithin(to, want); return err })
				check(t, in(s.app, s.client.NS, func() error {
					for i := range l.more {
						fd, err := callWithin(to, want)
						if err != nil {
							return fmt.Errorf("connection %d beside %d: %w", i, l.live, err)
						}
						// A reset: the client's own side shall remember none, of its ports it has 28232.
						_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
						_ = unix.Close(fd) // the call is over
					}
					return nil
				}))
				t.Logf("%d connections beside %d in %v; %d pairs were taken", l.more, l.live, time.Since(start).Round(time.Millisecond), taken.Load())
			})
		}
	})
}

// carryCrowd is an app and a proxy before it, which dials as ztunnel does: in the
// client's name from a port below those that the kernel gives.
func (s *stage) carryCrowd(t *testing.T, c *crew, a family, most int) (taken *atomic.Int64) {
	t.Helper()
	c.serve(t, s.app, s.pod.NS, listen(t, s.app, s.pod.NS, at(a.pod, 8080).String(), nil), most, func(fd int, from netip.AddrPort) int {
		_, _ = fmt.Fprintf(descriptor(fd), "app %s", from.Addr()) // the client's test reads it
		return -1
	})
	taken = &atomic.Int64{}
	s.proxies(t, c, redirect.PortInbound, most, func(fd int, from netip.AddrPort) int {
		for range 128 { // as ztunnel does
			port := uint16(10_000 + rand.IntN(22_768))
			d, err := dialAsClient(at(from.Addr(), port), at(a.pod, 8080))
			if errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.ETIMEDOUT) {
				taken.Add(1)
				continue
			}
			if err != nil {
				t.Errorf("dial as %v port %d: %v", from.Addr(), port, err)
				return -1
			}
			if err := readLine(d, fmt.Sprintf("app %s", from.Addr())); err != nil {
				t.Error(err)
			}
			_, _ = fmt.Fprintf(descriptor(fd), "app %s", from.Addr()) // the client's test reads it
			return d
		}
		t.Errorf("no port to dial as %v", from.Addr())
		return -1
	})
	return taken
}

// dialAsClient is a dial on a thread of the proxy's.
func dialAsClient(src, dst netip.AddrPort) (int, error) {
	fd, err := stream(dst.Addr(), 0, 0)
	if err != nil {
		return -1, err
	}
	// A port is free again for other destinations, and beside connections that are
	// ending; silence on loopback means that the SYN met another connection of the pair.
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, redirect.MarkProxy),
		transparent(fd),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Usec: 200_000}))
	if err == nil {
		err = unix.Bind(fd, sockaddr(src))
	}
	if err == nil {
		err = dial(fd, dst)
	}
	if err != nil {
		_ = unix.Close(fd) // err says more
		return -1, err
	}
	return fd, nil
}
