package app

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// lockDir takes dir for this process; another one that has it is an error. The
// kernel lets go of it when the process ends, however it does: flock(2).
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock directory: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return func() { _ = f.Close() }, nil // only the lock was of use
	}
	_ = f.Close() // err says more
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errors.New("another ambit-node is at work there: stop it first")
	}
	return nil, fmt.Errorf("lock directory %s: %w", dir, err)
}
