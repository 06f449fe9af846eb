package attach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

// ErrAway reports that no agent answered: none listens, or it ended meanwhile.
var ErrAway = errors.New("the node agent does not answer")

// Client asks the agent. Its methods may be called from any goroutine.
type Client struct {
	Path string
	// Dial replaces the socket in tests.
	Dial func(ctx context.Context) (net.Conn, error)
}

// answerMargin is how much longer than the agent the plugin waits for a pod, so that
// it is the agent's sentence that the plugin reports.
const answerMargin = 2 * time.Second

// Ask sends r and returns the answer. A refusal is an error of type *Refusal; an
// agent that is not there is ErrAway. The request tells the agent how long ctx
// allows it to wait.
func (c Client) Ask(ctx context.Context, r Request) (Answer, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return Answer{}, fmt.Errorf("%w: %w", ErrAway, err)
	}
	defer func() { _ = conn.Close() }() // the answer is read, or there is none
	stop := context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.Canceled) { // at the deadline the answer is on its way
			_ = conn.Close()
		}
	})
	defer stop()
	if end, ok := ctx.Deadline(); ok {
		r.Deadline = end
		if r.Command == Add || r.Command == Check {
			end = end.Add(answerMargin)
		}
		if err := conn.SetDeadline(end); err != nil {
			return Answer{}, fmt.Errorf("ask the node agent: %w", err)
		}
	}
	if err := write(conn, r); err != nil {
		return Answer{}, fmt.Errorf("%w: %w", ErrAway, err)
	}
	var a Answer
	if err := read(conn, &a); err != nil {
		if errors.Is(err, ErrProtocol) {
			return Answer{}, fmt.Errorf("read the node agent's answer: %w", err)
		}
		return Answer{}, fmt.Errorf("%w: %w", ErrAway, err)
	}
	if a.Refusal != nil {
		return a, a.Refusal
	}
	return a, nil
}

func (c Client) dial(ctx context.Context) (net.Conn, error) {
	if c.Dial != nil {
		return c.Dial(ctx)
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", c.Path)
}
