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

// schedule sets the times of all requests before anything is sent. They stand,
// whatever happens to earlier ones: a request that has to wait because another is
// not answered, or because its connection has to be made again, has waited. Leaving
// that out (coordinated omission) is what makes tails look short.
func (r *run) schedule() {
	now, step := monotonic(), r.step()
	for i := range r.workers {
		w := &r.workers[i]
		w.due = now + step*time.Duration(i)/time.Duration(len(r.workers))
		w.open = w.due
	}
}

// overdue counts what was due in the window and had no answer when it ended: it has waited until then, at least. A
// stall at the end would leave no trace otherwise.
func (r *run) overdue(w *worker) {
	if r.PerSec == 0 {
		return
	}
	for due := w.open; due < r.window[1]; due += r.step() {
		if due >= r.window[0] {
			w.hist.Add(int64(r.window[1] - due))
		}
	}
}

// step is the time between two requests of a worker.
func (r *run) step() time.Duration {
	return time.Duration(len(r.workers)) * time.Second / time.Duration(r.PerSec)
}

// turn returns when it is a worker's turn, with the time from which its request is
// measured: now, or when it was due.
func (r *run) turn(w *worker) (time.Duration, error) {
	if r.PerSec == 0 {
		return monotonic(), nil
	}
	due := w.due
	w.due += r.step()
	return due, sleepUntil(due)
}

// pin gives a worker with a fixed rate a thread of its own whose sleep ends in time.
// Go's timers end up to a millisecond late when a process has nothing else to do,
// which would be all that a tail shows.
func (r *run) pin() (unpin func()) {
	if r.PerSec == 0 {
		return func() {}
	}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		r.fault(fmt.Errorf("set timer slack: %w", err))
	}
	return runtime.UnlockOSThread
}

// rate sends requests at fixed times over a connection that is used by a thread in
// blocking calls.
func (r *run) rate(w *worker, _ int) error {
	defer r.pin()()
	b := open(verbAnswer, r.Size)
	c, err := r.dial(b)
	if err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(r.Timeout)) // as above
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
	for !r.ended.Load() {
		due, err := r.turn(w)
		if err != nil {
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
