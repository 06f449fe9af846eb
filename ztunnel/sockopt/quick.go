package sockopt

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// These calls never wait, and are made without the Go scheduler's knowing: one that it knows of wakes its monitor
// thread (sysmon), which sleeps whenever all processors are idle, and that costs more than the call. What the monitor
// does is to take processors from calls that wait. Errors are bare errnos.

// set sets an option whose value is v.
func set[T any](fd, level, option int, v *T) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), uintptr(unsafe.Pointer(v)), unsafe.Sizeof(*v), 0)
	return errorOf(errno)
}

// setInt sets an option that is a number or a switch.
func setInt(fd, level, option, value int) error {
	v := int32(value)
	return set(fd, level, option, &v)
}

// get reads an option into v, as far as the kernel fills it.
func get[T any](fd, level, option int, v *T) error {
	n := uint32(unsafe.Sizeof(*v))
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), uintptr(unsafe.Pointer(v)), uintptr(unsafe.Pointer(&n)), 0)
	return errorOf(errno)
}

// closeWrite ends what a socket sends: shutdown(2).
func closeWrite(fd int) error {
	_, _, errno := unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
	return errorOf(errno)
}

func errorOf(errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}
