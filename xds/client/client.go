// Package client subscribes to resources with delta xDS: it keeps one stream
// to the control plane, applies what comes, acknowledges or refuses it, and
// resumes after a reconnect without receiving again what it has.
//
//	Run → dial → subscribe each type → receive → Handler.Apply → ACK or NACK
//
// Run owns everything. Handler is called on its goroutine, one delta at a
// time; a second goroutine per stream only receives.
package client

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

const (
	minBackoff = 10 * time.Millisecond
	maxBackoff = 15 * time.Second
)

// Resource is one added or changed resource, still encoded. Its value is valid until Apply returns.
type Resource struct {
	Name, Version string
	Aliases       []string // of the type on demand
	TypeURL       string   // of Value
	Value         []byte   // must not be changed
}

// Delta is one response of the control plane. Its lists are valid until Apply returns.
type Delta struct {
	Type    string
	Added   []Resource
	Removed []string
	// First says that this is the first response of the type on any stream.
	First bool
}

// Reject says that a resource was not applied, and why.
type Reject struct{ Name, Reason string }

// Handler applies deltas. What it does not reject is in force when Apply
// returns; of what it rejects, the version before stays in force.
type Handler interface {
	Apply(Delta) []Reject
}

// Config of a Client. Target, TLS, Types and Handler are required.
type Config struct {
	Target     string                      // host:port
	ServerName string                      // expected in the certificate instead of Target's host
	TLS        func() (*tls.Config, error) // called for each connection, so that new roots count
	Token      func() (string, error)      // called for each stream; nil sends none
	Headers    map[string]string           // further headers of each call
	ClusterID  string
	Node       *discovery.Node
	Types      []string // type URLs, subscribed in this order
	Handler    Handler
	// OnDemand is the one of Types of which nothing is subscribed to but what
	// Demand asks for; "" for none. Has reports whether the handler knows what a
	// key means: a resource name or an alias.
	OnDemand   string
	Has        func(key string) bool
	Synced     func() // called once, when a first response of each type was applied
	Much       func() // called after each few hundred KiB of responses, whose memory is not in use any more
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// Dial replaces the TCP dialer.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
}

func (c Config) withDefaults() Config {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Synced == nil {
		c.Synced = func() {}
	}
	if c.Much == nil {
		c.Much = func() {}
	}
	if c.Node == nil {
		c.Node = &discovery.Node{}
	}
	if c.Dial == nil {
		d := net.Dialer{
			Timeout:         5 * time.Second,
			KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 300 * time.Second, Interval: 75 * time.Second, Count: 9},
		}
		c.Dial = func(ctx context.Context, addr string) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }
	}
	return c
}

func (c Config) validate() error {
	var errs []error
	if c.Target == "" {
		errs = append(errs, errors.New("xds client: target is empty; set the control plane's host:port"))
	} else if _, _, err := net.SplitHostPort(c.Target); err != nil {
		errs = append(errs, errors.New("xds client: target "+c.Target+" is not host:port"))
	}
	if c.TLS == nil {
		errs = append(errs, errors.New("xds client: TLS is not set"))
	}
	if c.OnDemand != "" && (c.Has == nil || !slices.Contains(c.Types, c.OnDemand)) {
		errs = append(errs, errors.New("xds client: the type on demand is not among the types, or Has is not set"))
	}
	if len(c.Types) == 0 || c.Handler == nil {
		errs = append(errs, errors.New("xds client: no types or no handler to subscribe for"))
	}
	return errors.Join(errs...)
}

// Client is a subscription to a control plane.
type Client struct {
	cfg     Config
	metrics *metrics
	demands *demands // nil without a type on demand

	// owned by Run
	types  map[string]*subscription
	synced bool
	taken  int // bytes since Much
}

// New checks the configuration.
func New(cfg Config) (*Client, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	c := &Client{cfg: cfg, metrics: newMetrics(cfg.Registerer), types: map[string]*subscription{}}
	if cfg.OnDemand != "" {
		c.demands = newDemands(cfg.Has)
	}
	for _, t := range cfg.Types {
		c.types[t] = newSubscription(t)
		if t == cfg.OnDemand {
			c.types[t].demands = c.demands
		}
	}
	return c, nil
}

// jittered spreads the proxies of a control plane that restarts.
func jittered(d time.Duration) time.Duration { return d/2 + rand.N(d/2) }

// Run keeps the subscription until ctx ends and returns its cause. While the
// control plane is away, everything applied stays in force.
func (c *Client) Run(ctx context.Context) error {
	backoff := minBackoff
	var away time.Time
	for {
		heard, err := c.session(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if heard {
			backoff, away = minBackoff, time.Time{}
		}
		if away.IsZero() {
			away = time.Now()
		}
		c.metrics.terminated(err)
		// Spread over half of the time, so that the proxies of a mesh do not
		// return together after a restart of the control plane.
		wait := jittered(backoff)
		level := slog.LevelWarn
		if heard {
			level = slog.LevelInfo // streams end now and then: limits of age, restarts
		}
		c.cfg.Logger.Log(ctx, level, "xds stream ended", "server", c.cfg.Target, "err", err,
			"retry_in", wait, "away_since", away.UTC().Format(time.RFC3339))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// markSynced notes that a type was applied for the first time.
func (c *Client) markSynced() {
	if c.synced {
		return
	}
	for _, s := range c.types {
		if !s.applied && s.demands == nil { // on demand there may be no first answer
			return
		}
	}
	c.synced = true
	c.cfg.Synced()
}
