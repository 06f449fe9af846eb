package cert

import (
	"context"
	"log/slog"
	"time"

	"google.golang.org/grpc/status"
)

// maxReasons bounds the different failures that are remembered as logged;
// beyond it only their number is told, when they are over.
const maxReasons = 64

// outage is a time in which the CA gives no certificates. A node has hundreds
// of identities that are tried again and again: each reason is one line, and
// so is the end. Guarded by Manager.mu.
type outage struct {
	since  time.Time
	count  int
	logged map[string]bool
}

func (o *outage) failed(log *slog.Logger, e *entry, wait time.Duration, now time.Time) {
	if o.since.IsZero() {
		o.since, o.logged = now, map[string]bool{}
	}
	o.count++
	reason := reasonOf(e.err)
	level := slog.LevelDebug
	if !o.logged[reason] && len(o.logged) < maxReasons {
		o.logged[reason] = true
		level = slog.LevelWarn
	}
	log.Log(context.Background(), level, "certificate not issued", "identity", e.id.String(), "retry_in", wait.Round(time.Millisecond).String(),
		"failing_since", e.failing.UTC().Format(time.RFC3339), "error", e.err.Error())
}

func (o *outage) over(log *slog.Logger, now time.Time) {
	if o.since.IsZero() {
		return
	}
	log.Info("certificates are issued again", "away", now.Sub(o.since).Round(time.Second).String(), "countrequests", o.count)
	*o = outage{}
}

// reasonOf is what tells failures apart: what the CA answered, without the
// wrapping that grows and shrinks. An answer that names the identity is another
// one for each, and is a line for each.
func reasonOf(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Code().String() + s.Message()
	}
	return err.Error()
}
