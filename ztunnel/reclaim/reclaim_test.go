package reclaim

import (
	"context"
	"log/slog"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestGivesBackWhenQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var held, gain, released atomic.Int64
		r := New(slog.New(slog.DiscardHandler))
		r.machine = machine{watch: func(context.Context) {}, look: func() memory { return memory{uint64(held.Load()), uint64(gain.Load())} }, release: func() { released.Add(1); gain.Store(0) }}
		donec := make(chan error)
		go func() { donec <- r.Run(ctx) }()
		synctest.Wait()
		step := func(what string, collected bool, wait time.Duration, want int64) {
			t.Helper()
			if collected {
				r.collected <- struct{}{}
			}
			time.Sleep(wait)
			synctest.Wait()
			if got := released.Load(); got != want {
				t.Errorf("%s: given back %d times, want %d", what, got, want)
			}
		}
		held.Store(100 << 20)
		gain.Store(50 << 20)
		step("a start", false, Quiet+time.Second, 1)
		gain.Store(50 << 20)
		step("nothing was collected since", false, time.Hour, 1)
		for range 100 {
			step("busy", true, Quiet/2, 1)
		}
		step("quiet again", true, Quiet+time.Second, 2)
		gain.Store(50 << 20)
		r.Left()
		for range 100 {
			step("somebody left much, and more goes on", true, Over/2, 2)
		}
		step("and is over", false, Over, 3)
		gain.Store(50 << 20)
		step("as before", true, Quiet/2, 3)
		step("quiet once more", false, Quiet, 4)
		gain.Store(worth - 1)
		step("little to be had", true, time.Hour, 4)
		held.Store(1 << 30)
		gain.Store(10 << 20)
		step("little of much", true, time.Hour, 4)
		cancel()
		if err := <-donec; err != nil {
			t.Error(err)
		}
	})
}

// What a collection does not give back, because it lies between what is in use, is not asked for again.
func TestAsksOnceForWhatStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var gain, released atomic.Int64
		r := New(slog.New(slog.DiscardHandler))
		r.machine = machine{watch: func(context.Context) {}, look: func() memory { return memory{100 << 20, uint64(gain.Load())} },
			release: func() { // is a collection itself
				released.Add(1)
				gain.Store(min(gain.Load(), 20<<20))
				r.collected <- struct{}{}
			}}
		donec := make(chan error)
		go func() { donec <- r.Run(ctx) }()
		for i, tt := range []struct {
			gain, want int64
			collected  bool
		}{{gain: 50 << 20, want: 1}, {gain: 21 << 20, want: 1, collected: true}, {gain: 60 << 20, want: 2, collected: true}, {gain: 1 << 20, want: 2, collected: true}, {gain: 15 << 20, want: 3, collected: true}} {
			gain.Store(tt.gain)
			if tt.collected {
				r.collected <- struct{}{}
			}
			time.Sleep(time.Hour)
			synctest.Wait()
			if got := released.Load(); got != tt.want {
				t.Errorf("step %d: given back %d times, want %d", i, got, tt.want)
			}
		}
		cancel()
		if err := <-donec; err != nil {
			t.Error(err)
		}
	})
}

func TestCollectionsTell(t *testing.T) {
	r := New(slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r.watch(ctx)
	for range 3 {
		for told := false; !told; {
			runtime.GC()
			runtime.Gosched()
			select {
			case <-r.collected:
				told = true
			default:
			}
		}
	}
}

func TestLooks(t *testing.T) {
	look := newLooker()
	before := look()
	big := make([]byte, 64<<20)
	for i := 0; i < len(big); i += 4096 {
		big[i] = 1
	}
	with := look()
	runtime.KeepAlive(big)
	if with.held < before.held+60<<20 {
		t.Errorf("64 MiB more are held: %d, then %d", before.held, with.held)
	}
	r := New(slog.New(slog.DiscardHandler))
	r.machine.release()
	if after := look(); after.held > with.held-60<<20 {
		t.Errorf("64 MiB were given back: %d, then %d", with.held, after.held)
	}
}

func TestGroupLimit(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  Limit
	}{
		{"no groups", nil, 0},
		{"version 2, of a container", map[string]string{"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "268435456\n"}, 256 << 20},
		{"none", map[string]string{"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "max\n"}, 0},
		{"the lowest around it", map[string]string{"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n", "/sys/fs/cgroup/a/memory.max": "1000\n", "/sys/fs/cgroup/memory.max": "2000\n"}, 1000},
		{"a path of the host's", map[string]string{"/proc/self/cgroup": "0::/../../pod1/c\n", "/sys/fs/cgroup/memory.max": "5000\n"}, 5000},
		{"version 1", map[string]string{"/proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n", "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "7000\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 7000},
		{"version 1, none", map[string]string{"/proc/self/cgroup": "4:memory:/\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 0},
		{"nonsense", map[string]string{"/proc/self/cgroup": "x\n:\n0::\n", "/sys/fs/cgroup/memory.max": "-5\n"}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := groupLimit(func(name string) string { return tt.files[name] }); got != tt.want {
				t.Errorf("limit %d, want %d", got, tt.want)
			}
		})
	}
}
