package main

import (
	"context"
	"errors"
	"io"
	"os/signal"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/test/lab/control"
	"github.com/ambit-mesh/ambit/test/lab/sandbox"
)

// holdFor is how long a lab is waited for that was still being started when whoever
// held it ended.
const holdFor = 60

var errStillThere = errors.New("the lab could not be ended")

// hold ends a lab when its input ends: whoever starts labs gives it the reading end
// of a pipe, and does not have to live to clean up. Signals that a terminal sends to
// both are not for it.
func hold(in io.Reader, end func() error, pause func()) error {
	_, _ = io.Copy(io.Discard, in) // an input that fails has ended, too
	for range holdFor {
		if end() == nil {
			return nil
		}
		pause()
	}
	return errStillThere
}

// holdCommand is the verb.
func holdCommand(name string, in io.Reader, stderr io.Writer) int {
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	err := hold(in, func() error { _, err := down(context.Background(), name, io.Discard, io.Discard); return err }, func() { time.Sleep(time.Second) })
	if err != nil {
		return fail(stderr, 1, err)
	}
	return 0
}

// down ends a lab and clears up after it, also after one that was killed.
func down(ctx context.Context, name string, stdout, stderr io.Writer) (int, error) {
	code, err := control.Down(ctx, name, stdout, stderr)
	if serr := sandbox.Sweep(name); err == nil && serr != nil {
		code, err = 1, serr
	}
	return code, err
}
