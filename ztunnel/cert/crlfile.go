package cert

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

// pollInterval is how often watched files are looked at. A change counts when
// two looks agree, so that a file is not read while it is written. Polling sees
// what Kubernetes does to mounted ConfigMaps (a symbolic link two levels up is
// replaced), files that come and go, and file systems without notification.
const pollInterval = time.Second

// fileState tells two contents of a path apart without reading them.
type fileState struct {
	size int64
	mod  time.Time
	err  string
}

func stateOf(path string) fileState {
	info, err := os.Stat(path)
	if err != nil {
		return fileState{err: err.Error()}
	}
	return fileState{size: info.Size(), mod: info.ModTime()}
}

// follow calls f when it begins and after each change of the file, until ctx
// ends.
func follow(ctx context.Context, path string, f func()) {
	seen := stateOf(path)
	f()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for last := seen; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := stateOf(path)
		if now == last && now != seen {
			seen = now
			f()
		}
		last = now
	}
}

// FollowCRL keeps the revocation lists of a file (CRL_PATH) in force until ctx
// ends. A file that cannot be used leaves the lists before in force, and says
// so.
func (m *Manager) FollowCRL(ctx context.Context, path string) error {
	loaded := false
	follow(ctx, path, func() {
		err := m.loadCRL(path)
		switch {
		case err == nil:
			loaded = true
			m.metrics.crlBroken.Set(0)
			return
		case errors.Is(err, fs.ErrNotExist) && !loaded:
			m.cfg.Logger.Warn("no revocation list yet: nothing is revoked until it comes", "path", path)
			return
		}
		m.metrics.crlBroken.Set(1)
		m.cfg.Logger.Error("revocation list not used: what was in force stays in force", "path", path, "error", err.Error())
	})
	return nil
}

func (m *Manager) loadCRL(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() // only read
	data, err := io.ReadAll(io.LimitReader(f, maxCRL+1))
	if err != nil {
		return fmt.Errorf("read revocation list %s: %w", path, err)
	}
	return m.setCRL(data, path)
}

// setCRL puts lists in force: at once for the next handshake, then for the
// tunnels that are open, then for our own certificates.
func (m *Manager) setCRL(data []byte, from string) error {
	r, err := parseCRLs(data)
	if err != nil {
		return err
	}
	if err := r.check(m.issuers()); err != nil {
		return err
	}
	m.crlMu.Lock()
	defer m.crlMu.Unlock()
	if old := m.crls[from]; old != nil && old.digest == r.digest {
		return nil
	}
	m.crls[from] = r
	cut := m.putCRLsLocked()
	m.cfg.Logger.Info("revocation lists in force", "from", from, "lists", len(r.lists), "revoked", r.count, "tunnels_cut", cut)
	if old := r.expired(m.cfg.Now()); len(old) > 0 {
		m.cfg.Logger.Warn("revocation lists are past their next update: what they name stays revoked, what was revoked since is not known", "expired", old)
	}
	m.replaceOwn("revoked", func(c *Certificate) bool {
		return r.find(c.shown(), func() []*x509.Certificate { return c.Roots }) != nil
	})
	return nil
}

// unsetCRL takes the lists of a source back.
func (m *Manager) unsetCRL(from string) error {
	m.crlMu.Lock()
	defer m.crlMu.Unlock()
	if m.crls[from] == nil {
		return nil
	}
	delete(m.crls, from)
	m.putCRLsLocked()
	m.cfg.Logger.Info("no revocation lists any more", "from", from)
	return nil
}

// putCRLsLocked makes what all sources say the one set that handshakes ask.
func (m *Manager) putCRLsLocked() (cut int) {
	all := &revocations{lists: map[string][]revocationList{}}
	for _, r := range m.crls {
		for issuer, lists := range r.lists {
			all.lists[issuer] = append(all.lists[issuer], lists...)
		}
		all.count += r.count
	}
	m.trust.revoked.Store(all)
	return m.rejudge(false)
}

// issuers are the CAs that this node knows: roots, and intermediates of its own
// certificates.
func (m *Manager) issuers() []*x509.Certificate {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var out []*x509.Certificate
	for _, e := range m.entries {
		if c := e.cert.Load(); c != nil {
			out = append(out, c.Chain...)
		}
	}
	for _, b := range m.trust.set.Bundles() {
		out = append(out, b.X509Authorities()...)
	}
	return out
}
