package redirect_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sync/errgroup"

	"github.com/ambit-mesh/ambit/ebpf/redirect"
	"github.com/ambit-mesh/ambit/test/netlab"
)

// BenchmarkNode captures 250 pods and releases them, one after the other or eight
// at a time, and tells the kernel memory that each takes, as the kernel accounts it
// (memlock of programs and maps). One operation is the whole node (run with
// -benchtime=1x).
func BenchmarkNode(b *testing.B) {
	const pods = 250
	for _, workers := range []int{1, 8} {
		b.Run(fmt.Sprintf("%d at a time", workers), func(b *testing.B) {
			s := quietStage(b)
			start := time.Now()
			s.open(b)
			b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms/start")
			defer func() { check(b, s.hooks.Uninstall(), s.hooks.Close()) }()
			var hosts []*netlab.Host
			for i := range pods {
				// A cable from the pod to the node, as a CNI plugin lays it.
				h := netlab.MustHost(b, fmt.Sprint("bulk", i))
				name := fmt.Sprint("v", i)
				check(b, netlab.Cable(h, "eth0", s.node, name), h.Up("eth0"), s.node.Up(name),
					h.Addr("eth0", netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(i / 250), byte(i%250 + 1)}), 32)))
				hosts = append(hosts, h)
			}
			each := func(f func(h *netlab.Host) error) time.Duration {
				start := time.Now()
				var g errgroup.Group
				g.SetLimit(workers)
				for _, h := range hosts {
					g.Go(func() error { return f(h) })
				}
				check(b, g.Wait())
				return time.Since(start)
			}
			perPod := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 / pods }
			empty := sharedMemory(b, s.cfg.Dir)
			for b.Loop() {
				b.ReportMetric(perPod(each(func(h *netlab.Host) error { return s.hooks.Apply(h.NS, redirect.PodRules{DNS: true}) })), "ms/enrol")
				b.ReportMetric(float64(sharedMemory(b, s.cfg.Dir)-empty)/pods/1024, "KiB-maps/pod")
				b.ReportMetric(float64(podMemory(b, s.cfg.Dir))/pods/1024, "KiB-programs/pod")
				b.ReportMetric(perPod(each(func(h *netlab.Host) error { return s.hooks.Check(h.NS, redirect.PodRules{DNS: true}) })), "ms/check")
				b.ReportMetric(perPod(each(func(h *netlab.Host) error { return s.hooks.Remove(h.NS) })), "ms/remove")
			}
			b.ReportMetric(float64(empty)/1024/1024, "MiB-maps/node")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// sharedMemory is what the kernel accounts for the node's maps.
func sharedMemory(b *testing.B, dir string) (sum uint64) {
	b.Helper()
	names, err := os.ReadDir(filepath.Join(dir, "maps"))
	check(b, err)
	for _, n := range names {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "maps", n.Name()), nil)
		check(b, err)
		sum += memlock(b, m)
		m.Close()
	}
	return sum
}

func memlock(b *testing.B, m *ebpf.Map) uint64 {
	b.Helper()
	info, err := m.Info()
	check(b, err)
	n, _ := info.Memlock()
	return n
}

// podMemory is what it accounts for all pods' programs and their constants.
func podMemory(b *testing.B, dir string) (sum uint64) {
	b.Helper()
	shared := map[ebpf.MapID]bool{}
	names, err := os.ReadDir(filepath.Join(dir, "maps"))
	check(b, err)
	for _, n := range names {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "maps", n.Name()), nil)
		check(b, err)
		info, err := m.Info()
		check(b, err)
		id, _ := info.ID()
		shared[id] = true
		m.Close()
	}
	seen := map[ebpf.ProgramID]bool{}
	pins, err := filepath.Glob(filepath.Join(dir, "pods/*/*"))
	check(b, err)
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		check(b, err)
		info, err := l.Info()
		check(b, err, l.Close())
		if seen[info.Program] {
			continue // at both ends of the cable
		}
		seen[info.Program] = true
		p, err := ebpf.NewProgramFromID(info.Program)
		check(b, err)
		pi, err := p.Info()
		check(b, err)
		n, _ := pi.Memlock()
		jited, _ := pi.JitedSize()
		sum += n + uint64(jited)
		ids, _ := pi.MapIDs()
		for _, id := range ids {
			if shared[id] {
				continue
			}
			shared[id] = true // constants, common to the programs of one pod
			m, err := ebpf.NewMapFromID(id)
			check(b, err)
			sum += memlock(b, m)
			m.Close()
		}
		p.Close()
	}
	return sum
}

// BenchmarkCaptured compares connects that programs capture with those that rules
// do, in turn, at one pod. One operation is a pair of runs; ratios are medians over
// all pairs, above 1 where programs do better (run with -benchtime=20x).
func BenchmarkCaptured(b *testing.B) {
	const connections = 1000
	s := newStage(b)
	rules, err := redirect.New(redirect.Config{})
	check(b, err)
	discard(b, listen(b, s.proxy, s.pod.NS, "[::]:15001", proxyOptions))
	to := sockaddr(netip.AddrPortFrom(clientV4, 8080))
	run := func(r redirector) (c cost, latency []float64) {
		check(b, r.Apply(s.pod.NS, everything))
		check(b, in(s.app, s.pod.NS, func() error {
			for range connections / 5 {
				if err := connectOnce(to); err != nil {
					return err
				}
			}
			start, busy := time.Now(), threadTime()
			for range connections {
				one := time.Now()
				if err := connectOnce(to); err != nil {
					return err
				}
				latency = append(latency, float64(time.Since(one).Nanoseconds())/1000)
			}
			c = cost{time.Since(start), threadTime() - busy}
			return nil
		}))
		check(b, r.Remove(s.pod.NS))
		return c, latency
	}
	var rate, cpu, fast, slow []float64
	var p50, p99 [2][]float64
	for b.Loop() {
		var c [2]cost
		var l [2][]float64
		for i := range 2 {
			i = (i + len(rate)) % 2 // who begins changes
			c[i], l[i] = run([]redirector{s.hooks, rules}[i])
			slices.Sort(l[i])
			p50[i] = append(p50[i], l[i][len(l[i])/2])
			p99[i] = append(p99[i], l[i][len(l[i])*99/100])
		}
		n := len(p50[0]) - 1
		rate = append(rate, float64(c[1].wall)/float64(c[0].wall))
		cpu = append(cpu, float64(c[1].cpu)/float64(c[0].cpu))
		fast = append(fast, p50[1][n]/p50[0][n])
		slow = append(slow, p99[1][n]/p99[0][n])
	}
	for _, m := range []struct {
		unit string
		v    []float64
	}{
		{"x-rate", rate}, {"x-cpu", cpu}, {"x-p50", fast}, {"x-p99", slow},
		{"µs-p50-hooks", p50[0]}, {"µs-p50-nftables", p50[1]}, {"µs-p99-hooks", p99[0]}, {"µs-p99-nftables", p99[1]},
	} {
		b.ReportMetric(median(m.v), m.unit)
	}
	b.ReportMetric(0, "ns/op")
}
