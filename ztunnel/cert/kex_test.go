package cert

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// Two nodes of a mesh need not be set up alike: what they agree on is the least
// that both take, and nothing less.
func TestVersionsAndKeyExchange(t *testing.T) {
	ca := &fakeCA{t: t, ca: meshca.New(t, "cluster.local"), life: time.Hour}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	manager := func(c Config) *Manager {
		c.Authority = ca
		m := New(c)
		donec := make(chan error, 1)
		go func() { donec <- m.Run(ctx) }()
		t.Cleanup(func() { stop(); <-donec })
		return m
	}
	plain, old, pqc := manager(Config{}), manager(Config{TLS12: true}), manager(Config{PostQuantum: true})
	// A client of before, or the reference's.
	noHybrid := func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP256, tls.CurveP384} }
	onlyP256 := func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} }
	only12 := func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }
	for _, tt := range []struct {
		name           string
		client, server *Manager
		bendClient     func(*tls.Config)
		bendServer     func(*tls.Config)
		version        uint16 // 0: refused
		curve          tls.CurveID
	}{
		{"both plain", plain, plain, nil, nil, tls.VersionTLS13, tls.X25519MLKEM768},
		{"plain client, server without the hybrid", plain, plain, nil, noHybrid, tls.VersionTLS13, tls.X25519},
		{"client without the hybrid, plain server", plain, plain, noHybrid, nil, tls.VersionTLS13, tls.X25519},
		{"client without either, plain server", plain, plain, onlyP256, nil, tls.VersionTLS13, tls.CurveP256},
		{"plain client, server without either", plain, plain, nil, onlyP256, tls.VersionTLS13, tls.CurveP256},
		{"old server", plain, old, nil, nil, tls.VersionTLS13, tls.X25519MLKEM768},
		{"old both", old, old, nil, nil, tls.VersionTLS13, tls.X25519MLKEM768},
		{"1.2 client, old server", old, old, only12, nil, tls.VersionTLS12, tls.X25519},
		{"1.2 client, plain server", old, plain, only12, nil, 0, 0},
		{"both pqc", pqc, pqc, nil, nil, tls.VersionTLS13, tls.X25519MLKEM768},
		{"plain client, pqc server", plain, pqc, nil, nil, tls.VersionTLS13, tls.X25519MLKEM768},
		{"client without the hybrid, pqc server", plain, pqc, noHybrid, nil, 0, 0},
		{"pqc client, server without the hybrid", pqc, plain, nil, noHybrid, 0, 0},
		{"1.2 client, pqc server", old, pqc, only12, nil, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := tt.client.ClientConfig(id("client"), []identity.ID{id("server")}).Clone()
			if tt.bendClient != nil {
				tt.bendClient(cfg)
			}
			scfg := tt.server.ServerConfig(id("server")).Clone()
			if tt.bendServer != nil {
				tt.bendServer(scfg)
			}
			cc, sc := memnet.Pipe() // buffered: after a HelloRetryRequest both write
			defer cc.Close()
			defer sc.Close()
			errc := make(chan error, 1)
			go func() {
				err := tls.Server(sc, scfg).HandshakeContext(ctx)
				if err != nil {
					_ = sc.Close() // the client hears of it
				}
				errc <- err
			}()
			c := tls.Client(cc, cfg)
			err := c.HandshakeContext(ctx)
			if err != nil {
				_ = cc.Close()
			}
			err = errors.Join(err, <-errc)
			cs := c.ConnectionState()
			if tt.version == 0 {
				if err == nil {
					t.Errorf("agreed on %x %v", cs.Version, cs.CurveID)
				}
			} else if err != nil || cs.Version != tt.version || cs.CurveID != tt.curve {
				t.Errorf("%v: %x %v", err, cs.Version, cs.CurveID)
			}
		})
	}
}

// BenchmarkHandshake is a mutual handshake over loopback, both ends' work: what a
// new tunnel costs with either key exchange, and what crossing to a peer without
// the hybrid costs.
func BenchmarkHandshake(b *testing.B) {
	ca := &fakeCA{t: b, ca: meshca.New(b, "cluster.local"), life: time.Hour}
	ctx, stop := context.WithCancel(b.Context())
	m := New(Config{Authority: ca})
	donec := make(chan error, 1)
	go func() { donec <- m.Run(ctx) }()
	defer func() { stop(); <-donec }()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	classic := []tls.CurveID{tls.X25519, tls.CurveP256, tls.CurveP384}
	for _, bc := range []struct {
		name           string
		client, server []tls.CurveID
	}{{"X25519", classic, classic}, {"X25519MLKEM768", curves, curves}, {"peer without", curves, classic}} {
		b.Run(bc.name, func(b *testing.B) {
			ccfg, scfg := m.ClientConfig(id("client"), []identity.ID{id("server")}).Clone(), m.ServerConfig(id("server")).Clone()
			ccfg.CurvePreferences, scfg.CurvePreferences = bc.client, bc.server
			errc := make(chan error, 1)
			for b.Loop() {
				cc, err := net.Dial("tcp", ln.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				sc, err := ln.Accept()
				if err != nil {
					b.Fatal(err)
				}
				go func() { errc <- tls.Server(sc, scfg).HandshakeContext(ctx) }()
				if err := errors.Join(tls.Client(cc, ccfg).HandshakeContext(ctx), <-errc); err != nil {
					b.Fatal(err)
				}
				_ = cc.(*net.TCPConn).SetLinger(0) // ports would run out
				_ = cc.Close()
				_ = sc.Close()
			}
		})
	}
}
