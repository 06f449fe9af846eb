package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/ambit-mesh/ambit/xds/boot"
)

// insists is how long after a first signal a second one is another wish. timeout(1)
// sends one to its child and one to the group that both are in.
const insists = 2 * time.Second

// untilSignal returns a context that the first signal ends: what was measured is
// written then, and the lab ended. A later one ends the process at once.
func untilSignal(parent context.Context) (ctx context.Context, stop func()) {
	sigc := make(chan os.Signal, 2)
	signal.Notify(sigc, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	ctx, cancel := context.WithCancelCause(parent)
	go obey(sigc, func() { cancel(boot.ErrSignal) }, os.Exit)
	return ctx, func() {
		signal.Stop(sigc)
		close(sigc)
		cancel(context.Canceled)
	}
}

// obey ends when nothing can be sent any more.
func obey(sigc <-chan os.Signal, end func(), exit func(int)) {
	if _, ok := <-sigc; !ok {
		return
	}
	first := time.Now()
	end()
	for range sigc {
		if time.Since(first) >= insists {
			exit(1)
			return
		}
	}
}
