package load

import (
	"runtime"
	"testing"
	"time"
)

// What is not idle is busy, also what the kernel's ticks never met: a load that wakes by timers is asleep whenever they come.
func TestMachineIsBusyWhenItIsNotIdle(t *testing.T) {
	cpus := time.Duration(runtime.NumCPU())
	begin := time.Now()
	a := moment{at: begin, machine: machineTotals{idle: time.Hour, steal: time.Second}}
	b := moment{at: begin.Add(time.Second), machine: machineTotals{idle: time.Hour + cpus*time.Second - 300*time.Millisecond, steal: time.Second + 100*time.Millisecond}}
	if m := between(a, b).Machine; m.Busy != 200*time.Millisecond || m.Steal != 100*time.Millisecond {
		t.Errorf("busy %v, stolen %v, want 200ms and 100ms", m.Busy, m.Steal)
	}
	b.machine.idle += 2 * time.Second // ticks of 10 ms may say more than there was
	if m := between(a, b).Machine; m.Busy != 0 {
		t.Errorf("busy %v, want 0", m.Busy)
	}
}
