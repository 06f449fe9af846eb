package ca

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// keeper runs commands on a state directory at times that the test says.
type keeper struct {
	*testing.T
	dir, plugged string
	now          time.Time
}

func newKeeper(t *testing.T) *keeper {
	k := &keeper{T: t, dir: t.TempDir(), now: time.Now()}
	k.open()
	return k
}

func (k *keeper) clock() time.Time { return k.now }

func (k *keeper) open() *Authority {
	k.Helper()
	a, err := Open(Config{TrustDomain: domain, StateDir: k.dir, PluggedDir: k.plugged, Now: k.clock})
	if err != nil {
		k.Fatal(err)
	}
	return a
}

func (k *keeper) try(do func(*Keeper) (*Report, error)) (*Report, error) {
	k.Helper()
	c, err := Keep(Config{TrustDomain: domain, StateDir: k.dir, PluggedDir: k.plugged, Now: k.clock})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return do(c)
}

func (k *keeper) do(do func(*Keeper) (*Report, error)) *Report {
	k.Helper()
	r, err := k.try(do)
	if err != nil {
		k.Fatal(err)
	}
	return r
}

func (k *keeper) status() *Report {
	k.Helper()
	return k.do(func(c *Keeper) (*Report, error) { return c.Status(), nil })
}

func promote(force bool) func(*Keeper) (*Report, error) {
	return func(c *Keeper) (*Report, error) { return c.Promote(force) }
}

func retire(force bool) func(*Keeper) (*Report, error) {
	return func(c *Keeper) (*Report, error) { return c.Retire(force) }
}

func rolesOf(r *Report) string {
	var roles []string
	for _, c := range r.Certs {
		roles = append(roles, c.Role)
	}
	return strings.Join(roles, ", ")
}

// TestRotationStepByStep: the steps in order, each refused until a day after
// the one before, and what a leaf of each time is judged as.
func TestRotationStepByStep(t *testing.T) {
	k := newKeeper(t)
	first := testLeaf(t, must(k.open().Sign(testCSR(t, testKey(t)), bookinfo, 0)))
	trusted := func(leaf *x509.Certificate) bool {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: k.open().RootPool(), CurrentTime: first.NotBefore.Add(time.Minute), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err == nil
	}
	refused := func(step string, do func(*Keeper) (*Report, error), at time.Duration, why string) {
		t.Helper()
		_, err := k.try(do)
		r, ok := errors.AsType[*RefusedError](err)
		if !ok || r.Step != step || !strings.Contains(err.Error(), why) {
			t.Fatalf("%s: %v, want a refusal with %q", step, err, why)
		}
		if at > 0 && r.At.Sub(k.now).Round(time.Minute) != at {
			t.Errorf("%s: possible in %v, want %v", step, r.At.Sub(k.now), at)
		}
	}
	if r := k.status(); r.Phase != Steady || rolesOf(r) != "signing, root" || r.Next != "" {
		t.Errorf("before: %+v", r)
	}
	refused("promote", promote(true), 0, "begin with `ambitd ca rotate`")
	refused("retire", retire(true), 0, "no previous root")
	refused("abandon", (*Keeper).Abandon, 0, "no root was added")

	r := k.do((*Keeper).Rotate)
	if r.Phase != Added || rolesOf(r) != "signing, root, next root" || r.NextAt.Sub(k.now) != MaxTTL+settle {
		t.Errorf("added: %+v", r)
	}
	if a := k.open(); len(a.inForce().issuer.roots) != 2 || Fingerprint(a.inForce().issuer.cert) == r.Certs[2].Fingerprint {
		t.Error("after rotate both are trusted and the old one signs")
	}
	refused("rotate", (*Keeper).Rotate, 0, "was added already")
	refused("retire", retire(true), 0, "no previous root")
	k.now = k.now.Add(time.Hour)
	refused("promote", promote(false), MaxTTL+settle-time.Hour, "may not have the new root yet")
	k.now = k.now.Add(MaxTTL)
	r = k.do(promote(false))
	if r.Phase != Promoted || rolesOf(r) != "signing, previous root, root" {
		t.Errorf("promoted: %s %+v", rolesOf(r), r)
	}
	a := k.open()
	second := testLeaf(t, must(a.Sign(testCSR(t, testKey(t)), bookinfo, 0)))
	if string(second.AuthorityKeyId) == string(first.AuthorityKeyId) || !trusted(first) {
		t.Error("after promote the new root signs and the old one is trusted")
	}
	refused("rotate", (*Keeper).Rotate, 0, "finish it with `ambitd ca retire`")
	k.now = k.now.Add(time.Hour)
	refused("retire", retire(false), MaxTTL+settle-time.Hour, "may be in use")
	k.now = k.now.Add(MaxTTL)
	r = k.do(retire(false))
	if r.Phase != Steady || rolesOf(r) != "signing, root" || trusted(first) {
		t.Errorf("retired: %+v", r)
	}
	if keys, _ := filepath.Glob(filepath.Join(k.dir, "*key*.pem")); len(keys) != 1 {
		t.Errorf("keys left: %v", keys)
	}
	// And again, from a key under another name.
	k.do((*Keeper).Rotate)
	k.do(promote(true))
	k.do(retire(true))
	k.open()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestAbandon(t *testing.T) {
	k := newKeeper(t)
	before := k.open().Roots()
	k.do((*Keeper).Rotate)
	if r := k.do((*Keeper).Abandon); r.Phase != Steady || k.open().Roots() != before {
		t.Errorf("after abandon: %+v", r)
	}
	if keys, _ := filepath.Glob(filepath.Join(k.dir, keyPattern)); len(keys) != 0 {
		t.Errorf("keys left: %v", keys)
	}
}

// TestRotationSurvivesACrashAnywhere: a command that was interrupted leaves a CA
// that opens, and done again it ends as it should.
func TestRotationSurvivesACrashAnywhere(t *testing.T) {
	steps := []struct {
		name   string
		before func(*keeper)
		do     func(*Keeper) (*Report, error)
		want   Phase
	}{
		{"rotate", func(*keeper) {}, (*Keeper).Rotate, Added},
		{"promote", func(k *keeper) { k.do((*Keeper).Rotate) }, promote(true), Promoted},
		{"retire", func(k *keeper) { k.do((*Keeper).Rotate); k.do(promote(true)) }, retire(true), Steady},
	}
	for _, s := range steps {
		// The files after the command, taken over one by one in the order of
		// their writing, are what a crash leaves.
		done := newKeeper(t)
		s.before(done)
		beforeFiles := files(t, done.dir)
		done.do(s.do)
		after := files(t, done.dir)
		for n := range writesOf(beforeFiles, after) {
			k := &keeper{T: t, dir: t.TempDir(), now: done.now}
			for name, data := range beforeFiles {
				write(t, k.dir, name, data)
			}
			for _, name := range writesOf(beforeFiles, after)[:n] {
				write(t, k.dir, name, after[name])
			}
			k.open()
			if _, err := k.try(s.do); err != nil {
				if r, ok := errors.AsType[*RefusedError](err); !ok {
					t.Errorf("%s after %d files: %v", s.name, n, err)
				} else if k.status().Phase != s.want {
					t.Errorf("%s after %d files: %v in phase %s", s.name, n, r, k.status().Phase)
				}
			}
			k.open()
		}
	}
}

func files(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, e := range must(os.ReadDir(dir)) {
		out[e.Name()] = must(os.ReadFile(filepath.Join(dir, e.Name())))
	}
	return out
}

// writesOf lists what a command wrote, in its order: keys, what is next, when,
// the bundle, the chain, and last who signs.
func writesOf(before, after map[string][]byte) []string {
	var out []string
	add := func(match func(string) bool) {
		for name, data := range after {
			if match(name) && string(before[name]) != string(data) {
				out = append(out, name)
			}
		}
	}
	add(func(n string) bool { return strings.HasPrefix(n, "key-") })
	for _, name := range []string{nextFile, rotationFile, RootFile, chainFile, certFile} {
		add(func(n string) bool { return n == name })
	}
	return out
}

func TestRestoreALostKey(t *testing.T) {
	k := newKeeper(t)
	saved := filepath.Join(t.TempDir(), "saved.pem")
	if err := os.Rename(filepath.Join(k.dir, keyFile), saved); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{TrustDomain: domain, StateDir: k.dir}); err == nil || !strings.Contains(err.Error(), "ambitd ca restore") {
		t.Errorf("without the key: %v", err)
	}
	if r := k.status(); len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "ambitd ca restore --key") {
		t.Errorf("status: %v", r.Warnings)
	}
	other := filepath.Join(t.TempDir(), "other.pem")
	if err := os.WriteFile(other, must(encodeKey(testKey(t))), 0o600); err != nil {
		t.Fatal(err)
	}
	restore := func(path string) func(*Keeper) (*Report, error) {
		return func(c *Keeper) (*Report, error) { return c.Restore(path) }
	}
	if _, err := k.try(restore(other)); err == nil || !strings.Contains(err.Error(), "is not the key of") {
		t.Errorf("another key: %v", err)
	}
	if _, err := k.try(restore(filepath.Join(k.dir, certFile))); err == nil {
		t.Error("a certificate was taken for a key")
	}
	k.do(restore(saved))
	k.open()
	if r := k.status(); len(r.Warnings) != 0 {
		t.Errorf("restored: %v", r.Warnings)
	}
}

// TestLostForGood: without any copy, another root takes over.
func TestLostForGood(t *testing.T) {
	k := newKeeper(t)
	if err := os.Remove(filepath.Join(k.dir, keyFile)); err != nil {
		t.Fatal(err)
	}
	k.do((*Keeper).Rotate)
	k.do(promote(true))
	if a := k.open(); len(a.inForce().issuer.roots) != 2 {
		t.Error("the old root is not trusted while its leaves live")
	}
}

// A root whose key is gone must not become the one that signs.
func TestPromoteNeedsTheKey(t *testing.T) {
	k := newKeeper(t)
	k.do((*Keeper).Rotate)
	keys := must(filepath.Glob(filepath.Join(k.dir, keyPattern)))
	if err := os.Remove(keys[0]); err != nil || len(keys) != 1 {
		t.Fatal(keys, err)
	}
	before := files(t, k.dir)
	if _, err := k.try(promote(true)); err == nil || !strings.Contains(err.Error(), filepath.Base(keys[0])) {
		t.Errorf("promoted: %v", err)
	}
	if changed := writesOf(before, files(t, k.dir)); len(changed) > 0 {
		t.Errorf("a refused step wrote %v", changed)
	}
}

func TestRevokeKeyDistrustsEverythingBeside(t *testing.T) {
	k := newKeeper(t)
	old := k.open().Roots()
	k.do((*Keeper).Rotate) // a root that waits has its key beside the leaked one
	next := k.status().Certs[2].Fingerprint
	r := k.do((*Keeper).RevokeKey)
	a := k.open()
	if r.Phase != Steady || len(a.inForce().issuer.roots) != 1 || a.Roots() == old || r.Certs[0].Fingerprint == next {
		t.Errorf("after revoke-key: %+v", r)
	}
}

func TestParseSerial(t *testing.T) {
	for in, want := range map[string]string{"10": "a", "0x10": "10", "0A:ff": "aff", "serial=7F3a": "7f3a", " 12 ": "c",
		"": "", "-1": "", "0": "", "xyz": "", "0x" + strings.Repeat("f", 41): ""} {
		n, err := ParseSerial(in)
		switch {
		case want == "" && err == nil:
			t.Errorf("%q was read as %v", in, n)
		case want != "" && (err != nil || n.Text(16) != want):
			t.Errorf("%q: %v, %v, want %s", in, n, err, want)
		}
	}
}

// TestRevokeWritesAListThatOpenSSLReads: by serial and by file, through a
// rotation, and as another implementation judges it.
func TestRevokeWritesAListThatOpenSSLReads(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed: it judges the lists here")
	}
	k := newKeeper(t)
	leaf := func() (string, *x509.Certificate) {
		chain := must(k.open().Sign(testCSR(t, testKey(t)), bookinfo, 0))
		path := filepath.Join(t.TempDir(), "leaf.pem")
		if err := os.WriteFile(path, []byte(chain[0]), 0o644); err != nil {
			t.Fatal(err)
		}
		return path, testLeaf(t, chain)
	}
	verify := func(path string) string {
		out, _ := exec.Command(openssl, "verify", "-CAfile", filepath.Join(k.dir, RootFile), "-CRLfile", filepath.Join(k.dir, crlFile), "-crl_check", path).CombinedOutput()
		return string(out)
	}
	good, _ := leaf()
	badFile, _ := leaf()
	oldFile, old := leaf()
	k.do(func(c *Keeper) (*Report, error) { return c.RevokeCertificate(badFile) })
	if got := verify(badFile); !strings.Contains(got, "certificate revoked") {
		t.Errorf("revoked by file: %s", got)
	}
	if got := verify(good); !strings.Contains(got, "OK") {
		t.Errorf("not revoked: %s", got)
	}
	k.do((*Keeper).Rotate)
	k.do(promote(true))
	newFile, latest := leaf()
	k.do(func(c *Keeper) (*Report, error) { return c.Revoke(old.SerialNumber) })
	numbers := func() (out []int64) {
		for _, l := range must(readCRLs(k.dir)) {
			out = append(out, l.Number.Int64())
		}
		return out
	}
	before := numbers()
	r := k.do(func(c *Keeper) (*Report, error) { return c.Revoke(latest.SerialNumber) })
	for i, n := range numbers() { // RFC 5280 §5.2.3: they only grow
		if n <= before[i] {
			t.Errorf("list %d has number %d after %d", i, n, before[i])
		}
	}
	for _, path := range []string{badFile, oldFile, newFile} {
		if got := verify(path); !strings.Contains(got, "certificate revoked") {
			t.Errorf("%s in the overlap: %s", path, got)
		}
	}
	if got := verify(good); !strings.Contains(got, "OK") {
		t.Errorf("not revoked, in the overlap: %s", got)
	}
	if r.Revoked != 5 { // 3 on the old root's list, 2 on the new one's
		t.Errorf("%d entries", r.Revoked)
	}
	out, err := exec.Command(openssl, "crl", "-in", filepath.Join(k.dir, crlFile), "-noout", "-text").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "X509v3 CRL Number") {
		t.Errorf("openssl crl: %v\n%s", err, out)
	}
	a := k.open()
	if b, _ := a.Bundle(); strings.Count(string(b.Revoked), "BEGIN X509 CRL") != 2 {
		t.Error("the lists are not in the bundle that is pushed")
	}
	if r := k.do(retire(true)); r.Revoked != 2 {
		t.Errorf("%d entries after the old root went, want those of its successor", r.Revoked)
	}
	foreign := filepath.Join(t.TempDir(), "foreign.pem")
	if err := os.WriteFile(foreign, encodeCerts(testAuthority(t).inForce().issuer.cert), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := k.try(func(c *Keeper) (*Report, error) { return c.RevokeCertificate(foreign) }); err == nil || !strings.Contains(err.Error(), "has issued it") {
		t.Errorf("a foreign certificate: %v", err)
	}
}

func TestBadListsAreNamed(t *testing.T) {
	for name, data := range map[string][]byte{
		"only X509 CRL blocks": encodeCerts(testAuthority(t).inForce().issuer.cert),
		"holds no PEM list":    []byte("nothing"),
		"list 1":               pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte("x")}),
	} {
		k := newKeeper(t)
		write(t, k.dir, crlFile, data)
		if _, err := Open(Config{TrustDomain: domain, StateDir: k.dir}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want %q", err, name)
		}
	}
}

// TestPluggedInCAIsNotRotatedHere: its commands say where it is, status and
// revoke work.
func TestPluggedInCAIsNotRotatedHere(t *testing.T) {
	dir, inter := pluggedIn(t, time.Now(), func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign })
	k := &keeper{T: t, dir: t.TempDir(), plugged: dir, now: time.Now()}
	if _, err := k.try((*Keeper).Rotate); err == nil || !strings.Contains(err.Error(), "rotate it there") {
		t.Errorf("rotate: %v", err)
	}
	if r := k.status(); rolesOf(r) != "signing, root" || r.Certs[0].Fingerprint != Fingerprint(inter.cert) {
		t.Errorf("status: %+v", r)
	}
	leaf := testLeaf(t, must(k.open().Sign(testCSR(t, testKey(t)), bookinfo, 0)))
	k.do(func(c *Keeper) (*Report, error) { return c.Revoke(leaf.SerialNumber) })
	if b, _ := k.open().Bundle(); len(b.Revoked) == 0 {
		t.Error("the list is not in force")
	}
}

func TestWarningsBelowAQuarter(t *testing.T) {
	k := newKeeper(t)
	k.now = k.now.Add(rootLifetime*3/4 - time.Hour)
	if r := k.status(); len(r.Warnings) != 0 {
		t.Errorf("too early: %v", r.Warnings)
	}
	k.now = k.now.Add(2 * time.Hour)
	if r := k.status(); len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "expires at") || r.Next != "ambitd ca rotate" {
		t.Errorf("in the last quarter: %+v", r)
	}
	if i := k.open().Info(); len(i.Warnings) != 1 {
		t.Errorf("ambitd's own: %v", i.Warnings)
	}
}
