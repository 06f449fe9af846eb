package cert

import (
	"crypto/tls"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/ambit-mesh/ambit/test/meshca"
	"github.com/ambit-mesh/ambit/xds/identity"
)

// TestAliases: a peer under another name of the trust domain is the same peer in
// both directions, by configuration and as pushed; a foreign domain is not,
// whoever signed for it.
func TestAliases(t *testing.T) {
	under := func(td, sa string) identity.ID { return identity.MustParse("spiffe://" + td + "/ns/default/sa/" + sa) }
	following(t, func(t *testing.T, m *Manager, ca *fakeCA, w *fakeTrust) {
		m.Retain([]identity.ID{id("self")})
		synctest.Wait()
		foreign := meshca.New(t, "old.example")
		call := func(peer tls.Certificate, asServer bool, expected ...identity.ID) error {
			cs := stateWith(t, peer)
			if asServer {
				return m.ClientConfig(id("self"), expected).VerifyConnection(cs)
			}
			return m.ServerConfig(id("self")).VerifyConnection(cs)
		}
		judge := func(when string, peer tls.Certificate, want string) {
			t.Helper()
			for _, asServer := range []bool{true, false} {
				err := call(peer, asServer, id("peer"))
				if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
					t.Errorf("%s, it serves %v: %v, want %q", when, asServer, err, want)
				}
			}
		}
		old := ca.ca.Leaf(t, under("old.example", "peer")) // by our CA, as a mesh that was renamed has it
		judge("our own name", ca.ca.Leaf(t, id("peer")), "")
		judge("no alias", old, "no roots are known for trust domain old.example")
		b := bundle(1, ca.ca)
		b.Aliases = []string{"old.example"}
		w.bundles <- b
		synctest.Wait()
		judge("alias", old, "")
		judge("an alias by a foreign root", foreign.Leaf(t, under("old.example", "peer")), "not trusted")
		judge("another domain", ca.ca.Leaf(t, under("other.example", "peer")), "no roots are known for trust domain other.example")
		if err := call(ca.ca.Leaf(t, under("old.example", "impostor")), true, id("peer")); err == nil {
			t.Error("another account under the alias was taken for the peer")
		}
		w.bundles <- bundle(2, ca.ca)
		synctest.Wait()
		judge("the alias was taken back", old, "wrong identity")
	})
}
