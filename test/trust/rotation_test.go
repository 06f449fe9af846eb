package trust

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/ambit-mesh/ambit/xds/ca"
	"github.com/ambit-mesh/ambit/ztunnel/cert"
	"github.com/ambit-mesh/ambit/ztunnel/hbone"
)

// TestRootRotationUnderLoad: add, promote, retire, while both nodes call each
// other over old and fresh tunnels: nothing fails.
func TestRootRotationUnderLoad(t *testing.T) {
	m := newMesh(t)
	m.roots(1)
	long, err := m.a.open(m.ctx, m.a.tunnels, m.b)
	if err != nil {
		t.Fatal(err)
	}
	l := m.load()
	m.more(l, 20)

	r := m.keep((*ca.Keeper).Rotate)
	if r.Phase != ca.Added || len(r.Certs) != 3 {
		t.Errorf("after rotate: %+v", r)
	}
	m.roots(2) // pushed: no certificate was renewed for it
	m.more(l, 20)

	r = m.keep(func(k *ca.Keeper) (*ca.Report, error) { return k.Promote(true) })
	m.leavesOf(r.Certs[0].Fingerprint)
	m.more(l, 20)
	if err := echo(long, "still here"); err != nil {
		t.Errorf("a connection from before the rotation: %v", err)
	}
	// What a day does: tunnels whose certificates end take no new streams.
	_ = long.Close()
	for _, n := range m.nodes() {
		n.tunnels.CloseMatching(func(hbone.Key) bool { return true })
	}
	m.more(l, 20)

	m.keep(func(k *ca.Keeper) (*ca.Report, error) { return k.Retire(true) })
	m.roots(1)
	m.more(l, 20)
	l.stop()
	for _, err := range l.failed {
		t.Error(err)
	}
	t.Logf("%d calls", l.calls)
}

// TestLeakedKey: what stands under the leaked root is cut at once, and the mesh
// goes on under another.
func TestLeakedKey(t *testing.T) {
	m := newMesh(t)
	m.roots(1)
	s, err := m.a.open(m.ctx, m.a.tunnels, m.b)
	if err != nil {
		t.Fatal(err)
	}
	if err := echo(s, "before"); err != nil {
		t.Fatal(err)
	}
	leaked := m.keep(func(k *ca.Keeper) (*ca.Report, error) { return k.Status(), nil }).Certs[0].Fingerprint
	r := m.keep((*ca.Keeper).RevokeKey)
	if _, err := s.Read(make([]byte, 1)); err == nil {
		t.Error("a connection under the leaked root lives on")
	}
	m.leavesOf(r.Certs[0].Fingerprint)
	m.until("calls work under the other root", func() bool { return m.a.call(m.ctx, m.b, true) == nil && m.b.call(m.ctx, m.a, true) == nil })
	for _, n := range m.nodes() {
		for _, root := range n.certs.Trust().Roots("cluster.local") {
			if ca.Fingerprint(root) == leaked {
				t.Errorf("%s trusts the leaked root", n.id)
			}
		}
	}
	found := false
	for _, err := range append(m.a.cutBy(), m.b.cutBy()...) {
		if _, ok := errors.AsType[*cert.DistrustedError](err); ok {
			found = true
		}
	}
	if !found {
		t.Error("no tunnel was cut for its root")
	}
}

// TestRevokedCertificate: `ambitd ca revoke` reaches proxies at once, cuts the
// tunnels of the certificate in both directions, and its owner gets another.
func TestRevokedCertificate(t *testing.T) {
	m := newMesh(t)
	m.roots(1)
	out, err := m.a.open(m.ctx, m.a.tunnels, m.b)
	if err != nil {
		t.Fatal(err)
	}
	in, err := m.b.open(m.ctx, m.b.tunnels, m.a)
	if err != nil {
		t.Fatal(err)
	}
	bad, err := m.b.certs.Get(m.ctx, m.b.id)
	if err != nil {
		t.Fatal(err)
	}
	m.keep(func(k *ca.Keeper) (*ca.Report, error) { return k.Revoke(bad.Leaf.SerialNumber) })
	for _, s := range []*hbone.Stream{out, in} {
		if _, err := s.Read(make([]byte, 1)); err == nil {
			t.Error("a connection of the revoked certificate lives on")
		}
	}
	m.until("a knows why", func() bool {
		for _, err := range m.a.cutBy() {
			if r, ok := errors.AsType[*cert.RevokedError](err); ok && r.Serial.Cmp(bad.Leaf.SerialNumber) == 0 {
				return true
			}
		}
		return false
	})
	m.until("b has another certificate and is heard", func() bool { return m.b.call(m.ctx, m.a, true) == nil })
	if c, err := m.b.certs.Get(m.ctx, m.b.id); err != nil || c.Leaf.SerialNumber.Cmp(bad.Leaf.SerialNumber) == 0 {
		t.Errorf("b shows the revoked certificate still (%v)", err)
	}
	if _, err := os.Stat(filepath.Join(m.state, "ca-crl.pem")); err != nil {
		t.Error(err)
	}
}
