package lease

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"time"

	wire "github.com/ambit-mesh/ambit/xds/api/lease"
)

const (
	dialBackoffMin = 50 * time.Millisecond
	dialBackoffMax = 15 * time.Second
	// answerTimeout is when an agent that does not answer counts as gone: the
	// kernel's work is some microseconds, times the connections to be destroyed.
	answerTimeout = 5 * time.Second
)

// ClientConfig is the proxy's side. Calls come one at a time, from Run's goroutines.
type ClientConfig struct {
	Path   string
	Events Events
	// Connected is told of an agent that is there, which knows nothing of what was
	// granted before; and Disconnected of its end.
	Connected    func()
	Disconnected func()
	Logger       *slog.Logger // nil: none
}

// Client asks the agent for leases. Its methods may be called by any goroutine.
type Client struct {
	cfg ClientConfig

	mu   sync.Mutex // one request at a time
	conn *net.UnixConn
	ansc chan *wire.Answer
	lost chan struct{} // closed with the connection
}

// NewClient returns a Client that does nothing until Run.
func NewClient(cfg ClientConfig) *Client {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Client{cfg: cfg}
}

// Run follows the agent until ctx ends. An agent that grants no leases, as the
// reference's, has no such socket: that is looked for again now and then.
func (c *Client) Run(ctx context.Context) error {
	backoff := dialBackoffMin
	for {
		served, err := c.connect(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if served {
			backoff = dialBackoffMin
		}
		if absent := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED); !absent {
			c.cfg.Logger.Warn("lease connection to the agent ended", "path", c.cfg.Path, "err", err)
		}
		wait := backoff/2 + rand.N(backoff) // ±50 %
		backoff = min(2*backoff, dialBackoffMax)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

func (c *Client) connect(ctx context.Context) (served bool, err error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unixpacket", c.cfg.Path)
	if err != nil {
		return false, fmt.Errorf("dial agent: %w", err)
	}
	uc := nc.(*net.UnixConn)
	defer uc.Close()
	stop := context.AfterFunc(ctx, func() { _ = uc.Close() })
	defer stop()
	ansc, lost := make(chan *wire.Answer, 1), make(chan struct{})
	c.mu.Lock()
	c.conn, c.ansc, c.lost = uc, ansc, lost
	c.mu.Unlock()
	c.cfg.Connected()
	defer func() {
		close(lost)
		c.mu.Lock()
		c.conn = nil
		c.mu.Unlock()
		c.cfg.Disconnected()
	}()
	buf := make([]byte, maxMessage)
	for {
		ev := &wire.Event{}
		if err := read(uc, buf, ev); err != nil {
			return served, err
		}
		served = true
		switch p := ev.GetPayload().(type) {
		case *wire.Event_Answer:
			select {
			case ansc <- p.Answer:
			default:
				return served, &ProtocolError{"answer to nothing"}
			}
		case *wire.Event_Opened:
			o, err := openedOf(p.Opened)
			if err != nil {
				return served, err
			}
			c.cfg.Events.Opened(o)
		case *wire.Event_Closed:
			c.cfg.Events.Closed(closedOf(p.Closed))
		default:
			return served, &ProtocolError{"message of unknown kind"}
		}
	}
}

// Grant asks for a lease, or changes or ends one: *RefusedError if the agent will
// not have it.
func (c *Client) Grant(g Grant) error { return c.ask(g.message()) }

// Renew makes all leases hold TTL longer.
func (c *Client) Renew() error {
	return c.ask(&wire.Request{Payload: &wire.Request_Renew{Renew: &wire.Renew{}}})
}

// Cut ends a connection.
func (c *Client) Cut(conn uint64) error {
	return c.ask(&wire.Request{Payload: &wire.Request_Cut{Cut: &wire.Cut{Connection: conn}}})
}

// ask sends one request and waits for its answer. A connection without an answer
// in time is given up, since a late one would be taken for the next one's.
func (c *Client) ask(req *wire.Request) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return ErrNoAgent
	}
	_ = c.conn.SetWriteDeadline(time.Now().Add(answerTimeout)) // fails only when closed; the write says so
	if err := write(c.conn, req); err != nil {
		_ = c.conn.Close() // Run connects again
		return fmt.Errorf("ask the agent: %w", err)
	}
	timer := time.NewTimer(answerTimeout)
	defer timer.Stop()
	select {
	case a := <-c.ansc:
		switch {
		case a.GetError() == "":
			return nil
		case a.GetRefused():
			return &RefusedError{Reason: a.GetError()}
		}
		return errors.New(a.GetError())
	case <-c.lost:
		return ErrNoAgent
	case <-timer.C:
		_ = c.conn.Close() // as above
		return fmt.Errorf("the agent has not answered for %v", answerTimeout)
	}
}
