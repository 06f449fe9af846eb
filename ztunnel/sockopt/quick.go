package sockopt

import (
	"os"
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

// ReadNow reads what is there and does not wait: 0 is nothing yet, or an end, which the next read finds as well. An error
// it does not find: the kernel tells of a reset once, and after that there is an end.
func ReadNow(c Socket, p []byte) (n int, err error) {
	cerr := controlSocket(c, func(fd uintptr) {
		k, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			n = int(k)
		case unix.EAGAIN, unix.EINTR:
		default:
			err = os.NewSyscallError("recvfrom", errno)
		}
	})
	if cerr != nil {
		return 0, cerr
	}
	return n, err
}
