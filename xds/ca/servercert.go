package ca

import (
	"crypto/tls"
	"sync"
	"time"
)

// ServerTLS holds ambitd's own certificate and renews it when a handshake
// finds it in the second half of its life, or of another CA than the one that
// signs now. Streams that are open keep theirs:
// TLS looks at a certificate once.
type ServerTLS struct {
	authority *Authority
	names     []string

	mu      sync.Mutex
	current *tls.Certificate // guarded by mu
	by      *issuer          // of current; guarded by mu
}

// ServerTLS issues the first certificate for these DNS names and addresses.
func (a *Authority) ServerTLS(names []string) (*ServerTLS, error) {
	s := &ServerTLS{authority: a, names: names}
	_, err := s.certificate()
	return s, err
}

// Config is the server side of TLS: at least 1.2 (foreign proxies), no client
// certificate, because callers prove themselves by token.
func (s *ServerTLS) Config() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"h2"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.certificate() },
	}
}

// NotAfter is the end of the current certificate.
func (s *ServerTLS) NotAfter() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current.Leaf.NotAfter
}

func (s *ServerTLS) certificate() (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, by := s.authority.cfg.Now(), s.authority.inForce().issuer
	if s.current != nil && s.by.cert.Equal(by.cert) {
		leaf := s.current.Leaf
		if now.Before(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)) {
			return s.current, nil
		}
	}
	renewed, err := s.authority.serverCertificate(by, s.names)
	if err != nil {
		if s.current != nil && now.Before(s.current.Leaf.NotAfter) {
			return s.current, nil // still good; the next handshake tries again
		}
		return nil, err
	}
	s.current, s.by = renewed, by
	return renewed, nil
}
