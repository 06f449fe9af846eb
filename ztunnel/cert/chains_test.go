package cert

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/test/memnet"
	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// remembered is how many chains of a trust domain are known to be good.
func remembered(t *Trust, domain string) int {
	a := t.anchors(domain)
	a.mu.Lock()
	defer a.mu.Unlock()
	n := len(a.recent)
	for k := range a.before {
		if _, again := a.recent[k]; !again {
			n++
		}
	}
	return n
}

// What was verified once is refused as soon as something has changed.
func TestRememberedChains(t *testing.T) {
	root, other := meshca.New(t, "cluster.local"), meshca.New(t, "cluster.local")
	inter := root.Intermediate(t)
	p := id("p")
	anyone := oneOf([]identity.ID{p})
	const client, server = x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth
	peer := stateWith(t, inter.Leaf(t, p, meshca.Lifetime(100*24*time.Hour)))
	with := func(cs tls.ConnectionState, more ...*x509.Certificate) tls.ConnectionState {
		cs.PeerCertificates = append(cs.PeerCertificates[:len(cs.PeerCertificates):len(cs.PeerCertificates)], more...)
		return cs
	}
	onlyServer := stateWith(t, inter.Leaf(t, p, meshca.Usages(server)))
	outlives := stateWith(t, inter.Leaf(t, p, meshca.Lifetime(2*365*24*time.Hour)))
	now := time.Now() // later than the begin of all of them
	for _, tt := range []struct {
		name   string
		first  tls.ConnectionState
		usage  x509.ExtKeyUsage // at first
		change func(*Trust)
		then   tls.ConnectionState
		accept func(identity.ID) error
		at     time.Time
		want   string // "": good
		known  int    // afterwards
	}{
		{name: "again", first: peer, usage: client, then: peer, at: now, known: 1},
		{name: "another root as well", first: peer, usage: client, then: peer, at: now, known: 1,
			change: func(tr *Trust) {
				_ = tr.Set("cluster.local", []*x509.Certificate{root.Root(), other.Root()}, 2)
			}},
		{name: "its root withdrawn", first: peer, usage: client, then: peer, at: now, want: "not trusted",
			change: func(tr *Trust) { _ = tr.Set("cluster.local", []*x509.Certificate{other.Root()}, 2) }},
		{name: "all roots withdrawn", first: peer, usage: client, then: peer, at: now, want: "not trusted",
			change: func(tr *Trust) { _ = tr.Set("cluster.local", nil, 2) }},
		{name: "leaf revoked", first: peer, usage: client, then: peer, at: now, want: "revoked", known: 1,
			change: func(tr *Trust) { tr.revoked.Store(lists(t, inter.CRL(t, peer.PeerCertificates[0]))) }},
		{name: "intermediate revoked", first: peer, usage: client, then: peer, at: now, want: "revoked", known: 1,
			change: func(tr *Trust) { tr.revoked.Store(lists(t, root.CRL(t, inter.Cert))) }},
		{name: "leaf expired", first: peer, usage: client, then: peer, at: peer.PeerCertificates[0].NotAfter.Add(1), want: "expired", known: 1},
		{name: "at the leaf's end", first: peer, usage: client, then: peer, at: peer.PeerCertificates[0].NotAfter, known: 1},
		{name: "intermediate expired before the leaf", first: outlives, usage: client, then: outlives, at: inter.Cert.NotAfter.Add(1), want: "not trusted", known: 1},
		{name: "clock before the leaf", first: peer, usage: client, then: peer, at: peer.PeerCertificates[0].NotBefore.Add(-1), want: "not valid before", known: 1},
		{name: "usage that the leaf has not", first: onlyServer, usage: server, then: onlyServer, at: now, want: "not trusted", known: 1},
		{name: "another usage", first: peer, usage: server, then: peer, at: now, known: 2},
		{name: "without its intermediate", first: peer, usage: client, then: tls.ConnectionState{PeerCertificates: peer.PeerCertificates[:1]}, at: now, want: "not trusted", known: 1},
		{name: "with one more", first: peer, usage: client, then: with(peer, other.Root()), at: now, known: 2},
		{name: "another leaf of the same CA", first: peer, usage: client, then: stateWith(t, inter.Leaf(t, p)), at: now, known: 2},
		{name: "another leaf of another CA before the same intermediate", first: peer, usage: client,
			then: tls.ConnectionState{PeerCertificates: []*x509.Certificate{other.Leaf(t, p).Leaf, inter.Cert}}, at: now, want: "not trusted", known: 1},
		{name: "nobody who is accepted", first: peer, usage: client, then: peer, at: now, want: "wrong identity", known: 1,
			accept: func(identity.ID) error { return errors.New("no") }},
		{name: "what is refused is not remembered", first: stateWith(t, other.Leaf(t, p)), usage: client, then: peer, at: now, known: 1},
		{name: "something expired that is not needed", first: with(peer, other.Leaf(t, p, meshca.Expired()).Leaf), usage: client, then: peer, at: now, known: 1},
	} {
		trust := trusting(t, root)
		_, _ = trust.Verify(tt.first, tt.usage, now, anyone)
		if tt.change != nil {
			tt.change(trust)
		}
		if tt.accept == nil {
			tt.accept = anyone
		}
		for range 2 {
			_, err := trust.Verify(tt.then, client, tt.at, tt.accept)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
			}
		}
		if n := remembered(trust, "cluster.local"); n != tt.known {
			t.Errorf("%s: %d chains are remembered, want %d", tt.name, n, tt.known)
		}
	}
}

func lists(t *testing.T, der []byte) *revocations {
	r, err := parseCRLs(der)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A root whose end no 64-bit count of nanoseconds reaches (RFC 5280 §4.1.2.5) is an
// end like others.
func TestPeriodOfChains(t *testing.T) {
	at := func(year int) time.Time { return time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC) }
	c := func(from, until int) *x509.Certificate {
		return &x509.Certificate{NotBefore: at(from), NotAfter: at(until)}
	}
	leaf, root := c(2026, 2027), c(1950, 9999)
	for _, tt := range []struct {
		certs, chain []*x509.Certificate
		now          time.Time
		want         bool
	}{
		{[]*x509.Certificate{leaf}, []*x509.Certificate{leaf, root}, at(2026), true},
		{[]*x509.Certificate{leaf}, []*x509.Certificate{leaf, root}, at(2027), true},
		{[]*x509.Certificate{leaf}, []*x509.Certificate{leaf, root}, at(2026).Add(-1), false},
		{[]*x509.Certificate{leaf}, []*x509.Certificate{leaf, root}, at(2027).Add(1), false},
		{[]*x509.Certificate{c(2000, 9999)}, []*x509.Certificate{c(2000, 9999), root}, at(3000), true},
		{[]*x509.Certificate{c(2000, 9999)}, []*x509.Certificate{c(2000, 9999), c(2000, 2100)}, at(3000), false},
		{[]*x509.Certificate{c(2000, 9999), c(2000, 2100)}, []*x509.Certificate{c(2000, 9999), root}, at(3000), false},
	} {
		if got := common(tt.certs, tt.chain).holds(tt.now); got != tt.want {
			t.Errorf("at %v: %v", tt.now, got)
		}
	}
}

// Whoever shows ever other certificates does not fill the memory.
func TestRememberedChainsAreBounded(t *testing.T) {
	var a anchors
	forever := period{time.Time{}, time.Now().Add(time.Hour)}
	of := func(i int) (s shown) {
		s.digest[0], s.digest[1], s.digest[2] = byte(i), byte(i>>8), byte(i>>16)
		return s
	}
	met := of(1 << 20)
	a.note(met, forever)
	for i := range 5 * maxChains {
		a.note(of(i), forever)
		if len(a.recent) > maxChains || len(a.before) > maxChains {
			t.Fatalf("%d and %d remembered", len(a.recent), len(a.before))
		}
		if i%1000 == 0 && !a.knows(met, time.Now()) {
			t.Fatalf("forgotten between two meetings, after %d others", i)
		}
	}
	if a.knows(of(0), time.Now()) {
		t.Error("who never came again is remembered")
	}
}

// TestShownIsNotHad: who shows a peer's certificates, which are no secret, and has not its
// key, is refused whatever is remembered of them.
func TestShownIsNotHad(t *testing.T) {
	ca := &fakeCA{t: t, ca: meshca.New(t, "cluster.local"), life: time.Hour}
	m := New(Config{Authority: ca})
	ctx, stop := context.WithCancel(t.Context())
	donec := make(chan error, 1)
	go func() { donec <- m.Run(ctx) }()
	defer func() { stop(); <-donec }()
	peer, thief := ca.ca.Leaf(t, id("client")), ca.ca.Leaf(t, id("thief"))
	stolen := tls.Certificate{Certificate: peer.Certificate, PrivateKey: thief.PrivateKey}
	for i, c := range []tls.Certificate{peer, peer, stolen, peer} {
		cc, sc := memnet.Pipe()
		errc := make(chan error, 1)
		go func() {
			err := tls.Server(sc, m.ServerConfig(id("server"))).HandshakeContext(ctx)
			_ = sc.Close()
			errc <- err
		}()
		cfg := m.ClientConfig(id("client"), []identity.ID{id("server")}).Clone()
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }
		_ = tls.Client(cc, cfg).HandshakeContext(ctx) // of TLS 1.3: the server's word comes later
		err := <-errc
		_ = cc.Close()
		if steals := i == 2; (err != nil) != steals || steals && !strings.Contains(err.Error(), "invalid signature") {
			t.Errorf("handshake %d: %v", i, err)
		}
	}
	if n := remembered(m.trust, "cluster.local"); n != 2 { // one of each usage
		t.Errorf("%d chains are remembered, want 2", n)
	}
}

// BenchmarkVerify is what a handshake asks of its peer's certificates.
func BenchmarkVerify(b *testing.B) {
	ca := meshca.New(b, "cluster.local")
	leaf := ca.Leaf(b, id("p"))
	cs := tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf.Leaf}}
	trust := NewTrust()
	if err := trust.Set("cluster.local", []*x509.Certificate{ca.Root()}, 1); err != nil {
		b.Fatal(err)
	}
	accept, now := oneOf([]identity.ID{id("p")}), time.Now()
	for _, bc := range []struct {
		name  string
		first func(*anchors)
	}{
		{"met before", func(*anchors) {}},
		{"unknown", func(a *anchors) { clear(a.recent) }},
	} {
		b.Run(bc.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				bc.first(trust.anchors("cluster.local"))
				if _, err := trust.Verify(cs, x509.ExtKeyUsageClientAuth, now, accept); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
