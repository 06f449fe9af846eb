package cert

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ambit-mesh/ambit/xds/identity"
)

// maxLive bounds the tunnels that are followed. One that is not was judged at
// its handshake and is counted.
const maxLive = 200_000

// Side is on which end of a tunnel this proxy stands; the reporter label.
type Side string

const (
	Source      Side = "source"
	Destination Side = "destination"
)

// DistrustedError is why a tunnel is cut whose peer's root was withdrawn while
// the peer's certificate still lived: its key is not to be believed. A root
// that retires after its last leaf ended cuts nothing.
type DistrustedError struct {
	Peer string
	Err  error
}

func (e *DistrustedError) Error() string {
	return fmt.Sprintf("certificate of %s is no longer trusted: its root was withdrawn: %v", e.Peer, e.Err)
}

func (e *DistrustedError) Unwrap() error { return e.Err }

// live is the set of tunnels whose peers' certificates may yet be revoked.
type live struct {
	mu      sync.Mutex
	tunnels map[*liveTunnel]struct{}
}

type liveTunnel struct {
	side  Side
	certs []*x509.Certificate
	cut   func(error)
}

// Track follows a tunnel from its handshake to its end: cut is called, at most
// once, when a certificate of the peer's chain is revoked or its root withdrawn. The
// caller calls done when the tunnel has ended.
func (m *Manager) Track(side Side, cs *tls.ConnectionState, cut func(error)) (done func()) {
	if cs == nil || len(cs.PeerCertificates) == 0 {
		m.metrics.untracked.WithLabelValues(string(side)).Inc()
		return func() {}
	}
	t := &liveTunnel{side: side, certs: cs.PeerCertificates, cut: cut}
	m.live.mu.Lock()
	if len(m.live.tunnels) >= maxLive {
		m.live.mu.Unlock()
		m.metrics.untracked.WithLabelValues(string(side)).Inc()
		return func() {}
	}
	m.live.tunnels[t] = struct{}{}
	m.live.mu.Unlock()
	// A list or a root may have changed since the handshake. Roots are looked at
	// only if one was withdrawn just now: verifying again costs as much as the
	// handshake did.
	m.judge(t, m.cfg.Now().UnixNano()-m.withdrawn.Load() < int64(lookAgain))
	return func() {
		m.live.mu.Lock()
		defer m.live.mu.Unlock()
		delete(m.live.tunnels, t)
	}
}

// rejudge looks at all tunnels again and reports how many it cut.
func (m *Manager) rejudge(roots bool) int {
	m.live.mu.Lock()
	tunnels := make([]*liveTunnel, 0, len(m.live.tunnels))
	for t := range m.live.tunnels {
		tunnels = append(tunnels, t)
	}
	m.live.mu.Unlock()
	n := 0
	for _, t := range tunnels {
		if m.judge(t, roots) {
			n++
		}
	}
	return n
}

func (m *Manager) judge(t *liveTunnel, roots bool) (cut bool) {
	err := m.trust.standing(t.certs, roots, m.cfg.Now())
	if err == nil {
		return false
	}
	m.live.mu.Lock()
	_, first := m.live.tunnels[t]
	delete(m.live.tunnels, t)
	m.live.mu.Unlock()
	if !first {
		return false
	}
	m.countRevoked(t.side, err)
	t.cut(err)
	return true
}

func (m *Manager) countRevoked(side Side, err error) {
	if _, ok := errors.AsType[*RevokedError](err); ok {
		m.metrics.revoked.WithLabelValues(string(side)).Inc()
	}
}

// standing tells what has happened to certificates that were good once. Their
// end is no reason: a tunnel outlives its leaf and takes no new streams.
func (t *Trust) standing(certs []*x509.Certificate, judgeRoots bool, now time.Time) error {
	leaf := certs[0]
	id, err := LeafIdentity(leaf)
	if err != nil {
		return err
	}
	if r := t.find(certs, id); r != nil {
		return r
	}
	if !judgeRoots || !now.Before(leaf.NotAfter) {
		return nil
	}
	err = errors.New("no roots are known for trust domain " + id.TrustDomain())
	if roots := t.pool(id.TrustDomain()); roots != nil {
		err = verifyChain(certs, roots, x509.ExtKeyUsageAny, now)
		if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); !unknown {
			return nil // such as a clock before its begin
		}
	}
	return &DistrustedError{Peer: id.String(), Err: err}
}

func (t *Trust) find(certs []*x509.Certificate, id identity.ID) *RevokedError {
	return t.revoked.Load().find(certs, func() []*x509.Certificate { return t.Roots(id.TrustDomain()) })
}
