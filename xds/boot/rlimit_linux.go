package boot

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// RaiseNoFile raises the soft limit of open files to the hard one and returns
// it: a proxy holds at least two descriptors per connection.
func RaiseNoFile() (uint64, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, fmt.Errorf("read RLIMIT_NOFILE: %w", err)
	}
	if lim.Cur < lim.Max {
		lim.Cur = lim.Max
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
			return 0, fmt.Errorf("raise RLIMIT_NOFILE to its hard limit %d: %w", lim.Max, err)
		}
	}
	return lim.Cur, nil
}
