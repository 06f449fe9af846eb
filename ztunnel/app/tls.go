package app

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"strings"
)

// serverRoots makes the TLS configuration for the control plane, read anew for
// each connection so that a rotated root file counts.
func serverRoots(setting, roots, target, name string) func() (*tls.Config, error) {
	if name == "" {
		name, _, _ = net.SplitHostPort(target) // validated by Config
	}
	return func() (*tls.Config, error) {
		cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: name, NextProtos: []string{"h2"}}
		if roots == "SYSTEM" {
			return cfg, nil
		}
		pem := []byte(roots)
		if !strings.Contains(roots, "-----BEGIN") {
			var err error
			if pem, err = os.ReadFile(roots); err != nil {
				return nil, fmt.Errorf("%s: %w (it must hold the control plane's root certificates)", setting, err)
			}
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: no PEM certificate in it", setting)
		}
		return cfg, nil
	}
}
