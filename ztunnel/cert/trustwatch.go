package cert

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ambit-mesh/ambit/xds/api/trust"
)

const (
	// watchBackoff is doubled up to watchMaxBackoff while the stream fails.
	watchBackoff, watchMaxBackoff = time.Second, 30 * time.Second
	// watchAbsent is when a control plane that pushes no trust is asked again:
	// it may have been replaced by one that does.
	watchAbsent = 10 * time.Minute
	// staleAfter is how long a bundle that is older than the one in force is
	// taken for a replica's that has yet to read its files. Later it is what the
	// control plane wants: its state was restored from a copy.
	staleAfter = 3 * time.Minute
)

// TrustWatcher follows what the control plane says should be trusted: got is
// called with each bundle until the stream ends.
type TrustWatcher interface {
	WatchTrust(ctx context.Context, got func(*trust.Bundle)) error
}

// WatchTrust implements TrustWatcher over the CA's channel. Control planes of
// other projects answer UNIMPLEMENTED.
func (c *Client) WatchTrust(ctx context.Context, got func(*trust.Bundle)) error {
	ctx, err := c.outgoing(ctx)
	if err != nil {
		return err
	}
	stream, err := trust.NewTrustServiceClient(c.conn).Watch(ctx, &trust.WatchRequest{})
	if err != nil {
		return fmt.Errorf("follow trust at %s: %w", c.cfg.Target, err)
	}
	for {
		b, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("follow trust at %s: %w", c.cfg.Target, err)
		}
		got(b)
	}
}

// FollowTrust keeps roots and revocations as the control plane pushes them,
// until ctx ends. Without it, or while it is away, roots come with each
// certificate.
func (m *Manager) FollowTrust(ctx context.Context, w TrustWatcher) error {
	backoff, told := watchBackoff, ""
	for {
		var hold *time.Timer
		err := w.WatchTrust(ctx, func(b *trust.Bundle) {
			if told != "" {
				m.cfg.Logger.Info("the control plane pushes trust again")
			}
			backoff, told = watchBackoff, ""
			m.pushed.Store(true)
			if hold != nil {
				hold.Stop()
			}
			if !m.applyBundle(b, false) {
				hold = time.AfterFunc(staleAfter, func() { m.applyBundle(b, true) })
			}
		})
		m.pushed.Store(false)
		if hold != nil {
			hold.Stop()
		}
		if ctx.Err() != nil {
			return nil
		}
		wait := backoff/2 + rand.N(backoff)
		backoff = min(2*backoff, watchMaxBackoff)
		if status.Code(err) == codes.Unimplemented {
			wait = watchAbsent/2 + rand.N(watchAbsent)
		}
		if reason := reasonOf(err); reason != told {
			m.cfg.Logger.Info("trust is not pushed: roots come with each certificate", "why", err.Error(), "retry_in", wait.Round(time.Millisecond).String())
			told = reason
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// applyBundle puts a bundle in force: trust at once, our own certificates soon.
// One that is older than what is in force is left alone unless it must be; false
// says so.
func (m *Manager) applyBundle(b *trust.Bundle, older bool) bool {
	roots, err := parsePEM(b.GetRoots())
	if err != nil {
		m.cfg.Logger.Error("trust bundle not used: what was in force stays in force", "error", err.Error())
		return true
	}
	m.mu.Lock()
	if b.GetGeneration() < m.generation && !older {
		m.mu.Unlock()
		m.cfg.Logger.Info("trust bundle is older than the one in force: left alone for now", "generation", b.GetGeneration(), "for", staleAfter.String())
		return false
	}
	known := m.generation == b.GetGeneration()
	m.generation, m.contact = b.GetGeneration(), m.cfg.Now()
	m.seq++
	seq := m.seq
	m.mu.Unlock()
	m.Nudge() // whoever pushes can also sign
	// Revocations before roots: a rotation that ends withdraws both.
	if err := m.pushCRL(b.GetRevoked()); err != nil {
		m.cfg.Logger.Error("pushed revocation lists not used: what was in force stays in force", "error", err.Error())
	}
	aliases := slices.Compact(slices.Sorted(slices.Values(slices.Concat(m.cfg.TrustDomainAliases, b.GetAliases()))))
	m.aliases.Store(&aliases)
	for _, td := range m.domains(b.GetTrustDomain()) {
		if err := m.trust.Set(td, roots, seq); err != nil {
			m.cfg.Logger.Error("trust bundle not used", "error", err.Error())
		}
	}
	if !known {
		m.cfg.Logger.Info("trust bundle in force", "generation", b.GetGeneration(), "roots", len(roots))
	}
	if issuer := b.GetIssuer(); len(issuer) > 0 {
		m.replace("another CA signs", m.cfg.ReplaceSpread, func(c *Certificate) bool {
			return len(c.Leaf.AuthorityKeyId) > 0 && !bytes.Equal(c.Leaf.AuthorityKeyId, issuer)
		})
	}
	return true
}

func (m *Manager) pushCRL(pem string) error {
	const from = "control plane"
	if strings.TrimSpace(pem) != "" {
		return m.setCRL([]byte(pem), from)
	}
	return m.unsetCRL(from)
}

// domains are a trust domain and its aliases, which are other names of it.
func (m *Manager) domains(td string) []string {
	return append([]string{td}, *m.aliases.Load()...)
}

// FollowRootFile replaces certificates ahead of their time when the file with
// the CA's roots (CA_ROOT_CA) changes: roots come with certificates, so this is
// how a node learns of a rotation by a control plane that pushes no trust.
func (m *Manager) FollowRootFile(ctx context.Context, path string) error {
	first := true
	follow(ctx, path, func() {
		if first {
			first = false
			return
		}
		if m.pushed.Load() {
			return
		}
		m.replace("the CA's roots changed", m.cfg.ReplaceSpread, func(*Certificate) bool { return true })
	})
	return nil
}
