package ca

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// crlFile holds the revocation lists; the name in a `cacerts` secret.
const crlFile = "ca-crl.pem"

// pollInterval is how often the files are looked at. A change counts when two
// looks agree. Polling needs no notification of the file system and sees how
// Kubernetes replaces mounted Secrets (a symbolic link two levels up moves).
const pollInterval = time.Second

// retryInterval is when files that could not be used are read again: what was
// wrong may have been the disk or the clock.
const retryInterval = time.Minute

// watched lists the files that make up the CA.
func (c Config) watched() []string {
	dir := c.StateDir
	if c.PluggedDir != "" {
		dir = c.PluggedDir
	}
	paths := []string{filepath.Join(c.StateDir, crlFile)}
	if c.PluggedDir != "" {
		paths = append(paths, filepath.Join(dir, crlFile))
	}
	for _, name := range []string{certFile, keyFile, chainFile, RootFile} {
		paths = append(paths, filepath.Join(dir, name))
	}
	keys, _ := filepath.Glob(filepath.Join(dir, keyPattern)) // fails for a bad pattern only
	return append(paths, keys...)
}

// stamps tells two versions of the files apart without reading them.
func (c Config) stamps() string {
	var b strings.Builder
	for _, path := range c.watched() {
		if info, err := os.Stat(path); err == nil {
			fmt.Fprintf(&b, "%s %d %d\n", path, info.Size(), info.ModTime().UnixNano())
		}
	}
	return b.String()
}

// generation is the time of the newest file: it grows with each change, for
// every ambitd over the same files, and across restarts.
func (c Config) generation() uint64 {
	var newest time.Time
	for _, path := range c.watched() {
		if info, err := os.Stat(path); err == nil && info.ModTime().After(newest) {
			newest = info.ModTime()
		}
	}
	return uint64(newest.UnixNano())
}

// complete adds to an issuer what else is in force with it.
func (c Config) complete(iss *issuer, files string) (*state, error) {
	st := &state{issuer: iss, roots: string(encodeCerts(iss.roots...)), files: files, generation: c.generation()}
	for _, dir := range []string{c.PluggedDir, c.StateDir} {
		if dir == "" {
			continue
		}
		lists, err := readCRLs(dir)
		if err != nil {
			return nil, err
		}
		for _, l := range lists {
			st.revoked = append(st.revoked, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: l.Raw})...)
		}
	}
	if c.PluggedDir == "" {
		return st, nil
	}
	// Proxies read the bundle from the state directory in both cases.
	path := filepath.Join(c.StateDir, RootFile)
	if have, err := os.ReadFile(path); err == nil && string(have) == st.roots {
		return st, nil
	}
	return st, writeFile(path, []byte(st.roots), 0o644)
}

// readCRLs reads a directory's revocation lists; none is no error.
func readCRLs(dir string) ([]*x509.RevocationList, error) {
	path := filepath.Join(dir, crlFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("revocation lists: %w", err)
	}
	var out []*x509.RevocationList
	for rest := data; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "X509 CRL" {
			return nil, fmt.Errorf("revocation lists %s holds a %q block, only X509 CRL blocks belong here", path, b.Type)
		}
		l, err := x509.ParseRevocationList(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("revocation lists %s: list %d: %w", path, len(out)+1, err)
		}
		out = append(out, l)
	}
	if len(out) == 0 && len(data) > 0 {
		return nil, fmt.Errorf("revocation lists %s holds no PEM list: remove it, or give lists", path)
	}
	return out, nil
}

// Run follows the files until ctx ends. Files that cannot be used leave what is
// in force as it is.
func (a *Authority) Run(ctx context.Context, log *slog.Logger) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	tried := a.inForce().files
	var retry time.Time // zero: what was read last is in force
	for last := tried; ; {
		var at time.Time
		select {
		case <-ctx.Done():
			return nil
		case at = <-tick.C:
		}
		now := a.cfg.stamps()
		if now == last && (now != tried || !retry.IsZero() && at.After(retry)) {
			tried, retry = now, time.Time{}
			if !a.reload(now, log) {
				retry = at.Add(retryInterval)
			}
		}
		last = now
	}
}

// reload reports whether what the files say is in force.
func (a *Authority) reload(files string, log *slog.Logger) bool {
	before, told := a.inForce(), a.Problem()
	st, err := a.read(before, files)
	if err == nil {
		err = st.issuer.keyLost
	}
	a.mu.Lock()
	a.problem = err
	if st != nil {
		a.state.Store(st)
		close(a.changec)
		a.changec = make(chan struct{})
	}
	a.mu.Unlock()
	switch {
	case st == nil:
		if told == nil || told.Error() != err.Error() {
			log.Error("CA files not used: what was in force stays in force", "error", err)
		}
		return false
	case err != nil:
		log.Error("the CA signs with a key that is only in memory: save the state directory's other files and run `ambitd ca restore`, or rotate, before this process ends", "error", err)
	}
	log.Info("CA files in force", "signs", Fingerprint(st.issuer.cert), "signed_before", Fingerprint(before.issuer.cert),
		"roots", len(st.issuer.roots), "revocation_lists", strings.Count(string(st.revoked), "-----BEGIN"))
	return true
}

// read loads the files while no command changes them.
func (a *Authority) read(before *state, files string) (*state, error) {
	unlock, err := lockDir(a.cfg.StateDir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	iss, err := a.cfg.open(before.issuer)
	if err != nil {
		return nil, err
	}
	return a.cfg.complete(iss, files)
}

// Bundle is what proxies should trust.
type Bundle struct {
	Roots      string // PEM
	Revoked    []byte // PEM
	Generation uint64
	Issuer     []byte // subject key identifier of what signs
}

// Bundle returns what is in force and a channel that is closed when something
// else is.
func (a *Authority) Bundle() (Bundle, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	st := a.inForce()
	return Bundle{Roots: st.roots, Revoked: st.revoked, Generation: st.generation, Issuer: st.issuer.cert.SubjectKeyId}, a.changec
}

// Announce tells those who follow the bundle to look again: something beside it
// changed.
func (a *Authority) Announce() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.changec)
	a.changec = make(chan struct{})
}

// Problem is why the CA's files are not in force as they are, nil if they are.
func (a *Authority) Problem() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.problem
}
