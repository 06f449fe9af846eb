package ca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// lines is a log that is read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) { l.mu.Lock(); defer l.mu.Unlock(); return l.b.Write(p) }
func (l *lines) String() string              { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

// running gives f an authority that follows its files, in a bubble of fake time.
func running(t *testing.T, c func(t *testing.T) Config, f func(t *testing.T, a *Authority, log *lines)) {
	synctest.Test(t, func(t *testing.T) {
		a, err := Open(c(t))
		if err != nil {
			t.Fatal(err)
		}
		var log lines
		ctx, stop := context.WithCancel(context.Background())
		donec := make(chan error)
		go func() { donec <- a.Run(ctx, slog.New(slog.NewTextHandler(&log, nil))) }()
		f(t, a, &log)
		stop()
		<-donec
	})
}

// stamped gives all files a modification time that no version before had: the
// bubble's clock stands still while files are written.
func stamped(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		now := time.Now()
		if err := os.Chtimes(filepath.Join(dir, e.Name()), now, now); err != nil {
			t.Fatal(err)
		}
	}
}

func settleFiles() { time.Sleep(3 * pollInterval); synctest.Wait() }

func copyFiles(t *testing.T, from, to string) {
	t.Helper()
	for name, data := range files(t, from) {
		write(t, to, name, data)
	}
	stamped(t, to)
}

func TestPluggedInFilesAreFollowed(t *testing.T) {
	var dir, state string
	running(t, func(t *testing.T) Config {
		dir, _ = pluggedIn(t, time.Now(), nil)
		stamped(t, dir)
		state = t.TempDir()
		return Config{TrustDomain: domain, StateDir: state, PluggedDir: dir}
	}, func(t *testing.T, a *Authority, log *lines) {
		before, changec := a.Bundle()
		server, err := a.ServerTLS([]string{"localhost"})
		if err != nil {
			t.Fatal(err)
		}
		mine := must(server.certificate())
		time.Sleep(time.Hour)

		next, inter := pluggedIn(t, time.Now(), nil)
		write(t, dir, keyFile, must(os.ReadFile(filepath.Join(next, keyFile)))) // the key alone does not fit
		stamped(t, dir)
		settleFiles()
		if b, _ := a.Bundle(); b.Roots != before.Roots || a.Problem() == nil || len(a.Info().Warnings) != 1 {
			t.Errorf("half of a change is in force (%v)", a.Problem())
		}
		if n := strings.Count(log.String(), "does not belong to"); n != 1 {
			t.Errorf("the problem is told %d times:\n%s", n, log)
		}
		if _, err := a.Sign(testCSR(t, testKey(t)), bookinfo, 0); err != nil {
			t.Errorf("with broken files: %v", err)
		}
		copyFiles(t, next, dir)
		settleFiles()
		after, _ := a.Bundle()
		if after.Generation <= before.Generation || !bytes.Equal(after.Issuer, inter.cert.SubjectKeyId) || a.Problem() != nil {
			t.Errorf("the other CA is not in force: %v\n%s", a.Problem(), log)
		}
		select {
		case <-changec:
		default:
			t.Error("who follows was not told")
		}
		if chain := must(a.Sign(testCSR(t, testKey(t)), bookinfo, 0)); chain[1] != string(encodeCerts(inter.cert)) {
			t.Error("the intermediate before signs on")
		}
		if got := must(os.ReadFile(filepath.Join(state, RootFile))); string(got) != after.Roots {
			t.Error("the bundle in the state directory is the one before")
		}
		if now := must(server.certificate()); now == mine {
			t.Error("the server shows a certificate of the CA before")
		}
	})
}

// What was wrong need not be in the files: a clock that is behind, a full disk.
func TestFilesThatBecomeUsableAreUsed(t *testing.T) {
	var dir string
	running(t, func(t *testing.T) Config {
		dir, _ = pluggedIn(t, time.Now(), nil)
		stamped(t, dir)
		return Config{TrustDomain: domain, StateDir: t.TempDir(), PluggedDir: dir}
	}, func(t *testing.T, a *Authority, log *lines) {
		before, _ := a.Bundle()
		time.Sleep(time.Minute)
		next, _ := pluggedIn(t, time.Now().Add(2*time.Hour), nil)
		copyFiles(t, next, dir)
		settleFiles()
		if a.Problem() == nil {
			t.Fatal("a CA of tomorrow is in force")
		}
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		if b, _ := a.Bundle(); b.Roots == before.Roots || a.Problem() != nil {
			t.Errorf("the CA is valid now and not in force: %v", a.Problem())
		}
		if n := strings.Count(log.String(), "is not valid before"); n != 1 {
			t.Errorf("the problem is told %d times:\n%s", n, log)
		}
	})
}

func TestCommandsReachARunningAuthority(t *testing.T) {
	var dir string
	running(t, func(t *testing.T) Config {
		dir = t.TempDir()
		return Config{TrustDomain: domain, StateDir: dir}
	}, func(t *testing.T, a *Authority, log *lines) {
		k := &keeper{T: t, dir: dir, now: time.Now()}
		step := func(want int, do func(*Keeper) (*Report, error)) *Report {
			t.Helper()
			time.Sleep(time.Minute)
			k.now = time.Now()
			r := k.do(do)
			stamped(t, dir)
			settleFiles()
			if n := len(a.inForce().issuer.roots); n != want || a.Problem() != nil {
				t.Fatalf("%d roots, want %d (%v)", n, want, a.Problem())
			}
			if got := Fingerprint(a.inForce().issuer.cert); got != r.Certs[0].Fingerprint {
				t.Fatalf("%s signs, want %s", got, r.Certs[0].Fingerprint)
			}
			return r
		}
		step(2, (*Keeper).Rotate)
		step(2, promote(true))
		step(1, retire(true))
		step(1, (*Keeper).RevokeKey)
		leaf := testLeaf(t, must(a.Sign(testCSR(t, testKey(t)), bookinfo, 0)))
		step(1, func(c *Keeper) (*Report, error) { return c.Revoke(leaf.SerialNumber) })
		if b, _ := a.Bundle(); len(b.Revoked) == 0 {
			t.Error("the list is not in force")
		}
	})
}

// TestRunningAuthorityOutlivesItsKeyFile: it signs on, says so, distributes
// another root meanwhile, and is well again when the key is back.
func TestRunningAuthorityOutlivesItsKeyFile(t *testing.T) {
	var dir string
	running(t, func(t *testing.T) Config {
		dir = t.TempDir()
		return Config{TrustDomain: domain, StateDir: dir}
	}, func(t *testing.T, a *Authority, log *lines) {
		saved := filepath.Join(t.TempDir(), "saved.pem")
		if err := os.Rename(filepath.Join(dir, keyFile), saved); err != nil {
			t.Fatal(err)
		}
		settleFiles()
		if a.Problem() == nil || !strings.Contains(log.String(), "ambitd ca restore") {
			t.Errorf("the loss is not told: %v", a.Problem())
		}
		if _, err := a.Sign(testCSR(t, testKey(t)), bookinfo, 0); err != nil {
			t.Errorf("without the file: %v", err)
		}
		k := &keeper{T: t, dir: dir, now: time.Now()}
		time.Sleep(time.Minute)
		k.do((*Keeper).Rotate)
		stamped(t, dir)
		settleFiles()
		if n := len(a.inForce().issuer.roots); n != 2 {
			t.Errorf("%d roots are distributed while the key is lost", n)
		}
		time.Sleep(time.Minute)
		k.do(func(c *Keeper) (*Report, error) { return c.Restore(saved) })
		stamped(t, dir)
		settleFiles()
		if err := a.Problem(); err != nil {
			t.Errorf("restored: %v", err)
		}
	})
}

// The key in memory signs for its own certificate only.
func TestLostKeyOfAnotherCertificate(t *testing.T) {
	var dir string
	running(t, func(t *testing.T) Config {
		dir = t.TempDir()
		return Config{TrustDomain: domain, StateDir: dir}
	}, func(t *testing.T, a *Authority, log *lines) {
		before := a.inForce().issuer.cert
		other := t.TempDir()
		if _, err := Open(Config{TrustDomain: domain, StateDir: other}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		for _, name := range []string{certFile, chainFile, RootFile} {
			write(t, dir, name, must(os.ReadFile(filepath.Join(other, name))))
		}
		if err := os.Remove(filepath.Join(dir, keyFile)); err != nil {
			t.Fatal(err)
		}
		stamped(t, dir)
		settleFiles()
		if a.Problem() == nil || !a.inForce().issuer.cert.Equal(before) {
			t.Errorf("a certificate without its key is in force (%v)", a.Problem())
		}
		if leaf := testLeaf(t, must(a.Sign(testCSR(t, testKey(t)), bookinfo, 0))); leaf.CheckSignatureFrom(before) != nil {
			t.Error("a leaf that nobody signed")
		}
	})
}

func TestGenerationIsThatOfTheNewestFile(t *testing.T) {
	c := Config{TrustDomain: domain, StateDir: t.TempDir()}
	a, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	last := a.inForce().generation
	for i, name := range []string{RootFile, certFile, keyFile, chainFile, crlFile, "key-x.pem"} {
		path := filepath.Join(c.StateDir, name)
		if _, err := os.Stat(path); err != nil {
			write(t, c.StateDir, name, nil)
		}
		at := time.Now().Add(time.Duration(i+1) * time.Hour)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
		now := c.generation()
		if now <= last {
			t.Errorf("%s changed, and the generation is %d after %d", name, now, last)
		}
		last = now
	}
}

func signed(t *testing.T, tmpl, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), by))))
}

// chained writes a CA of root, middle and issuer; shape bends them before each
// is signed.
func chained(t *testing.T, now time.Time, shape func(root, middle, inter *x509.Certificate)) string {
	t.Helper()
	tmpl := func(name string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: must(newSerial()), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
			KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: -1}
	}
	rootT, middleT, interT := tmpl("root"), tmpl("middle"), tmpl("issuer")
	shape(rootT, middleT, interT)
	rootKey, middleKey, interKey := testKey(t), testKey(t), testKey(t)
	root := signed(t, rootT, rootT, rootKey, rootKey)
	middle := signed(t, middleT, root, middleKey, rootKey)
	inter := signed(t, interT, middle, interKey, middleKey)
	dir := t.TempDir()
	write(t, dir, certFile, encodeCerts(inter))
	write(t, dir, keyFile, must(encodeKey(interKey)))
	write(t, dir, chainFile, encodeCerts(inter, middle))
	write(t, dir, RootFile, encodeCerts(root))
	return dir
}

func TestChainMistakesAreNamed(t *testing.T) {
	now := time.Now()
	twin := func(t *testing.T, dir string) { // a root of the same name and another key
		key := testKey(t)
		c := &x509.Certificate{SerialNumber: must(newSerial()), Subject: pkix.Name{CommonName: "root"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
			KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true}
		write(t, dir, RootFile, encodeCerts(signed(t, c, c, key, key)))
	}
	for _, tt := range []struct {
		name  string
		shape func(root, middle, inter *x509.Certificate)
		spoil func(t *testing.T, dir string)
		want  string
	}{
		{"good", func(_, _, _ *x509.Certificate) {}, nil, ""},
		{"as long as it may be", func(root, middle, inter *x509.Certificate) {
			root.MaxPathLen, middle.MaxPathLen, inter.MaxPathLen, inter.MaxPathLenZero = 2, 1, 0, true
		}, nil, ""},
		{"path length of the middle", func(_, middle, _ *x509.Certificate) { middle.MaxPathLen, middle.MaxPathLenZero = 0, true }, nil, "CN=middle allows 0 CAs below it (pathlen), the chain has 1"},
		{"path length of the root", func(root, _, _ *x509.Certificate) { root.MaxPathLen = 1 }, nil, "CN=root allows 1 CAs below it (pathlen), the chain has 2"},
		{"expired middle", func(_, middle, _ *x509.Certificate) { middle.NotAfter = now.Add(-time.Minute) }, nil, "CN=middle expired at"},
		{"expired root", func(root, _, _ *x509.Certificate) { root.NotAfter = now.Add(-time.Minute) }, nil, "CN=root expired at"},
		{"middle is no CA", func(_, middle, _ *x509.Certificate) { middle.IsCA = false; middle.MaxPathLen = 0 }, nil, "CN=middle is not a CA"},
		{"middle is missing", func(_, _, _ *x509.Certificate) {}, func(t *testing.T, dir string) { _ = os.Remove(filepath.Join(dir, chainFile)) }, "put every intermediate into"},
		{"a root that did not sign", func(_, _, _ *x509.Certificate) {}, twin, "does not lead to a root"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := chained(t, now, tt.shape)
			if tt.spoil != nil {
				tt.spoil(t, dir)
			}
			_, err := Open(Config{TrustDomain: domain, StateDir: t.TempDir(), PluggedDir: dir})
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// TestBackdatedLeaves: a node whose clock is behind by less than clockSkew takes
// what was just signed.
func TestBackdatedLeaves(t *testing.T) {
	leaf := testLeaf(t, must(testAuthorityOf(t, time.Hour).Sign(testCSR(t, testKey(t)), bookinfo, 0)))
	if behind := time.Now().Add(-clockSkew + 10*time.Second); behind.Before(leaf.NotBefore) {
		t.Errorf("not valid before %v, a clock that is %v behind refuses it", leaf.NotBefore, clockSkew)
	}
}

// testAuthorityOf is one whose root is that old: leaves begin no earlier.
func testAuthorityOf(t *testing.T, age time.Duration) *Authority {
	t.Helper()
	dir := t.TempDir()
	if _, err := Open(Config{TrustDomain: domain, StateDir: dir, Now: func() time.Time { return time.Now().Add(-age) }}); err != nil {
		t.Fatal(err)
	}
	a, err := Open(Config{TrustDomain: domain, StateDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return a
}
