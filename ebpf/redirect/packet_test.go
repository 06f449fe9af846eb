package redirect_test

import (
	"errors"

	"golang.org/x/sys/unix"
)

// ignoreDrop: a dropped packet may be told as a full queue.
func ignoreDrop(err error) error {
	if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EPERM) {
		return nil
	}
	return err
}
