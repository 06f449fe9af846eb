package hbone

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxParts is how many parts one call takes.
	maxParts = hugeBlock / recordLen
	// quickCalls is how many calls in a row may go unseen by the scheduler.
	quickCalls = 64
)

// quick reads and writes sockets without waiting, and without the Go scheduler's knowing.
//
// A system call that the scheduler knows of wakes its monitor thread (sysmon), which sleeps whenever all processors are
// idle. So each message for an idle proxy would wake a second thread as well, which looks around 20 µs later, finds the
// process idle again and goes back to sleep. What the monitor does is to take processors from calls that wait, which
// these do not, and from goroutines that run for too long. Therefore one call in quickCalls is made in public.
//
// One goroutine at a time uses it. The zero value is ready.
type quick struct {
	calls  int
	unseen bool // also by the race detector, which wants to know what is written to memory; tests of these calls
	iov    [maxParts]unix.Iovec
	msg    unix.Msghdr
}

// rested says that its user has waited, or will now: the scheduler has its turn.
func (q *quick) rested() { q.calls = 0 }

func (q *quick) public() bool {
	q.calls++
	return raceEnabled && !q.unseen || q.calls%quickCalls == 0
}

func (q *quick) read(fd uintptr, p []byte) (int, syscall.Errno) {
	if q.public() {
		return known(unix.Read(int(fd), p))
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
	return outcome(n, errno)
}

// readv takes at most maxParts.
func (q *quick) readv(fd uintptr, parts [][]byte) (int, syscall.Errno) {
	if q.public() {
		return known(unix.Readv(int(fd), parts))
	}
	n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(q.gather(parts))), unix.MSG_DONTWAIT)
	clear(q.iov[:len(parts)]) // else who is idle would keep the memory
	return outcome(n, errno)
}

func (q *quick) write(fd uintptr, p []byte) (int, syscall.Errno) {
	if q.public() {
		return known(unix.Write(int(fd), p))
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return outcome(n, errno)
}

// writev takes at most maxParts.
func (q *quick) writev(fd uintptr, parts [][]byte) (int, syscall.Errno) {
	if q.public() {
		return known(unix.Writev(int(fd), parts))
	}
	n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(q.gather(parts))), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	clear(q.iov[:len(parts)])
	return outcome(n, errno)
}

// gather describes parts for one call.
func (q *quick) gather(parts [][]byte) *unix.Msghdr {
	for i, p := range parts {
		q.iov[i].Base = unsafe.SliceData(p)
		q.iov[i].SetLen(len(p))
	}
	q.msg.Iov = &q.iov[0]
	q.msg.SetIovlen(len(parts))
	return &q.msg
}

func outcome(n uintptr, errno syscall.Errno) (int, syscall.Errno) {
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// known is outcome for calls of package unix, all of whose errors are the kernel's.
func known(n int, err error) (int, syscall.Errno) {
	if err == nil {
		return n, 0
	}
	if errno, ok := err.(syscall.Errno); ok {
		return 0, errno
	}
	return 0, unix.EIO
}
