package load

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"time"
)

// Hop is one relay of connections: plain TCP on both sides, or TLS on one. It is
// as good as a simple Go program gets, and what a proxy has to be compared with.
type Hop struct {
	Listen string `json:"listen"`
	To     string `json:"to"` // "": it answers by itself
	TLSIn  bool   `json:"tlsIn,omitempty"`
	TLSOut bool   `json:"tlsOut,omitempty"`
	Pair   *Pair  `json:"pair,omitempty"` // for TLS
}

// Pair is the certificate, key and root that two hops share, DER.
type Pair struct {
	Cert []byte `json:"cert"`
	Key  []byte `json:"key"`
}

// Client is who a load that makes handshakes itself is, for a hop with TLSIn.
func (p *Pair) Client() *Client {
	return &Client{Chain: [][]byte{p.Cert}, Key: p.Key, Roots: [][]byte{p.Cert}, Name: hopName}
}

// Started is the line that a hop or a server prints when it listens.
type Started struct {
	PID  int    `json:"pid"` // in the process's own namespace
	Addr string `json:"addr"`
}

// hopName is in the certificate.
const hopName = "hop.perf"

// NewPair makes a key and a certificate that vouches for itself.
func NewPair() (*Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of hops: %w", err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{hopName}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make certificate of hops: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key of hops: %w", err)
	}
	return &Pair{cert, der}, nil
}

// config verifies both ends, as a mesh does. No session is resumed: whoever makes
// a connection per request pays the handshake.
func (p *Pair) config() (*tls.Config, error) {
	if p == nil {
		return nil, errors.New("a hop with TLS wants a certificate")
	}
	cert, err := x509.ParseCertificate(p.Cert)
	if err != nil {
		return nil, fmt.Errorf("read certificate of hop: %w", err)
	}
	key, err := x509.ParsePKCS8PrivateKey(p.Key)
	if err != nil {
		return nil, fmt.Errorf("read key of hop: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{p.Cert}, PrivateKey: key, Leaf: cert}},
		RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, ServerName: hopName,
		SessionTicketsDisabled: true, DynamicRecordSizingDisabled: true,
	}, nil
}

// Run relays until ctx ends. It first writes a line that says where it listens.
func (h Hop) Run(ctx context.Context, out io.Writer) error {
	var cfg *tls.Config
	if h.TLSIn || h.TLSOut {
		var err error
		if cfg, err = h.Pair.config(); err != nil {
			return err
		}
	}
	ln, err := listen(ctx, h.Listen)
	if err != nil {
		return err
	}
	defer ln.Close()
	if err := json.NewEncoder(out).Encode(Started{os.Getpid(), ln.Addr().String()}); err != nil {
		return err
	}
	return acceptLoop(ctx, ln, func(c *net.TCPConn) error { return h.relay(ctx, c, cfg) })
}

// stream is what both kinds of connection have.
type stream interface {
	net.Conn
	CloseWrite() error
}

func (h Hop) relay(ctx context.Context, c *net.TCPConn, cfg *tls.Config) error {
	if h.To == "" && h.TLSIn {
		return answer(tls.Server(c, cfg), nil, nil)
	}
	d := net.Dialer{Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	conn, err := d.DialContext(ctx, "tcp", h.To)
	if err != nil {
		return err
	}
	defer conn.Close()
	var in, to stream = c, conn.(*net.TCPConn) // the network is tcp
	if h.TLSIn {
		in = tls.Server(c, cfg)
	}
	if h.TLSOut {
		to = tls.Client(conn, cfg)
	}
	donec := make(chan error, 1)
	go func() { donec <- h.pump(to, in) }()
	err = h.pump(in, to)
	return errors.Join(err, <-donec)
}

// tlsBuffer is the buffer of a hop with TLS, per direction.
const tlsBuffer = 64 << 10

// pump copies one direction: the kernel does it (splice) where both sides are TCP.
// A direction that fails ends the other.
func (h Hop) pump(to, from stream) error {
	var err error
	if h.TLSIn || h.TLSOut {
		_, err = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, tlsBuffer))
	} else {
		_, err = io.Copy(to, from)
	}
	if err != nil {
		return errors.Join(err, to.Close(), from.Close())
	}
	return to.CloseWrite()
}
