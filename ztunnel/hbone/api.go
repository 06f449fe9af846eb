package hbone

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ambit-mesh/ambit/xds/identity"
	"github.com/ambit-mesh/ambit/ztunnel/ledger"
)

// Key says which connects may share a tunnel. Two pods never do, whatever their service account: policy and the app
// see the pod's address, and NetworkPolicy is per pod.
type Key struct {
	Pod     string         // source pod: its uid or network namespace
	SrcAddr netip.Addr     // address the tunnel's socket is bound to
	Local   identity.ID    // who we are
	Peers   string         // who may answer: canonical, sorted, joined
	Addr    netip.AddrPort // where
	Gateway Gateway        // what Addr leads to in another network
}

// DialerConfig configures a Dialer. DialTransport and TLS are required.
type DialerConfig struct {
	// DialTransport opens the byte stream below TLS, in the source pod's network namespace. ctx carries the timeout.
	DialTransport func(ctx context.Context, k Key) (net.Conn, error)
	// TLS returns the client configuration, whose VerifyConnection decides whether the peer is one of k.Peers.
	TLS func(ctx context.Context, k Key) (*tls.Config, error)
	// GatewayHeader is sent with the outer CONNECT to the gateway of another network; nil: nothing.
	GatewayHeader func(k Key) []HeaderField
	// Account returns the pod's account in the ledger; nil means no limits. It must not call the Dialer.
	Account func(k Key) *ledger.Account

	// Opened is told of each tunnel once its handshake is done, and how to cut it; what it returns is called at its end.
	// Neither may block. nil: nobody asks.
	Opened func(state *tls.ConnectionState, cut func(error)) (ended func())

	Windows          Windows       // that peers get
	MaxStreams       int           // per tunnel, whatever more the peer allows; 100
	MaxTunnels       int           // per key, opened because others are busy; 4
	IdleTimeout      time.Duration // of a tunnel without streams; 5 min
	DialTimeout      time.Duration // TCP connect; 10 s
	HandshakeTimeout time.Duration // TLS and the peer's SETTINGS; 10 s
	ConnectTimeout   time.Duration // answer to CONNECT; 10 s

	// AmbitRecords protects records by ztunnel/record after the handshake, many per syscall, instead of by crypto/tls.
	// FIPS mode and cipher suites that it does not have keep crypto/tls whatever is asked here.
	AmbitRecords bool

	Logger     *slog.Logger          // nil: discard
	Registerer prometheus.Registerer // nil: not registered
}

// ConnectRequest is what a CONNECT asks.
type ConnectRequest struct {
	Authority string
	Header    []HeaderField
	// Elsewhere says whether the caller would turn to another peer now. It is asked only when this one is silent or gone:
	// then Connect gives up early, with a DialError that is Gone. nil: no, wait as long as ConnectTimeout.
	Elsewhere func() bool
	// Early returns the first bytes of the stream as far as they are there, at most EarlyLimit, without waiting: the same
	// ones each time. They may leave together with the request; a request that was sent with some is tried again, here or
	// by the caller, only after the peer's word that nobody has got them. nil: none.
	Early func() []byte
}

// ConnectResponse is the peer's answer.
type ConnectResponse struct {
	Status int
	Header Header
	// Peer is who answered; TLS is its verified connection.
	Peer identity.ID
	TLS  *tls.ConnectionState
	// LocalAddr and RemoteAddr are the tunnel's.
	LocalAddr, RemoteAddr netip.AddrPort
	// Reused says that the stream went into a tunnel that was there already.
	Reused bool
	// Early is how many of the request's first bytes are sent.
	Early int
}

// Handler serves one CONNECT. It runs on its own goroutine, owns the stream it accepts, and rejects by returning
// without having called Accept or Reject (503). What goes on after it has returned is told by Request.Keep.
type Handler func(ctx context.Context, r *Request)

// ServerConfig configures a Server. TLS and Handler are required.
type ServerConfig struct {
	// TLS returns the configuration for a connection to local. It must require and verify client certificates.
	TLS     func(ctx context.Context, local netip.AddrPort) (*tls.Config, error)
	Handler Handler
	// Account is the pod's account in the ledger; nil means no limits.
	Account *ledger.Account

	// HandshakesPerSource bounds the handshakes under way of one source address; more are reset at once, so that one
	// client's half-open ones cannot keep others out. 64, and 8 while the node is short of handshakes.
	HandshakesPerSource int

	// Opened is told of each tunnel once its handshake is done, and how to cut it; what it returns is called at its end.
	// Neither may block. nil: nobody asks.
	Opened func(state *tls.ConnectionState, cut func(error)) (ended func())

	Windows              Windows       // that peers get
	MaxConcurrentStreams int           // 200
	HandshakeTimeout     time.Duration // TLS, preface and SETTINGS together; 10 s
	MaxHeaderBytes       int           // of a decoded header list; 64 KiB

	// AmbitRecords protects records by ztunnel/record after the handshake, many per syscall, instead of by crypto/tls.
	// FIPS mode and cipher suites that it does not have keep crypto/tls whatever is asked here.
	AmbitRecords bool

	Logger     *slog.Logger          // nil: discard
	Registerer prometheus.Registerer // nil: not registered
}
