package redirect_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/netns"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// BenchmarkUnenrolled tells what the programs cost a pod that is not in the mesh:
// its connect rate with them, as a part of its rate without. One operation is a
// pair of runs in turn; the metrics are the median over all pairs by the clock and
// by the processor time of the connecting thread, which also pays for the way to
// the listener and back (run with -benchtime=40x).
func BenchmarkUnenrolled(b *testing.B) {
	const connections = 1500
	s := quietStage(b)
	discard(b, listen(b, s.app, s.client.NS, "[::]:8080", nil))
	to := netip.AddrPortFrom(clientV4, 8080)
	without := func() cost { return connects(b, s.app, s.pod.NS, to, connections) }
	with := func() cost {
		s.open(b)
		c := connects(b, s.app, s.pod.NS, to, connections)
		check(b, s.hooks.Uninstall(), s.hooks.Close())
		return c
	}
	without()
	var wall, cpu []float64
	for b.Loop() {
		var plain, hooked cost
		if len(wall)%2 == 0 {
			plain, hooked = without(), with()
		} else {
			hooked, plain = with(), without()
		}
		wall = append(wall, float64(plain.wall)/float64(hooked.wall))
		cpu = append(cpu, float64(plain.cpu)/float64(hooked.cpu))
	}
	b.ReportMetric(median(wall), "x-rate")
	b.ReportMetric(median(cpu), "x-cpu-rate")
	b.ReportMetric(0, "ns/op")
}

type cost struct{ wall, cpu time.Duration }

// connects opens and resets n connections, one after the other.
func connects(b *testing.B, cg *netlab.Cgroup, ns *netns.NS, to netip.AddrPort, n int) (c cost) {
	b.Helper()
	check(b, in(cg, ns, func() error {
		sa := sockaddr(to)
		for range n / 5 { // whoever comes after an attachment finds cold caches
			if err := connectOnce(sa); err != nil {
				return err
			}
		}
		start, busy := time.Now(), threadTime()
		for range n {
			if err := connectOnce(sa); err != nil {
				return err
			}
		}
		c = cost{time.Since(start), threadTime() - busy}
		return nil
	}))
	return c
}

func connectOnce(to unix.Sockaddr) error {
	family := unix.AF_INET
	if _, ok := to.(*unix.SockaddrInet6); ok {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, to); err != nil {
		return err
	}
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

func threadTime() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) // always there
	return time.Duration(ts.Nano())
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
