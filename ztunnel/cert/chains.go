package cert

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"slices"
	"sync"
	"time"
)

// anchors are the roots of a trust domain, never changed after they were put in
// force, and what was verified by them.
//
// A peer shows the same certificates with each of its tunnels, for as long as they
// live. That they lead to a root follows from their bytes, the roots, the usage and
// the time, and costs as much as the proof that the peer has the key. So it is
// shown once, and remembered. What makes that sound:
//
//   - The memory belongs to one set of roots. Other roots have one of their own,
//     which is empty; what a handshake under way finds out by the old ones is
//     noted with the old ones.
//   - It is asked by the digest of everything that was shown: a byte more or less,
//     another order or another usage is another question.
//   - An answer holds from the last NotBefore to the first NotAfter of the
//     certificates shown and of those in the chain, roots included, and time is all
//     else that verification depends on.
//   - Only success is remembered.
//   - All else is looked at each time: the proof of possession by crypto/tls; and
//     here the identity, revocation, the leaf's own time and who is accepted.
//
// All methods may be called from any goroutine.
type anchors struct {
	pool *x509.CertPool

	mu             sync.Mutex
	recent, before map[shown]period // guarded by mu
}

// maxChains bounds half of what is remembered, some 150 bytes each. When as many
// are new, those are forgotten that were not met meanwhile: whoever varies what it
// shows makes others' handshakes cost what they would without a memory.
const maxChains = 2048

// shown is the certificates of a peer, and as whose they are to be verified.
type shown struct {
	digest [sha256.Size]byte
	usage  x509.ExtKeyUsage
}

// period is a time, its ends included.
type period struct{ from, until time.Time }

func (p period) holds(now time.Time) bool { return !now.Before(p.from) && !now.After(p.until) }

// verify is verifyChain by these roots.
func (a *anchors) verify(certs []*x509.Certificate, usage x509.ExtKeyUsage, now time.Time) error {
	key := shown{digestOf(certs), usage}
	if a.knows(key, now) {
		return nil
	}
	chain, err := buildChain(certs, a.pool, usage, now)
	if err != nil {
		return err
	}
	if p := common(certs, chain); p.holds(now) { // not where something expired was shown and not needed
		a.note(key, p)
	}
	return nil
}

func (a *anchors) knows(key shown, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, ok := a.recent[key]
	if !ok {
		if p, ok = a.before[key]; ok {
			a.noteLocked(key, p)
		}
	}
	return ok && p.holds(now)
}

func (a *anchors) note(key shown, p period) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.noteLocked(key, p)
}

func (a *anchors) noteLocked(key shown, p period) {
	if a.recent == nil || len(a.recent) >= maxChains {
		a.recent, a.before = map[shown]period{}, a.recent
	}
	a.recent[key] = p
}

// digestOf is of the certificates as they came, each with its length in front.
func digestOf(certs []*x509.Certificate) (d [sha256.Size]byte) {
	h := sha256.New()
	var n [8]byte
	for _, c := range certs {
		binary.BigEndian.PutUint64(n[:], uint64(len(c.Raw)))
		h.Write(n[:])
		h.Write(c.Raw)
	}
	h.Sum(d[:0])
	return d
}

// common is when all of the certificates are valid.
func common(certs, chain []*x509.Certificate) period {
	p := period{certs[0].NotBefore, certs[0].NotAfter}
	for _, c := range slices.Concat(certs[1:], chain) {
		if c.NotBefore.After(p.from) {
			p.from = c.NotBefore
		}
		if c.NotAfter.Before(p.until) {
			p.until = c.NotAfter
		}
	}
	return p
}
