package cert

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"testing"
	"time"

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
	hybridToo := func(c *tls.Config) {
		c.CurvePreferences = append([]tls.CurveID{tls.X25519MLKEM768}, c.CurvePreferences...)
	}
	only12 := func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }
	for _, tt := range []struct {
		name           string
		client, server *Manager
		bend           func(*tls.Config)
		version        uint16 // 0: refused
		curve          tls.CurveID
	}{
		{"both plain", plain, plain, nil, tls.VersionTLS13, tls.X25519},
		{"old server", plain, old, nil, tls.VersionTLS13, tls.X25519},
		{"old both", old, old, nil, tls.VersionTLS13, tls.X25519},
		{"1.2 client, old server", old, old, only12, tls.VersionTLS12, tls.X25519},
		{"1.2 client, plain server", old, plain, only12, 0, 0},
		{"both pqc", pqc, pqc, nil, tls.VersionTLS13, tls.X25519MLKEM768},
		{"plain client, pqc server", plain, pqc, nil, 0, 0},
		{"plain client that has it, pqc server", plain, pqc, hybridToo, tls.VersionTLS13, tls.X25519MLKEM768},
		{"1.2 client, pqc server", old, pqc, only12, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := tt.client.ClientConfig(id("client"), []identity.ID{id("server")}).Clone()
			if tt.bend != nil {
				tt.bend(cfg)
			}
			cc, sc := net.Pipe()
			defer cc.Close()
			defer sc.Close()
			errc := make(chan error, 1)
			go func() {
				err := tls.Server(sc, tt.server.ServerConfig(id("server"))).HandshakeContext(ctx)
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
