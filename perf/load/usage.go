package load

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is one to be measured.
type Process struct {
	Name  string `json:"name"`
	PID   int    `json:"pid"`
	Proxy bool   `json:"proxy,omitempty"` // it stands between client and server

	counted *syscalls // nil: its system calls are not counted
}

// Usage is what a process used in a window.
type Usage struct {
	Process
	CPU         time.Duration `json:"cpu"`
	Later       time.Duration `json:"later,omitempty"` // CPU of the last part, in which nothing happened
	RSS         uint64        `json:"rss"`             // bytes at the end
	Grown       int64         `json:"grown"`
	Heap        uint64        `json:"heap,omitempty"` // Go heap in use when the load has ended; 0: not known
	Syscalls    uint64        `json:"syscalls,omitempty"`
	Voluntary   uint64        `json:"voluntary"`   // context switches
	Involuntary uint64        `json:"involuntary"` // context switches
	LogLines    uint64        `json:"logLines"`    // written to a file on standard output
}

// Machine is what the whole machine used in a window.
type Machine struct {
	CPUs     int           `json:"cpus"`
	Busy     time.Duration `json:"busy"`  // of all CPUs, the kernel's work for the network included
	Steal    time.Duration `json:"steal"` // taken by other machines on the same hardware
	Switches uint64        `json:"switches"`
	Kernel   int64         `json:"kernel"` // growth of unreclaimable kernel memory and socket buffers, bytes
}

// StealShare is the part of all CPU time that was stolen.
func (r Result) StealShare() float64 {
	if r.Elapsed <= 0 || r.Machine.CPUs == 0 {
		return 0
	}
	return r.Machine.Steal.Seconds() / r.Elapsed.Seconds() / float64(r.Machine.CPUs)
}

// moment is one look.
type moment struct {
	at      time.Time
	machine machineTotals
	procs   []processTotals
}

type machineTotals struct {
	idle, steal time.Duration
	switches    uint64
	kernel      int64
}

type processTotals struct {
	Process
	cpu                    time.Duration
	rss                    uint64
	syscalls               uint64
	voluntary, involuntary uint64
	log                    string // the file that is its standard output, "" when it is none
	logSize                int64
}

func look(watch []Process) (moment, error) {
	m := moment{at: time.Now()}
	var err error
	if m.machine, err = lookMachine(); err != nil {
		return m, err
	}
	for _, p := range watch {
		t, err := lookProcess(p)
		if err != nil {
			return m, fmt.Errorf("measure %s (pid %d): %w", p.Name, p.PID, err)
		}
		m.procs = append(m.procs, t)
	}
	return m, nil
}

// between is the difference of two looks.
func between(a, b moment) Result {
	idle, steal, cpus := b.machine.idle-a.machine.idle, b.machine.steal-a.machine.steal, runtime.NumCPU()
	out := Result{Elapsed: b.at.Sub(a.at), Machine: Machine{
		CPUs: cpus, Busy: max(0, time.Duration(cpus)*b.at.Sub(a.at)-idle-steal), Steal: steal,
		Switches: b.machine.switches - a.machine.switches, Kernel: b.machine.kernel - a.machine.kernel,
	}}
	for i, p := range b.procs {
		was := a.procs[i]
		out.Usage = append(out.Usage, Usage{
			Process: p.Process, CPU: p.cpu - was.cpu, RSS: p.rss, Grown: int64(p.rss) - int64(was.rss), Syscalls: p.syscalls - was.syscalls,
			// Threads that ended take their counts with them.
			Voluntary: p.voluntary - min(was.voluntary, p.voluntary), Involuntary: p.involuntary - min(was.involuntary, p.involuntary),
			LogLines: lines(p.log, was.logSize, p.logSize),
		})
	}
	return out
}

// tick is the unit of /proc/stat (USER_HZ).
const tick = 10 * time.Millisecond

func lookMachine() (t machineTotals, err error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return t, err
	}
	var user, nice, system, idle, iowait, irq, softirq, steal int64
	if _, err := fmt.Sscanf(string(b), "cpu %d %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal); err != nil {
		return t, fmt.Errorf("read /proc/stat: %w", err)
	}
	// Idle time is counted by a clock. User and system are who ran when the kernel ticked: work that begins with a timer, and
	// ends before the next tick, is in none of them.
	t.idle, t.steal = time.Duration(idle+iowait)*tick, time.Duration(steal)*tick
	if _, after, ok := strings.Cut(string(b), "\nctxt "); ok {
		t.switches = number(after)
	}
	mem, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return t, err
	}
	for line := range strings.Lines(string(mem)) {
		name, rest, _ := strings.Cut(line, ":")
		switch name {
		case "SUnreclaim", "KernelStack", "PageTables":
			t.kernel += int64(number(rest)) << 10
		}
	}
	if b, err := os.ReadFile("/proc/net/sockstat"); err == nil {
		if _, after, ok := strings.Cut(string(b), "TCP:"); ok {
			if _, pages, ok := strings.Cut(after, " mem "); ok {
				t.kernel += int64(number(pages)) * int64(os.Getpagesize())
			}
		}
	}
	return t, nil
}

// number reads the digits at the start of s.
func number(s string) uint64 {
	s = strings.TrimSpace(s)
	if i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		s = s[:i]
	}
	n, _ := strconv.ParseUint(s, 10, 64) // no digits: 0
	return n
}

func lookProcess(p Process) (processTotals, error) {
	t := processTotals{Process: p}
	// The clock of a process counts nanoseconds; /proc/PID/stat counts ticks. Its
	// number is made of the pid: clock_getcpuclockid(3), CPUCLOCK_SCHED.
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^p.PID)<<3|2, &ts); err != nil {
		return t, os.NewSyscallError("clock_gettime", err)
	}
	t.cpu = time.Duration(ts.Nano())
	dir := filepath.Join("/proc", strconv.Itoa(p.PID))
	b, err := os.ReadFile(filepath.Join(dir, "statm"))
	if err != nil {
		return t, err
	}
	if _, rss, ok := strings.Cut(string(b), " "); ok {
		t.rss = number(rss) * uint64(os.Getpagesize())
	}
	tasks, err := os.ReadDir(filepath.Join(dir, "task"))
	if err != nil {
		return t, err
	}
	for _, task := range tasks {
		b, err := os.ReadFile(filepath.Join(dir, "task", task.Name(), "status"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // ended meanwhile
		}
		if err != nil {
			return t, err
		}
		_, after, _ := strings.Cut(string(b), "\nvoluntary_ctxt_switches:")
		t.voluntary += number(after)
		_, after, _ = strings.Cut(after, "\nnonvoluntary_ctxt_switches:")
		t.involuntary += number(after)
	}
	if t.syscalls, err = p.counted.of(p.PID); err != nil {
		return t, err
	}
	stdout := filepath.Join(dir, "fd", "1")
	if st, err := os.Stat(stdout); err == nil && st.Mode().IsRegular() {
		t.log, t.logSize = stdout, st.Size()
	}
	return t, nil
}

// lines counts those in a part of a file; a file that cannot be read has none.
func lines(path string, from, to int64) (n uint64) {
	if path == "" || to <= from {
		return 0
	}
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	r := io.NewSectionReader(f, from, to-from)
	b := make([]byte, 256<<10)
	for {
		k, err := r.Read(b)
		n += uint64(bytes.Count(b[:k], []byte("\n")))
		if err != nil {
			return n
		}
	}
}
