package app

import (
	"crypto/tls"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// handshake dials a control plane with a certificate of ca for names.
func handshake(t *testing.T, cfg *tls.Config, ca *meshca.CA, names ...string) error {
	t.Helper()
	leaf := ca.Leaf(t, identity.ID{}, meshca.Names(names...))
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{leaf}, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	donec := make(chan struct{})
	go func() {
		defer close(donec)
		if c, err := ln.Accept(); err == nil {
			_ = c.(*tls.Conn).Handshake() // the client judges
			_ = c.Close()
		}
	}()
	defer func() { _ = ln.Close(); <-donec }() // whatever came has been served
	c, err := tls.Dial("tcp", ln.Addr().String(), cfg)
	if err == nil {
		_ = c.Close()
	}
	return err
}

func TestControlPlaneRoots(t *testing.T) {
	ca, other := meshca.New(t, "cluster.local"), meshca.New(t, "cluster.local")
	file := filepath.Join(t.TempDir(), "root-cert.pem")
	get := serverRoots("XDS_ROOT_CA", file, "istiod.test:15012", "")
	if _, err := get(); err == nil || !strings.Contains(err.Error(), "XDS_ROOT_CA") || !strings.Contains(err.Error(), "control plane's root") {
		t.Errorf("missing file: %v", err)
	}
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write([]byte("not a certificate"))
	if _, err := get(); err == nil || !strings.Contains(err.Error(), "XDS_ROOT_CA: no PEM certificate") {
		t.Errorf("garbage: %v", err)
	}
	must := func(get func() (*tls.Config, error)) *tls.Config {
		t.Helper()
		cfg, err := get()
		if err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	write(other.RootPEM())
	if err := handshake(t, must(get), ca, "istiod.test"); err == nil {
		t.Error("a server under another root was trusted")
	}
	write(append(other.RootPEM(), ca.RootPEM()...)) // rotation: both
	if err := handshake(t, must(get), ca, "istiod.test"); err != nil {
		t.Errorf("after the file changed: %v", err)
	}
	if err := handshake(t, must(get), ca, "elsewhere.test"); err == nil {
		t.Error("a server of another name was trusted")
	}
	text := serverRoots("CA_ROOT_CA", string(ca.RootPEM()), "10.0.0.1:15012", "alt.test")
	if err := handshake(t, must(text), ca, "alt.test"); err != nil {
		t.Errorf("PEM text and ALT_CA_HOSTNAME: %v", err)
	}
	if cfg := must(serverRoots("XDS_ROOT_CA", "SYSTEM", "x.test:1", "")); cfg.RootCAs != nil || cfg.ServerName != "x.test" || cfg.InsecureSkipVerify {
		t.Errorf("SYSTEM: %+v", cfg)
	}
}
