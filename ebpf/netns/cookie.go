package netns

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Cookie is the number by which kernel programs know the namespace. The kernel
// never uses one twice. socket(7), SO_NETNS_COOKIE, Linux 5.14.
func (n *NS) Cookie() (uint64, error) {
	var v uint64
	err := n.Do(func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		v, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read the namespace's cookie: %w", err)
	}
	return v, nil
}
