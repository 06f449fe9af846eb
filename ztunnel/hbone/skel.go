package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
)

var errAbsent = errors.New("engine not linked in")

type Dialer struct{ cfg DialerConfig }

func NewDialer(cfg DialerConfig) *Dialer { return &Dialer{cfg: cfg} }
func (d *Dialer) Connect(ctx context.Context, k Key, r ConnectRequest) (*Stream, *ConnectResponse, error) {
	return nil, nil, errAbsent
}
func (d *Dialer) ClosePod(pod string)                {}
func (d *Dialer) CloseMatching(match func(Key) bool) {}
func (d *Dialer) Shutdown(ctx context.Context) error { return nil }
func (d *Dialer) Close() error                       { return nil }

type Server struct{ cfg ServerConfig }

func NewServer(cfg ServerConfig) *Server                          { return &Server{cfg: cfg} }
func (s *Server) ServeConn(ctx context.Context, c net.Conn) error { return errAbsent }
func (s *Server) Shutdown(ctx context.Context) error              { return nil }
func (s *Server) Close() error                                    { return nil }

type Request struct {
	Method, Authority     string
	Headers               Header
	Peer                  identity.ID
	TLS                   *tls.ConnectionState
	RemoteAddr, LocalAddr netip.AddrPort
}

func (r *Request) Header(name string) string                     { return r.Headers.Get(name) }
func (r *Request) Accept(header ...HeaderField) (*Stream, error) { return nil, errAbsent }
func (r *Request) Reject(status int, header ...HeaderField)      {}

type Stream struct{}

func (s *Stream) Read(p []byte) (int, error)                      { return 0, io.EOF }
func (s *Stream) Write(p []byte) (int, error)                     { return 0, errAbsent }
func (s *Stream) Close() error                                    { return nil }
func (s *Stream) CloseWrite() error                               { return nil }
func (s *Stream) Reset() error                                    { return nil }
func (s *Stream) LocalAddr() net.Addr                             { return nil }
func (s *Stream) RemoteAddr() net.Addr                            { return nil }
func (s *Stream) SetDeadline(t time.Time) error                   { return nil }
func (s *Stream) SetReadDeadline(t time.Time) error               { return nil }
func (s *Stream) SetWriteDeadline(t time.Time) error              { return nil }
func (s *Stream) RelayFrom(src io.Reader, n *atomic.Uint64) error { return nil }
func (s *Stream) RelayTo(dst io.Writer, n *atomic.Uint64) error   { return nil }
