package cert

import (
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Trust is the node's map from trust domain to roots. It is shared by every
// live trust decision, so a root that arrives with one identity's certificate
// counts for all of them at once.
//
// Reads are lock-free; writers are serialised by mu.
type Trust struct {
	pools   atomic.Pointer[map[string]*anchors]
	revoked atomic.Pointer[revocations] // nil: nothing is revoked

	mu       sync.Mutex
	set      *x509bundle.Set
	seq      map[string]uint64 // newest request whose answer set the domain's roots
	onChange []func(removed bool)
}

// NewTrust returns a map without roots: it trusts nobody.
func NewTrust() *Trust {
	t := &Trust{set: x509bundle.NewSet(), seq: map[string]uint64{}}
	t.pools.Store(&map[string]*anchors{})
	return t
}

// OnChange registers f, called after the roots of a trust domain changed;
// removed says that a root is no longer among them.
func (t *Trust) OnChange(f func(removed bool)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.onChange = append(t.onChange, f)
}

// Set replaces the roots of a trust domain, as learnt by request number seq.
// An answer to an older request never replaces that to a newer one: two
// answers may arrive in either order while the root rotates.
func (t *Trust) Set(trustDomain string, roots []*x509.Certificate, seq uint64) error {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return fmt.Errorf("trust domain %q: %w", trustDomain, err)
	}
	t.mu.Lock()
	if seq < t.seq[trustDomain] {
		t.mu.Unlock()
		return nil
	}
	t.seq[trustDomain] = seq
	next := x509bundle.FromX509Authorities(td, roots)
	removed := false
	if old, ok := t.set.Get(td); ok {
		if old.Equal(next) {
			t.mu.Unlock()
			return nil
		}
		removed = slices.ContainsFunc(old.X509Authorities(), func(c *x509.Certificate) bool { return !next.HasX509Authority(c) })
	}
	t.set.Add(next)
	pool := x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	pools := maps.Clone(*t.pools.Load())
	pools[trustDomain] = &anchors{pool: pool}
	t.pools.Store(&pools)
	notify := t.onChange
	t.mu.Unlock()
	for _, f := range notify {
		f(removed)
	}
	return nil
}

// Bundles is the set in go-spiffe's form, for other consumers of trust.
func (t *Trust) Bundles() *x509bundle.Set { return t.set }

// Roots returns the certificates a trust domain is judged by.
func (t *Trust) Roots(trustDomain string) []*x509.Certificate {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil
	}
	b, ok := t.set.Get(td)
	if !ok {
		return nil
	}
	return b.X509Authorities()
}

func (t *Trust) anchors(trustDomain string) *anchors {
	return (*t.pools.Load())[trustDomain]
}

func (t *Trust) pool(trustDomain string) *x509.CertPool {
	if a := t.anchors(trustDomain); a != nil {
		return a.pool
	}
	return nil
}
