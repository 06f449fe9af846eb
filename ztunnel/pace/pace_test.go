package pace

import (
	"context"
	"errors"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/test/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

// process is one whose load the test sets: of what it demands it gets as much as
// it has processors.
type process struct {
	mu      sync.Mutex
	at      time.Time
	cpu     time.Duration
	waited  time.Duration
	demand  float64 // CPUs
	waiting float64 // goroutines, beyond those that the processors run
	procs   int
	changes []int
	looks   int

	due   time.Duration // the alarm's, of cpu
	timer *time.Timer
	rings chan os.Signal
}

func (p *process) machine() machine {
	p.at, p.rings = time.Now(), make(chan os.Signal, 1)
	return machine{look: p.look, set: p.set, alarm: func() (alarm, error) { return p, nil }}
}

func (p *process) advanceLocked() {
	d := time.Since(p.at)
	p.at = time.Now()
	p.cpu += time.Duration(float64(d) * p.busyLocked())
	p.waited += time.Duration(float64(d) * max(0, p.waiting-float64(p.procs-1)))
}

func (p *process) busyLocked() float64 { return min(p.demand, float64(p.procs)) }

func (p *process) armLocked() {
	if p.timer != nil {
		p.timer.Stop()
	}
	if busy := p.busyLocked(); busy > 0 && p.due > 0 {
		p.timer = time.AfterFunc(time.Duration(float64(max(0, p.due-p.cpu))/busy)+1, func() {
			select {
			case p.rings <- ring:
			default:
			}
		})
	}
}

func (p *process) do(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.advanceLocked()
	f()
	p.armLocked()
}

func (p *process) look() (l look) {
	p.do(func() { p.looks++; l = look{p.at, p.cpu, p.waited} })
	return l
}

func (p *process) set(n int) {
	p.do(func() {
		if n != p.procs {
			p.procs, p.changes = n, append(p.changes, n)
		}
	})
}

func (p *process) load(demand, waiting float64) {
	p.do(func() { p.demand, p.waiting = demand, waiting })
}
func (p *process) Ring() <-chan os.Signal    { return p.rings }
func (p *process) Set(d time.Duration) error { p.do(func() { p.due = p.cpu + d }); return nil }
func (p *process) Close()                    { p.do(func() { p.due = 0 }) }

// paced runs f beside a Pacer of a process with a limit.
func paced(t *testing.T, limit int, f func(p *process)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := &process{procs: limit}
		pacer := New(Config{Limit: limit})
		pacer.machine = p.machine()
		ctx, cancel := context.WithCancel(t.Context())
		donec := make(chan error, 1)
		go func() { donec <- pacer.Run(ctx) }()
		synctest.Wait()
		f(p)
		cancel()
		if err := <-donec; err != nil {
			t.Error(err)
		}
		if p.procs != limit {
			t.Errorf("%d processors are left behind, want %d", p.procs, limit)
		}
	})
}

func (p *process) want(t *testing.T, why string, procs int) {
	t.Helper()
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.procs != procs {
		t.Errorf("%s: %d processors after %v, want %d", why, p.procs, p.changes, procs)
	}
}

func TestOneProcessorWhileOneIsEnough(t *testing.T) {
	paced(t, 16, func(p *process) {
		p.want(t, "at the start", 1)
		p.load(0.8, 0.9)
		time.Sleep(time.Minute)
		p.want(t, "with a stream that uses 0.8 CPUs", 1)
	})
}

// A storm of handshakes makes dozens of goroutines wait at once.
func TestStormHasAllProcessorsSoon(t *testing.T) {
	paced(t, 16, func(p *process) {
		p.load(16, 60)
		time.Sleep(25 * time.Millisecond)
		p.want(t, "after 25 ms of a storm", 4)
		time.Sleep(25 * time.Millisecond)
		p.want(t, "after 50 ms of a storm", 16)
		time.Sleep(time.Minute)
		p.want(t, "while it goes on", 16)
		if want := []int{1, 2, 4, 8, 16}; !slices.Equal(p.changes, want) {
			t.Errorf("changes %v, want %v", p.changes, want)
		}
	})
}

// A full processor does not poll its sockets in time, so that who waits is not
// counted as waiting.
func TestFullProcessorIsNotTheLimit(t *testing.T) {
	paced(t, 2, func(p *process) {
		p.load(1.5, 0)
		time.Sleep(50 * time.Millisecond)
		p.want(t, "after 50 ms of more than one processor's work", 2)
	})
}

// Other processes have the machine: this one gets little of it, and yet many of
// its goroutines wait.
func TestCrowdOnABusyMachine(t *testing.T) {
	paced(t, 2, func(p *process) {
		p.load(0.4, 6)
		time.Sleep(60 * time.Millisecond)
		p.want(t, "with six that wait", 2)
	})
}

func TestHiccupDoesNotCount(t *testing.T) {
	paced(t, 2, func(p *process) {
		for range 100 {
			p.load(0.5, 1.5)
			time.Sleep(20 * time.Millisecond)
			p.load(0.5, 0.1)
			time.Sleep(200 * time.Millisecond)
		}
		p.want(t, "with 20 ms of crowd now and then", 1)
	})
}

func TestFallsStepByStepAndThenNothingRuns(t *testing.T) {
	paced(t, 8, func(p *process) {
		p.load(8, 40)
		time.Sleep(time.Second)
		p.want(t, "under load", 8)
		p.load(0, 0)
		time.Sleep(hold - time.Millisecond)
		p.want(t, "before the time is over", 8)
		time.Sleep(4 * hold)
		p.want(t, "after three times of idling", 1)
		looks := p.looks
		time.Sleep(time.Hour)
		synctest.Wait()
		if p.looks != looks {
			t.Errorf("an idle process looked %d times", p.looks-looks)
		}
		p.load(0.1, 0)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := p.looks - looks; n > 110 {
			t.Errorf("%d looks for one second of CPU time, want 100", n)
		}
	})
}

// With a load that wants two processors and looks as if one would do, going back
// becomes rarer; and only a load that did not go away is taken for one.
func TestWrongFallsBecomeRarer(t *testing.T) {
	falls := func(p *process) (n int) {
		for _, c := range p.changes[1:] {
			if c == 1 {
				n++
			}
		}
		return n
	}
	paced(t, 2, func(p *process) {
		p.load(0.75, 1.35) // 1.35 wait for one processor, 0.35 for two
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if n := falls(p); n < 4 || n > 12 {
			t.Errorf("%d falls in two minutes, want some at first, and then one in %s", n, maxHold)
		}
	})
	paced(t, 2, func(p *process) {
		for range 10 {
			p.load(1.8, 5)
			time.Sleep(time.Second)
			p.load(0, 0)
			time.Sleep(5 * time.Second)
		}
		synctest.Wait()
		if n := falls(p); n != 10 {
			t.Errorf("%d falls for 10 loads that came and went", n)
		}
	})
}

func TestLimitsThatAreNoPowerOfTwo(t *testing.T) {
	paced(t, 3, func(p *process) {
		p.load(3, 20)
		time.Sleep(time.Second)
		p.want(t, "under load", 3)
		p.load(1.2, 0)
		time.Sleep(time.Minute)
		p.want(t, "with 1.2 CPUs used", 2)
	})
}

func TestOneIsOne(t *testing.T) {
	for _, limit := range []int{0, 1} {
		p := &process{}
		pacer := New(Config{Limit: limit})
		pacer.machine = machine{set: p.set, alarm: func() (alarm, error) { t.Error("an alarm is set"); return nil, nil }}
		if err := pacer.Run(t.Context()); err != nil || p.procs != 1 {
			t.Errorf("limit %d: %d processors, %v", limit, p.procs, err)
		}
	}
}

// What a sandbox refuses must not leave the proxy with one processor.
func TestWithoutAlarmAllProcessorsStay(t *testing.T) {
	p := &process{procs: 4}
	pacer := New(Config{Limit: 4})
	pacer.machine = machine{set: p.set, alarm: func() (alarm, error) { return nil, errors.New("not permitted") }}
	if err := pacer.Run(t.Context()); err != nil || p.procs != 4 || len(p.changes) > 0 {
		t.Errorf("%d processors after %v, %v", p.procs, p.changes, err)
	}
}

// The kernel's alarm, the runtime's histogram and GOMAXPROCS itself.
func TestRealProcess(t *testing.T) {
	if runtime.GOMAXPROCS(0) < 2 {
		t.Skip("there is one processor only")
	}
	limit := runtime.GOMAXPROCS(0)
	reg := prometheus.NewRegistry()
	pacer := New(Config{Limit: limit, Registerer: reg})
	ctx, cancel := context.WithCancel(t.Context())
	donec := make(chan error, 1)
	go func() { donec <- pacer.Run(ctx) }()
	var wg sync.WaitGroup
	for range 8 * limit {
		wg.Go(func() {
			for pacer.changes[0].Load() == 0 && t.Context().Err() == nil {
				runtime.Gosched() // busy, and always others wait
			}
		})
	}
	wg.Wait()
	cancel()
	if err := <-donec; err != nil {
		t.Fatal(err)
	}
	if n := runtime.GOMAXPROCS(0); n != limit {
		t.Errorf("%d processors are left behind, want %d", n, limit)
	}
	families, err := reg.Gather()
	if err != nil || len(families) != 3 {
		t.Errorf("%d metrics, %v", len(families), err)
	}
}

func TestLookCountsWaitingAndCPU(t *testing.T) {
	looks := newLooker()
	before := looks()
	var wg sync.WaitGroup
	for range 50 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for range 1000 {
				runtime.Gosched()
			}
		})
	}
	wg.Wait()
	after := looks()
	if !after.at.After(before.at) || after.cpu <= before.cpu || after.waited <= before.waited {
		t.Errorf("%+v is not later than %+v", after, before)
	}
	if u := between(before, after); u.busy <= 0 || u.waiting <= 0 {
		t.Errorf("use %+v", u)
	}
	if u := between(after, after); u != (use{}) {
		t.Errorf("in no time %+v was used", u)
	}
}

func BenchmarkLook(b *testing.B) {
	looks := newLooker()
	for b.Loop() {
		looks()
	}
}

// What a change costs: everything stops for it, with 10,000 goroutines about.
func BenchmarkChange(b *testing.B) {
	was := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(was)
	stopc := make(chan struct{})
	var wg sync.WaitGroup
	for range 10000 {
		wg.Go(func() { <-stopc })
	}
	for i := 0; b.Loop(); i++ {
		runtime.GOMAXPROCS(1 + i%2)
	}
	close(stopc)
	wg.Wait()
}
