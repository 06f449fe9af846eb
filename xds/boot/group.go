package boot

import (
	"context"
	"fmt"
	"log/slog"

	"golang.org/x/sync/errgroup"
)

// Group runs the named goroutines of a process. The first that fails cancels
// the others; Wait returns its error, prefixed by its name.
type Group struct {
	ctx    context.Context // handed to each goroutine, cancelled with the first error as its cause
	cancel context.CancelCauseFunc
	group  errgroup.Group
	log    *slog.Logger
}

// NewGroup returns a group that lives until ctx ends or one member fails.
func NewGroup(ctx context.Context, log *slog.Logger) *Group {
	g := &Group{log: log}
	g.ctx, g.cancel = context.WithCancelCause(ctx)
	return g
}

// Go runs f. A member that returns after the group's context has ended is not
// a failure, whatever it returns: it was told to stop.
func (g *Group) Go(name string, f func(context.Context) error) {
	g.group.Go(func() error {
		g.log.Debug("started", "goroutine", name)
		err := f(g.ctx)
		if g.ctx.Err() != nil {
			g.log.Debug("stopped", "goroutine", name)
			return nil
		}
		if err == nil {
			g.log.Debug("finished", "goroutine", name)
			return nil
		}
		err = fmt.Errorf("%s: %w", name, err)
		g.cancel(err)
		return err
	})
}

// Context is the context that members get.
func (g *Group) Context() context.Context { return g.ctx }

// Wait returns once all members have: nil when they were told to stop or
// finished by themselves, else the first failure.
func (g *Group) Wait() error {
	err := g.group.Wait()
	g.cancel(err)
	return err
}
