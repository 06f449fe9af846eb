package store

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/xds/client"
)

// BenchmarkResend is a control plane that sends 70,000 workloads again, and what that does to who decides meanwhile: a
// goroutine that wakes every 200 us, as for a connection, and looks up who it is from and to. p99.9-us is how late it
// has its answer, and quiet-p99.9-us how late without the resend. KiB/10k-workloads is what the store keeps.
func BenchmarkResend(b *testing.B) {
	const n = 70_000
	for _, procs := range []int{1, 2} {
		b.Run(fmt.Sprintf("procs=%d", procs), func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
			addresses, policies := wholeMesh(b, n)
			heap := inUse()
			s := New(Config{})
			defer s.Close()
			for _, d := range []client.Delta{policies, addresses} {
				if r := s.Apply(d); len(r) > 0 {
					b.Fatal(r[0])
				}
			}
			known := inUse() - heap
			quiet := late(s, n, func() { time.Sleep(500 * time.Millisecond) })
			var busy []time.Duration
			b.ReportAllocs()
			for b.Loop() {
				busy = append(busy, late(s, n, func() { s.Apply(addresses) })...)
			}
			b.ReportMetric(float64(known)/1024/(n/10_000), "KiB/10k-workloads")
			b.ReportMetric(tail(quiet), "quiet-p99.9-us")
			b.ReportMetric(tail(busy), "p99.9-us")
		})
	}
}

// late is how late each decision was that was due while during ran.
func late(s *Store, n int, during func()) (all []time.Duration) {
	const every = 200 * time.Microsecond
	stopc, donec := make(chan struct{}), make(chan []time.Duration)
	go func() {
		var all []time.Duration
		for i := 0; ; i = (i + 7919) % n {
			due := time.Now().Add(every)
			time.Sleep(every)
			m := s.View().Mesh
			if w := m.Workload(fmt.Sprintf("c//Pod/shop/p%d", i)); w == nil || m.WorkloadByAddr("", w.Addrs[0]) != w {
				panic("BUG: a workload is not found")
			}
			all = append(all, time.Since(due))
			select {
			case <-stopc:
				donec <- all
				return
			default:
			}
		}
	}()
	during()
	close(stopc)
	return <-donec
}

func tail(all []time.Duration) float64 {
	slices.Sort(all)
	return float64(all[len(all)*999/1000]) / 1e3
}

// BenchmarkArrival is what it takes to know 10,000 workloads and 200 services that nobody knew before.
func BenchmarkArrival(b *testing.B) {
	addresses, policies := wholeMesh(b, 10_000)
	b.ReportAllocs()
	for b.Loop() {
		s := New(Config{Node: "n1"})
		s.Apply(policies)
		s.Apply(addresses)
		s.Close()
	}
}
