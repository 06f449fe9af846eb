// Package pace decides how many processors the Go scheduler has (GOMAXPROCS).
//
// With one, a goroutine that wakes another hands it the processor it runs on: no
// thread is woken, none spins, and nothing moves between caches. A proxy that
// fits on one is a fifth cheaper and faster there. One that does not fit must
// have more at once. So a Pacer begins with one, doubles while the processors
// are busy and goroutines wait for them, and halves when the load has fitted on
// half of them for a while:
//
//	CPU alarm ──► look: CPU used, goroutines that waited ──► more at once
//	timer     ──►                                        └─► fewer after a while
//
// The alarm is a timer on the process's own CPU clock: the kernel looks after it,
// it rings soon after a load has come, and never while the process is idle. The
// other timer runs only while there is more than one processor.
//
// Run owns everything; the metrics may be read from any goroutine.
package pace

import (
	"context"
	"log/slog"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config of a Pacer. Limit is required.
type Config struct {
	Limit      int // the most processors; 1 leaves the scheduler alone
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Pacer adapts GOMAXPROCS. There must be no other in the process.
type Pacer struct {
	cfg     Config
	machine machine
	control control

	procs   atomic.Int64
	changes [2]atomic.Uint64 // up, down
}

// machine is the process as a Pacer sees it.
type machine struct {
	look  func() look
	set   func(procs int)
	alarm func() (alarm, error)
}

// alarm rings once the process has used some more CPU time.
type alarm interface {
	Ring() <-chan os.Signal
	Set(time.Duration) error
	Close()
}

// New returns a Pacer that does nothing before Run.
func New(cfg Config) *Pacer {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	p := &Pacer{cfg: cfg, control: control{limit: max(1, cfg.Limit)}, machine: machine{
		look: newLooker(), set: func(n int) { runtime.GOMAXPROCS(n) }, alarm: newCPUAlarm,
	}}
	p.procs.Store(int64(p.control.limit))
	p.register()
	return p
}

func (p *Pacer) register() {
	reg := p.cfg.Registerer
	if reg == nil {
		return
	}
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "ambit_ztunnel_processors", Help: "Processors the scheduler has now (GOMAXPROCS).",
	}, func() float64 { return float64(p.procs.Load()) }))
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "ambit_ztunnel_processors_limit", Help: "Processors the scheduler may have.",
	}, func() float64 { return float64(p.control.limit) }))
	for i, direction := range []string{"up", "down"} {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "ambit_ztunnel_processors_changes_total", Help: "Changes of the number of processors.",
			ConstLabels: prometheus.Labels{"direction": direction},
		}, func() float64 { return float64(p.changes[i].Load()) }))
	}
}

// Run adapts the number of processors until ctx ends, and leaves the limit
// behind: what is still to be done then is to be done soon.
func (p *Pacer) Run(ctx context.Context) error {
	if p.control.limit == 1 {
		p.set(1)
		return nil
	}
	bell, err := p.machine.alarm()
	if err != nil {
		// Without the alarm nothing would tell that a load has come.
		p.cfg.Logger.Info("the number of processors stays", "processors", p.control.limit, "error", err.Error())
		return nil
	}
	defer bell.Close()
	defer p.set(p.control.limit)
	p.set(1)
	p.control.begin(1, p.machine.look())

	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	for {
		if err := bell.Set(p.control.quantum()); err != nil {
			p.cfg.Logger.Info("the number of processors stays", "processors", p.control.limit, "error", err.Error())
			return nil
		}
		if p.control.procs > 1 {
			timer.Reset(hold / 4) // an idle process gives back what it has, too
		}
		select {
		case <-bell.Ring():
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
		timer.Stop()
		was := p.control.procs
		use := p.control.decide(p.machine.look())
		if p.control.procs == was {
			continue
		}
		p.set(p.control.procs)
		p.cfg.Logger.Debug("processors", "now", p.control.procs, "before", was, "busy", use.busy, "waiting", use.waiting)
	}
}

func (p *Pacer) set(procs int) {
	if was := int(p.procs.Swap(int64(procs))); was < procs {
		p.changes[0].Add(1)
	} else if was > procs {
		p.changes[1].Add(1)
	}
	p.machine.set(procs)
}
