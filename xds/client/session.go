package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"

	"github.com/ambit-mesh/ambit/xds/api/discovery"
	"github.com/ambit-mesh/ambit/xds/turn"
)

const (
	maxReceive     = 200 << 20
	connectTimeout = 5 * time.Second
	// Arbitrary: a message for people, not a list for machines.
	maxNackMessage = 4096
)

// session is one connection with one stream; it reports whether the server
// answered at all.
func (c *Client) session(ctx context.Context) (heard bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := c.connect()
	if err != nil {
		return false, err
	}
	defer conn.Close()
	ctx, err = c.withHeaders(ctx)
	if err != nil {
		return false, err
	}
	opened, err := conn.NewStream(ctx, &discovery.AggregatedDiscoveryService_ServiceDesc.Streams[0],
		discovery.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName, grpc.ForceCodecV2(codec{}))
	if err != nil {
		return false, fmt.Errorf("open xds stream to %s: %w", c.cfg.Target, err)
	}
	stream := &grpc.GenericClientStream[discovery.DeltaDiscoveryRequest, response]{ClientStream: opened}
	for _, t := range c.cfg.Types {
		req := c.types[t].begin(c.cfg.Node)
		if err := stream.Send(req); err != nil {
			return false, fmt.Errorf("subscribe %s: %w", t, streamError(stream, err))
		}
		c.metrics.sent(t)
		for names := range slices.Chunk(c.types[t].rest, maxDemandBatch) {
			if err := c.send(stream, &discovery.DeltaDiscoveryRequest{TypeUrl: t, ResourceNamesSubscribe: names}); err != nil {
				return false, err
			}
		}
	}
	r := receiver{stream: stream, responses: make(chan *response), donec: make(chan struct{})}
	go r.loop(ctx)
	defer func() { cancel(); <-r.donec }()
	heard, err = c.serve(ctx, stream, &r)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %w", err, r.cause())
	}
	return heard, err
}

func (c *Client) connect() (*grpc.ClientConn, error) {
	conf, err := c.cfg.TLS()
	if err != nil {
		return nil, fmt.Errorf("build TLS configuration for %s: %w", c.cfg.Target, err)
	}
	conf = conf.Clone()
	host, _, err := net.SplitHostPort(c.cfg.Target)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", c.cfg.Target, err)
	}
	if c.cfg.ServerName != "" {
		host = c.cfg.ServerName
	}
	if conf.ServerName == "" {
		conf.ServerName = host
	}
	conf.MinVersion = max(conf.MinVersion, tls.VersionTLS12)
	conn, err := grpc.NewClient("passthrough:///"+c.cfg.Target,
		grpc.WithTransportCredentials(credentials.NewTLS(conf)),
		grpc.WithContextDialer(c.cfg.Dial),
		grpc.WithNoProxy(), // the control plane is inside the cluster
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: connectTimeout}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceive)),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", c.cfg.Target, err)
	}
	return conn, nil
}

// withHeaders: the token is read anew, since it is rotated on disk.
func (c *Client) withHeaders(ctx context.Context) (context.Context, error) {
	md := metadata.MD{}
	for k, v := range c.cfg.Headers {
		md.Set(k, v)
	}
	if c.cfg.ClusterID != "" {
		md.Set("clusterid", c.cfg.ClusterID)
	}
	if c.cfg.Token != nil {
		token, err := c.cfg.Token()
		if err != nil {
			return nil, fmt.Errorf("read token for %s: %w", c.cfg.Target, err)
		}
		md.Set("authorization", "Bearer "+strings.TrimSpace(token))
	}
	return metadata.NewOutgoingContext(ctx, md), nil
}

type deltaStream = grpc.BidiStreamingClient[discovery.DeltaDiscoveryRequest, response]

// streamError: a failed Send only says io.EOF, the cause is with Recv. Only for
// who receives nothing else from the stream: the end of a stream is told once,
// and a second Recv after it waits for ever, whatever becomes of the context.
func streamError(stream deltaStream, err error) error {
	if _, cause := stream.Recv(); cause != nil {
		return cause
	}
	return err
}

// receiver hands responses to serve one by one, so that the server is not
// read faster than deltas are applied.
type receiver struct {
	stream    deltaStream
	responses chan *response
	err       error // valid when donec is closed
	donec     chan struct{}
}

// cause is why the stream ended, after a Send that failed.
func (r *receiver) cause() error {
	for {
		select {
		case <-r.responses: // too late: the next session resumes from what was applied
		case <-r.donec:
			return r.err
		}
	}
}

func (r *receiver) loop(ctx context.Context) {
	defer close(r.donec)
	for {
		resp, err := r.stream.Recv()
		if err != nil {
			r.err = err
			return
		}
		select {
		case r.responses <- resp:
		case <-ctx.Done():
			r.err = ctx.Err()
			return
		}
	}
}

func (c *Client) serve(ctx context.Context, stream deltaStream, r *receiver) (heard bool, err error) {
	sweep := time.NewTicker(confirmAfter / 2)
	defer sweep.Stop()
	var demanded <-chan struct{}
	if c.demands != nil {
		demanded = c.demands.wakec
	}
	for {
		select {
		case resp := <-r.responses:
			heard = true
			if err := c.handle(stream, resp); err != nil {
				return heard, err
			}
		case <-demanded:
			if err := c.send(stream, c.demands.next(c.cfg.OnDemand)); err != nil {
				return heard, err
			}
		case now := <-sweep.C:
			if c.demands != nil {
				if err := c.send(stream, c.demands.expire(now, c.cfg.OnDemand)); err != nil {
					return heard, err
				}
			}
			for _, s := range c.types {
				s.sweep(now, c.cfg.Handler)
			}
		case <-r.donec:
			return heard, fmt.Errorf("receive from %s: %w", c.cfg.Target, r.err)
		case <-ctx.Done():
			return heard, context.Cause(ctx)
		}
	}
}

// send sends a request, if there is one.
func (c *Client) send(stream deltaStream, req *discovery.DeltaDiscoveryRequest) error {
	if req == nil {
		return nil
	}
	if err := stream.Send(req); err != nil {
		return fmt.Errorf("subscribe %s: %w", req.TypeUrl, err)
	}
	c.metrics.sent(req.TypeUrl)
	return nil
}

// much is after how many bytes of responses Much is called.
const much = 256 << 10

// handle applies a response and answers it.
func (c *Client) handle(stream deltaStream, resp *response) error {
	size := resp.size()
	defer func() {
		resp.free()
		if c.taken += size; c.taken >= much {
			c.taken = 0
			c.cfg.Much()
		}
	}()
	var others turn.Taker
	h, err := resp.head(&others)
	if err != nil {
		return err
	}
	s := c.types[h.typeURL]
	if s == nil {
		c.cfg.Logger.Warn("xds response of a type that was not asked for", "type", h.typeURL)
		return nil
	}
	c.metrics.received(s.typeURL, resp.size())
	d, err := s.take(resp, h, &others)
	if err != nil {
		return err
	}
	rejects := s.apply(d, c.cfg.Handler, &others)
	s.done(d)
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: s.typeURL, ResponseNonce: h.nonce}
	if len(rejects) > 0 {
		req.ErrorDetail = &discovery.Status{Code: 3 /* INVALID_ARGUMENT */, Message: nackMessage(rejects)}
		c.cfg.Logger.Warn("xds resources refused; the version before stays in force", "type", s.typeURL,
			"refused", len(rejects), "err", req.ErrorDetail.GetMessage())
	}
	c.metrics.applied(s.typeURL, len(rejects))
	if err := stream.Send(req); err != nil {
		return fmt.Errorf("answer %s: %w", s.typeURL, err)
	}
	c.metrics.sent(s.typeURL)
	c.markSynced()
	return nil
}

func nackMessage(rejects []Reject) string {
	var b strings.Builder
	for i, r := range rejects {
		if b.Len() > maxNackMessage {
			fmt.Fprintf(&b, "; and %d more", len(rejects)-i)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(r.Name + ": " + r.Reason)
	}
	return strings.ToValidUTF8(b.String(), "?") // a protobuf string must be UTF-8
}
