package cert

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/ambit-mesh/ambit/xds/api/ca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// CAConfig reaches the certificate API of the control plane.
type CAConfig struct {
	Target string // host:port
	// TLS is asked at each new connection, so a rotated root file counts.
	TLS       func() (*tls.Config, error)
	Token     func() (string, error) // read at each call: it is rotated on disk
	ClusterID string
	Headers   map[string]string // CA_HEADER_*
	// Direct asks for the caller's own identity: a proxy of one workload has
	// that workload's token and nobody to stand in for.
	Direct bool
}

// Client is an Authority over gRPC.
type Client struct {
	cfg  CAConfig
	conn *grpc.ClientConn
}

// NewClient returns a client; it connects when the first request needs it.
func NewClient(cfg CAConfig) (*Client, error) {
	conn, err := grpc.NewClient(cfg.Target,
		grpc.WithTransportCredentials(perDial{tls: cfg.TLS}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}))
	if err != nil {
		return nil, fmt.Errorf("CA channel to %s: %w", cfg.Target, err)
	}
	return &Client{cfg: cfg, conn: conn}, nil
}

// Close ends the channel.
func (c *Client) Close() error { return c.conn.Close() }

// Sign asks for id in the name of this node.
func (c *Client) Sign(ctx context.Context, id identity.ID, csrPEM string, ttl time.Duration) ([]string, error) {
	ctx, err := c.outgoing(ctx)
	if err != nil {
		return nil, err
	}
	var meta *structpb.Struct
	if !c.cfg.Direct {
		if meta, err = structpb.NewStruct(map[string]any{"ImpersonatedIdentity": id.String()}); err != nil {
			return nil, fmt.Errorf("certificate request for %s: %w", id, err)
		}
	}
	resp, err := ca.NewIstioCertificateServiceClient(c.conn).CreateCertificate(ctx,
		&ca.IstioCertificateRequest{Csr: csrPEM, ValidityDuration: int64(ttl.Seconds()), Metadata: meta})
	if err != nil {
		return nil, fmt.Errorf("CA %s: %w", c.cfg.Target, explain(err))
	}
	return resp.GetCertChain(), nil
}

// outgoing adds who asks. The token is read anew: it is rotated on disk.
func (c *Client) outgoing(ctx context.Context) (context.Context, error) {
	token, err := c.cfg.Token()
	if err != nil {
		return nil, fmt.Errorf("token for the CA: %w", err)
	}
	md := metadata.Pairs("authorization", "Bearer "+token, "clusterid", c.cfg.ClusterID)
	for k, v := range c.cfg.Headers {
		md.Set(k, v)
	}
	return metadata.NewOutgoingContext(ctx, md), nil
}

// explain adds what to do to the answers that an operator can act on.
func explain(err error) error {
	switch status.Code(err) {
	case codes.Unauthenticated, codes.PermissionDenied:
		return fmt.Errorf("%w (it must see a pod with this service account on this node, and a valid token of this node's ztunnel)", err)
	case codes.Unavailable:
		return fmt.Errorf("%w (is the control plane up, and is its root in CA_ROOT_CA?)", err)
	}
	return err
}

// perDial makes the TLS configuration anew for each connection.
type perDial struct {
	tls func() (*tls.Config, error)
}

func (p perDial) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := p.tls()
	if err != nil {
		return nil, nil, err
	}
	// gRPC's credentials expect the authority in the certificate, whatever name
	// the configuration has.
	if cfg.ServerName != "" {
		authority = cfg.ServerName
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, raw)
}

func (p perDial) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("BUG: client credentials used by a server")
}

func (p perDial) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
func (p perDial) Clone() credentials.TransportCredentials { return p }
func (p perDial) OverrideServerName(string) error         { return nil }
