package cert

import (
	"crypto/x509"
	"math/rand/v2"
	"time"
)

// replaceOwn asks for another certificate in place of each that is bad, without
// delay. Until it comes the old one is shown: peers judge it by themselves.
func (m *Manager) replaceOwn(why string, bad func(*Certificate) bool) {
	m.replace(why, 0, bad)
}

func (m *Manager) replace(why string, spread time.Duration, which func(*Certificate) bool) {
	m.mu.Lock()
	now, n := m.cfg.Now().Round(0), 0
	for _, e := range m.entries {
		c := e.cert.Load()
		if c == nil || e.err != nil || !which(c) {
			continue
		}
		at := now
		if spread > 0 {
			at = at.Add(rand.N(spread))
		}
		if at.Before(e.next) {
			e.next = at
			n++
		}
	}
	m.mu.Unlock()
	if n == 0 {
		return
	}
	m.cfg.Logger.Info("certificates are replaced early", "why", why, "certificates", n)
	m.wake()
}

// shown is the certificate as peers see it.
func (c *Certificate) shown() []*x509.Certificate {
	return append([]*x509.Certificate{c.Leaf}, c.Chain...)
}

// stands reports whether peers that trust roots accept the certificate.
func (c *Certificate) stands(roots *x509.CertPool, now time.Time) bool {
	return roots != nil && verifyChain(c.shown(), roots, x509.ExtKeyUsageAny, now) == nil
}
