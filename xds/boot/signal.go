package boot

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
)

// ErrSignal is the cause of a context that SignalContext ended.
var ErrSignal = errors.New("stopped by a signal")

// SignalContext returns a context that the first SIGTERM or SIGINT ends. The
// second one exits the process at once with status 1: an operator who asks
// twice does not want to wait for a drain. stop releases the signals.
func SignalContext(parent context.Context) (ctx context.Context, stop func()) {
	sigc := make(chan os.Signal, 2)
	signal.Notify(sigc, syscall.SIGTERM, syscall.SIGINT)
	return signalContext(parent, sigc, func() { signal.Stop(sigc) }, os.Exit)
}

func signalContext(parent context.Context, sigc <-chan os.Signal, release func(), exit func(int)) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	stopc, donec := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(donec)
		for range 2 {
			select {
			case <-sigc:
				if ctx.Err() != nil {
					exit(1)
					return
				}
				cancel(ErrSignal)
			case <-stopc:
				return
			}
		}
	}()
	return ctx, func() {
		release()
		select {
		case <-stopc:
		default:
			close(stopc)
		}
		<-donec
		cancel(context.Canceled)
	}
}
