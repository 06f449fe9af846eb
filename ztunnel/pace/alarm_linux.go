package pace

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ring is the signal of the alarm. Who does not ask for it ignores it, so that one
// which is late, or which somebody sends, does no harm; and a proxy has no window.
const ring = unix.SIGWINCH

// cpuAlarm is a timer on the CPU clock of the process (timer_create(2)): that clock
// goes on only while one of its threads runs, and the kernel looks at the timer
// when it counts that thread's time anyway.
type cpuAlarm struct {
	id    int32
	rings chan os.Signal
}

// sigevent is struct sigevent of the kernel's uapi/asm-generic/siginfo.h.
type sigevent struct {
	value  uintptr
	signo  int32
	notify int32 // 0 is SIGEV_SIGNAL: to the process
	_      [64 - 8 - unsafe.Sizeof(uintptr(0))]byte
}

func newCPUAlarm() (alarm, error) {
	a := &cpuAlarm{rings: make(chan os.Signal, 1)}
	ev := sigevent{signo: int32(ring)}
	_, _, errno := unix.Syscall(unix.SYS_TIMER_CREATE, unix.CLOCK_PROCESS_CPUTIME_ID, uintptr(unsafe.Pointer(&ev)), uintptr(unsafe.Pointer(&a.id)))
	runtime.KeepAlive(&ev)
	if errno != 0 {
		return nil, fmt.Errorf("create a timer on the process's CPU clock: %w", errno)
	}
	signal.Notify(a.rings, ring)
	return a, nil
}

func (a *cpuAlarm) Ring() <-chan os.Signal { return a.rings }

// Set makes the alarm ring once the process has used d more; a ring that was due
// before is forgotten.
func (a *cpuAlarm) Set(d time.Duration) error {
	spec := [2]unix.Timespec{{}, unix.NsecToTimespec(int64(d))} // struct itimerspec: once, after d
	_, _, errno := unix.Syscall6(unix.SYS_TIMER_SETTIME, uintptr(a.id), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0)
	runtime.KeepAlive(&spec)
	if errno != 0 {
		return fmt.Errorf("set the timer on the process's CPU clock: %w", errno)
	}
	return nil
}

func (a *cpuAlarm) Close() {
	_, _, _ = unix.Syscall(unix.SYS_TIMER_DELETE, uintptr(a.id), 0, 0) // only fails for a timer there is not
	signal.Stop(a.rings)
}
