package handoff

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"time"

	"github.com/ambit-mesh/ambit/xds/api/zds"
)

const (
	dialBackoffMin = 10 * time.Millisecond
	dialBackoffMax = 15 * time.Second
)

// Handler is the proxy's side of the hand-off. Calls come one at a time.
type Handler interface {
	// AddPod starts serving p, or replaces the pod of the same UID if its
	// namespace is another one. It owns p.NS if it returns nil. An error is
	// sent to the agent, which tries again.
	AddPod(ctx context.Context, p Pod) error
	// DelPod stops serving the pod. An unknown UID is no error.
	DelPod(uid string) error
	// SnapshotDone ends the agent's list after each (re)connect: pods whose UID
	// is not in known are gone and must be drained.
	SnapshotDone(known []string)
}

// ClientConfig is the proxy's side of the protocol.
type ClientConfig struct {
	Path    string // the agent's socket
	Handler Handler
	Logger  *slog.Logger // nil: none

	// Disconnected is called when a connection ended, before the next attempt.
	// Pods stay served meanwhile.
	Disconnected func(error)
}

// Client receives pods from the agent.
type Client struct {
	cfg       ClientConfig
	connected atomic.Bool
}

// NewClient returns a Client that does nothing until Run.
func NewClient(cfg ClientConfig) *Client {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Client{cfg: cfg}
}

// Connected reports whether the agent is connected and its snapshot complete.
func (c *Client) Connected() bool { return c.connected.Load() }

// Run follows the agent until ctx ends, reconnecting with jittered backoff. No
// fault of the agent's ends it.
func (c *Client) Run(ctx context.Context) error {
	backoff := dialBackoffMin
	for {
		snapshot, err := c.connect(ctx)
		c.connected.Store(false)
		if ctx.Err() != nil {
			return nil
		}
		if snapshot {
			backoff = dialBackoffMin // it worked for a while
		}
		if c.cfg.Disconnected != nil {
			c.cfg.Disconnected(err)
		}
		wait := backoff/2 + rand.N(backoff) // ±50 %
		c.cfg.Logger.Warn("agent connection ended", "path", c.cfg.Path, "err", err, "retry_in", wait)
		backoff = min(2*backoff, dialBackoffMax)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// connect serves one connection and reports whether the agent's snapshot came through.
func (c *Client) connect(ctx context.Context) (snapshot bool, err error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unixpacket", c.cfg.Path)
	if err != nil {
		return false, fmt.Errorf("dial agent: %w", err)
	}
	uc := nc.(*net.UnixConn)
	defer uc.Close()
	stop := context.AfterFunc(ctx, func() { _ = uc.Close() })
	defer stop()
	s := &session{client: c, conn: uc, known: []string{}}
	err = s.run(ctx)
	return s.synced, err
}

// session is one connection. Owned by Run's goroutine.
type session struct {
	client *Client
	conn   *net.UnixConn
	known  []string // named before SnapshotSent
	synced bool
}

func (s *session) run(ctx context.Context) error {
	hello := &zds.ZdsHello{Version: zds.Version_V1}
	if err := writeMessage(s.conn, hello, nil); err != nil {
		return fmt.Errorf("send hello: %w", err)
	}
	s.client.cfg.Logger.Info("connected to agent", "path", s.client.cfg.Path)
	buf := newPacketBuffer()
	for {
		req, fds, err := buf.readRequest(s.conn)
		if err == nil {
			err = s.handle(ctx, req, fds)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		perr, isProtocol := errors.AsType[*ProtocolError](err)
		rerr, isRejected := errors.AsType[*RejectedError](err)
		ack := &zds.Ack{}
		switch {
		case err == nil:
		case isProtocol:
			ack.Error = perr.Error()
		case isRejected:
			ack.Error = rerr.Reason
		default:
			return err
		}
		if werr := writeMessage(s.conn, response(ack), nil); werr != nil {
			return errors.Join(err, fmt.Errorf("send ack: %w", werr))
		}
		if isProtocol {
			return err
		}
	}
}

// handle answers one message. It owns fds.
func (s *session) handle(ctx context.Context, req *zds.WorkloadRequest, fds []int) error {
	add := req.GetAdd()
	if add == nil && len(fds) > 0 {
		closeAll(fds)
		return protocolErrorf("%d descriptors came with %T, want none", len(fds), req.GetPayload())
	}
	switch p := req.GetPayload().(type) {
	case *zds.WorkloadRequest_Add:
		return s.add(ctx, add, fds)
	case *zds.WorkloadRequest_Keep:
		if s.synced {
			return protocolErrorf("keep of pod %q after the snapshot", p.Keep.GetUid())
		}
		if p.Keep.GetUid() == "" {
			return protocolErrorf("keep without a uid")
		}
		s.known = append(s.known, p.Keep.GetUid())
		return nil
	case *zds.WorkloadRequest_Del:
		if p.Del.GetUid() == "" {
			return protocolErrorf("del without a uid")
		}
		if err := s.client.cfg.Handler.DelPod(p.Del.GetUid()); err != nil {
			return &RejectedError{Reason: err.Error()}
		}
		return nil
	case *zds.WorkloadRequest_SnapshotSent:
		if s.synced {
			return protocolErrorf("second end of snapshot")
		}
		s.client.cfg.Handler.SnapshotDone(s.known)
		s.known, s.synced = nil, true
		s.client.connected.Store(true)
		return nil
	default:
		return protocolErrorf("message of unknown kind")
	}
}
