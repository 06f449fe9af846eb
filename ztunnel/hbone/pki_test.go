package hbone

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/sockets"
	"github.com/ambit-mesh/ambit/xds/identity"
)

var (
	clientID = identity.MustParse("spiffe://cluster.local/ns/a/sa/client")
	serverID = identity.MustParse("spiffe://cluster.local/ns/b/sa/server")
)

// testPKI makes one CA and one leaf per side, once: handshakes are tested, issuing is not.
var testPKI = sync.OnceValue(func() *pki { return newPKI() })

type pki struct {
	roots          *x509.CertPool
	client, server tls.Certificate
}

func newPKI() *pki {
	now := time.Date(1999, 12, 1, 0, 0, 0, 0, time.UTC) // synctest bubbles begin in 2000
	end := time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test root"}, NotBefore: now, NotAfter: end, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der := must(x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key))
	ca = must(x509.ParseCertificate(der))
	p := &pki{roots: x509.NewCertPool()}
	p.roots.AddCert(ca)
	leaf := func(id identity.ID, serial int64) tls.Certificate {
		k := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		c := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: now, NotAfter: end, KeyUsage: x509.KeyUsageDigitalSignature}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
		c.URIs = append(c.URIs, id.URL())
		der := must(x509.CreateCertificate(rand.Reader, c, ca, k.Public(), key))
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k, Leaf: must(x509.ParseCertificate(der))}
	}
	p.client, p.server = leaf(clientID, 2), leaf(serverID, 3)
	return p
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (p *pki) serverConfig() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{p.server}, ClientCAs: p.roots, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, SessionTicketsDisabled: true, CurvePreferences: []tls.CurveID{tls.X25519},
		DynamicRecordSizingDisabled: true,
	}
}

func (p *pki) clientConfig() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{p.client}, InsecureSkipVerify: true, // the name is a SPIFFE ID: VerifyConnection checks it
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: p.roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		},
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, CurvePreferences: []tls.CurveID{tls.X25519},
		DynamicRecordSizingDisabled: true,
	}
}

// mesh is a server and a dialer to it.
type mesh struct {
	*Dialer
	srv  *Server
	key  Key
	wg   sync.WaitGroup
	dial func(ctx context.Context) (net.Conn, net.Conn, error)
	mu   sync.Mutex
	n    int // connections dialled
}

type meshConfig struct {
	Dialer  DialerConfig
	Server  ServerConfig
	Handler Handler
	// Dial returns both ends of a transport.
	Dial func(ctx context.Context) (client, server net.Conn, err error)
}

func newMesh(tb testing.TB, cfg meshConfig) *mesh {
	p := testPKI()
	m := &mesh{dial: cfg.Dial}
	cfg.Dialer.AmbitRecords, cfg.Server.AmbitRecords = ambitLayer, ambitLayer
	m.key = Key{Pod: "pod-a", Local: clientID, Peers: serverID.String(), Addr: netip.MustParseAddrPort("192.0.2.2:15008")}
	cfg.Server.Handler = cfg.Handler
	cfg.Server.TLS = func(context.Context, netip.AddrPort) (*tls.Config, error) { return p.serverConfig(), nil }
	m.srv = NewServer(cfg.Server)
	cfg.Dialer.TLS = func(context.Context, Key) (*tls.Config, error) { return p.clientConfig(), nil }
	cfg.Dialer.DialTransport = func(ctx context.Context, k Key) (net.Conn, error) {
		c, s, err := m.dial(ctx)
		if err != nil {
			return nil, err
		}
		m.mu.Lock()
		m.n++
		m.mu.Unlock()
		m.wg.Add(1)
		go func() {
			defer m.wg.Done()
			_ = m.srv.ServeConn(context.Background(), s)
		}()
		return c, nil
	}
	m.Dialer = NewDialer(cfg.Dialer)
	tb.Cleanup(m.close)
	return m
}

func (m *mesh) close() {
	_ = m.Dialer.Close()
	_ = m.srv.Close()
	m.wg.Wait()
}

func (m *mesh) dialled() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.n
}

var tcpPair = sockets.Open
