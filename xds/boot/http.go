package boot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

const (
	// httpHeaderTimeout ends clients that dribble their request.
	httpHeaderTimeout = 5 * time.Second
	// httpIdleTimeout is above the usual scrape interval of 15 to 60 s.
	httpIdleTimeout = 90 * time.Second
	// httpDrain is how long a running answer may go on after the end.
	httpDrain = time.Second
)

// ServeHTTP serves h on ln until ctx ends, then lets running answers finish
// for a moment.
func ServeHTTP(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: httpHeaderTimeout,
		IdleTimeout:       httpIdleTimeout,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	errc := make(chan error, 1)
	go func() { errc <- srv.Serve(ln) }()
	select {
	case err := <-errc:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), httpDrain)
	defer cancel()
	if err := srv.Shutdown(drain); err != nil {
		_ = srv.Close() // past the deadline: cut what is left
	}
	if err := <-errc; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Listen opens a TCP listener without MPTCP: such sockets cannot enter
// sockmaps, and no peer of a mesh port speaks it.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return ln, nil
}
