package load

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// rate sends requests at times that are set before anything is sent, and measures
// each from its own time. A request that has to wait because an earlier one is not
// answered has waited: leaving that out (coordinated omission) is what makes tails
// look short.
//
// The connection is used by a thread in blocking calls. Go's timers end up to a
// millisecond late when a process has nothing else to do, which would be all that
// a tail shows.
func (r *run) rate(w *worker, i int) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set timer slack: %w", err)
	}
	b := open(verbAnswer, r.Size)
	c, err := r.dial(b)
	if err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b); err != nil {
		r.close(c)
		return err
	}
	f, err := c.File()
	r.close(c) // f is the same connection
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd()) // which makes it blocking
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	step := time.Duration(r.Conns) * time.Second / time.Duration(r.PerSec)
	due := monotonic() + step*time.Duration(i)/time.Duration(r.Conns)
	for ; !r.ended.Load(); due += step {
		if err := sleepUntil(due); err != nil {
			return err
		}
		if err := exchange(fd, b); err != nil {
			return err
		}
		r.done(w, monotonic()-due, true)
	}
	return nil
}

func exchange(fd int, b []byte) error {
	for sent := 0; sent < len(b); {
		n, err := unix.Write(fd, b[sent:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("write", err)
		}
		sent += n
	}
	for got := 0; got < len(b); {
		n, err := unix.Read(fd, b[got:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return errors.New("no answer within two seconds")
		case err != nil:
			return os.NewSyscallError("read", err)
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		got += n
	}
	return nil
}

// monotonic is the clock that sleepUntil knows.
func monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic("BUG: no monotonic clock: " + err.Error())
	}
	return time.Duration(ts.Nano())
}

func sleepUntil(at time.Duration) error {
	ts := unix.NsecToTimespec(int64(at))
	for {
		err := unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &ts, nil)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("clock_nanosleep", err)
		}
	}
}
