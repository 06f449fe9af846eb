package ca

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// A root is rotated in three steps, so that at each moment every certificate in
// use leads to a root that every proxy trusts:
//
//	steady ─ rotate ─▶ added ─ promote ─▶ promoted ─ retire ─▶ steady
//	                   both trusted,      both trusted,
//	                   the old signs      the new one signs
//
// A step is refused until all proxies must have followed the step before it,
// those too that learn of roots only when they renew. Each is a change of files
// in the state directory, under its lock, and can be done again after a crash.
const (
	nextFile     = "next-cert.pem" // the root that will sign
	rotationFile = "rotation.json"
	keyPattern   = "key-*.pem"
	// settle is how long a running ambitd may take to follow the files.
	settle = time.Minute
)

// Phase of a rotation.
type Phase string

const (
	Steady   Phase = "steady"
	Added    Phase = "added"    // another root is trusted and does not sign
	Promoted Phase = "promoted" // another root signs, the one before is trusted
)

// rotation is what the files alone do not say.
type rotation struct {
	Added    time.Time `json:"added,omitzero"`
	Promoted time.Time `json:"promoted,omitzero"`
}

// Report says what a command found and did, and what comes next.
type Report struct {
	Phase    Phase      `json:"phase"`
	Did      string     `json:"did,omitempty"`
	Next     string     `json:"next,omitempty"`
	NextAt   time.Time  `json:"next_at,omitzero"`
	Certs    []CertInfo `json:"certificates"`
	Revoked  int        `json:"revoked"`
	Warnings []string   `json:"warnings,omitempty"`
}

// Keeper changes the CA of a state directory. A running ambitd follows.
type Keeper struct {
	cfg     Config
	dir     string // of the CA's certificates and keys
	readKey func(path string) ([]byte, error)
	unlock  func()

	// as the files say
	cert  *x509.Certificate
	chain []*x509.Certificate
	roots []*x509.Certificate
	next  *x509.Certificate // nil: none
	rot   rotation
}

// RefusedError says that a step would break the mesh, and when it will not.
type RefusedError struct {
	Step string
	Why  string
	At   time.Time // zero: not by waiting
}

func (e *RefusedError) Error() string { return e.Step + ": " + e.Why }

// Keep locks a state directory that has a CA and reads it. The caller closes it.
func Keep(c Config) (*Keeper, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.MaxTTL <= 0 || c.MaxTTL > MaxTTL {
		c.MaxTTL = MaxTTL
	}
	k := &Keeper{cfg: c, dir: c.StateDir, readKey: readKey}
	if c.PluggedDir != "" {
		k.dir, k.readKey = c.PluggedDir, os.ReadFile
	}
	if _, err := os.Stat(filepath.Join(k.dir, certFile)); err != nil {
		return nil, fmt.Errorf("no CA in %s: %w (give the --state-dir of an ambitd that has run)", k.dir, err)
	}
	if err := makeStateDir(c.StateDir); err != nil {
		return nil, err
	}
	unlock, err := lockDir(c.StateDir)
	if err != nil {
		return nil, err
	}
	k.unlock = unlock
	if err := k.load(); err != nil {
		unlock()
		return nil, err
	}
	return k, nil
}

// Close lets others change the CA.
func (k *Keeper) Close() { k.unlock() }

func (k *Keeper) load() error {
	certs, err := readCerts(k.dir, certFile)
	if err != nil {
		return err
	}
	k.cert = certs[0]
	if k.roots, err = readCerts(k.dir, RootFile); err != nil {
		return err
	}
	chain, err := readCerts(k.dir, chainFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	k.chain = (&issuer{roots: k.roots}).intermediates(append(certs, chain...))
	k.next = nil
	switch next, err := readCerts(k.cfg.StateDir, nextFile); {
	case err == nil && !next[0].Equal(k.cert): // equal: a promotion that was interrupted
		k.next = next[0]
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	data, err := os.ReadFile(k.path(rotationFile))
	if errors.Is(err, fs.ErrNotExist) {
		k.rot = rotation{}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", rotationFile, err)
	}
	if err := json.Unmarshal(data, &k.rot); err != nil {
		return fmt.Errorf("read %s: %w (remove it: the next steps then need --force)", k.path(rotationFile), err)
	}
	return nil
}

func (k *Keeper) path(name string) string { return filepath.Join(k.cfg.StateDir, name) }

func (k *Keeper) phase() Phase {
	switch {
	case k.next != nil:
		return Added
	case len(k.others()) > 0:
		return Promoted
	}
	return Steady
}

// own refuses to change a CA whose keys are kept elsewhere.
func (k *Keeper) own(step string) error {
	if k.cfg.PluggedDir == "" {
		return nil
	}
	return &RefusedError{Step: step, Why: fmt.Sprintf("this CA is plugged in (%s), so its keys are kept elsewhere: rotate it there. First add the other root to %s; "+
		"a day later replace %s, %s and %s; a day after that take the old root out of %s. A running ambitd follows each change",
		k.cfg.PluggedDir, RootFile, certFile, keyFile, chainFile, RootFile)}
}

// others are the roots that what signs does not lead to.
func (k *Keeper) others() []*x509.Certificate {
	return slices.DeleteFunc(slices.Clone(k.roots), func(r *x509.Certificate) bool {
		at := r.NotBefore // whether they have ended is another question
		for _, c := range append([]*x509.Certificate{k.cert}, k.chain...) {
			if c.NotBefore.After(at) {
				at = c.NotBefore
			}
		}
		_, err := k.cert.Verify(x509.VerifyOptions{Roots: pool([]*x509.Certificate{r}), Intermediates: pool(k.chain),
			CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err == nil
	})
}

// leaves is how long the certificates of a key that stopped to sign now may live.
func (k *Keeper) leaves() time.Duration { return k.cfg.MaxTTL + settle }

// Status reports without changing anything.
func (k *Keeper) Status() *Report { return k.report("") }

func (k *Keeper) report(did string) *Report {
	r := &Report{Phase: k.phase(), Did: did}
	iss := &issuer{cert: k.cert, chain: k.chain, roots: k.roots}
	for _, c := range iss.certs() {
		switch {
		case c.Role == "root" && k.next != nil && c.Fingerprint == Fingerprint(k.next):
			c.Role = "next root"
		case c.Role == "root" && k.phase() == Promoted && slices.ContainsFunc(k.others(), func(o *x509.Certificate) bool { return Fingerprint(o) == c.Fingerprint }):
			c.Role = "previous root"
		}
		r.Certs = append(r.Certs, c)
	}
	now := k.cfg.Now()
	r.Warnings = warnings(r.Certs, now)
	if _, err := loadKey(k.dir, k.cert, k.readKey); err != nil {
		r.Warnings = append(r.Warnings, err.Error()+": `ambitd ca restore --key FILE` puts a saved one back; a running ambitd signs on until it ends")
	}
	if lists, err := readCRLs(k.cfg.StateDir); err != nil {
		r.Warnings = append(r.Warnings, err.Error())
	} else {
		for _, l := range lists {
			r.Revoked += len(l.RevokedCertificateEntries)
		}
	}
	switch {
	case k.cfg.PluggedDir != "": // several roots may be there for other reasons
		r.Phase = Steady
	case r.Phase == Added:
		r.NextAt = k.rot.Added.Add(k.leaves())
		r.Next = "ambitd ca promote, once every proxy has both roots"
	case r.Phase == Promoted:
		r.NextAt = k.rot.Promoted.Add(k.leaves())
		r.Next = "ambitd ca retire, once every certificate of the previous root has ended"
	case len(r.Warnings) > 0:
		r.Next = "ambitd ca rotate"
	}
	return r
}

// Rotate adds another root, which is trusted beside the one that signs.
func (k *Keeper) Rotate() (*Report, error) {
	if err := k.own("rotate"); err != nil {
		return nil, err
	}
	switch k.phase() {
	case Added:
		if slices.ContainsFunc(k.roots, k.next.Equal) {
			return nil, &RefusedError{Step: "rotate", Why: "root " + Fingerprint(k.next) + " was added already: go on with `ambitd ca promote`, or take it back with `ambitd ca abandon`"}
		}
	case Promoted:
		return nil, &RefusedError{Step: "rotate", Why: "the rotation before is not over: finish it with `ambitd ca retire`"}
	}
	if err := k.add(); err != nil {
		return nil, err
	}
	return k.report("root " + Fingerprint(k.next) + " added: proxies trust it beside the one that signs, connected ones within seconds, others when they renew"), nil
}

// add makes the key, then its certificate, and last the bundle: what is trusted
// has a key.
func (k *Keeper) add() error {
	if k.next == nil {
		iss, err := newRootNamed(k.cfg.TrustDomain, "Ambit root "+k.cfg.Now().UTC().Format("2006-01-02T15:04:05Z"), k.cfg.Now())
		if err != nil {
			return err
		}
		key, err := encodeKey(iss.key)
		if err != nil {
			return err
		}
		if err := writeFile(k.path(keyFileOf(iss.cert)), key, 0o600); err != nil {
			return err
		}
		if err := writeFile(k.path(nextFile), encodeCerts(iss.cert), 0o644); err != nil {
			return err
		}
		k.next = iss.cert
	}
	k.rot = rotation{Added: k.cfg.Now().UTC()}
	if err := k.saveRotation(); err != nil {
		return err
	}
	return k.saveRoots(append(slices.Clone(k.roots), k.next))
}

// Abandon takes back a root that was added and has signed nothing.
func (k *Keeper) Abandon() (*Report, error) {
	if err := k.own("abandon"); err != nil {
		return nil, err
	}
	if k.phase() != Added {
		return nil, &RefusedError{Step: "abandon", Why: "no root was added that does not sign yet"}
	}
	gone := k.next
	if err := k.saveRoots(slices.DeleteFunc(slices.Clone(k.roots), gone.Equal)); err != nil {
		return nil, err
	}
	k.next = nil
	if err := errors.Join(remove(k.path(nextFile)), remove(k.path(keyFileOf(gone))), remove(k.path(rotationFile))); err != nil {
		return nil, err
	}
	return k.report("root " + Fingerprint(gone) + " taken back; it has signed nothing"), nil
}

// Promote lets the added root sign.
func (k *Keeper) Promote(force bool) (*Report, error) {
	if err := k.own("promote"); err != nil {
		return nil, err
	}
	if k.phase() != Added || !contains(k.roots, k.next) {
		return nil, &RefusedError{Step: "promote", Why: "no root was added, or not to its end: begin with `ambitd ca rotate`"}
	}
	if at := k.rot.Added.Add(k.leaves()); !force && k.cfg.Now().Before(at) {
		return nil, &RefusedError{Step: "promote", At: at, Why: fmt.Sprintf("until %s a proxy may not have the new root yet, and would refuse certificates of it: "+
			"wait, or --force if `ambitd status` shows every proxy following (those of other projects cannot)", at.UTC().Format(time.RFC3339))}
	}
	if err := k.promote(); err != nil {
		return nil, err
	}
	return k.report("root " + Fingerprint(k.cert) + " signs; connected proxies replace their certificates within minutes, others when they renew"), nil
}

// promote changes who signs by one file, ca-cert.pem: the keys are found by it.
func (k *Keeper) promote() error {
	next := k.next
	if _, err := loadKey(k.dir, next, k.readKey); err != nil {
		return fmt.Errorf("promote: root %s cannot sign without its key, %s (put the file back, or begin anew with `ambitd ca abandon` and `ambitd ca rotate`): %w",
			Fingerprint(next), k.path(keyFileOf(next)), err)
	}
	k.rot.Promoted = k.cfg.Now().UTC()
	if err := k.saveRotation(); err != nil {
		return err
	}
	if err := writeFile(k.path(chainFile), encodeCerts(next), 0o644); err != nil {
		return err
	}
	if err := writeFile(k.path(certFile), encodeCerts(next), 0o644); err != nil {
		return err
	}
	k.cert, k.chain, k.next = next, nil, nil
	return remove(k.path(nextFile))
}

// Retire ends the trust in every root but the one that signs.
func (k *Keeper) Retire(force bool) (*Report, error) {
	if err := k.own("retire"); err != nil {
		return nil, err
	}
	if k.phase() != Promoted {
		return nil, &RefusedError{Step: "retire", Why: "there is no previous root (phase " + string(k.phase()) + "): `ambitd ca status` says what is next"}
	}
	if at := k.rot.Promoted.Add(k.leaves()); !force && k.cfg.Now().Before(at) {
		return nil, &RefusedError{Step: "retire", At: at, Why: fmt.Sprintf("until %s a certificate of the previous root may be in use, and would be refused: "+
			"wait, or --force to cut what uses it", at.UTC().Format(time.RFC3339))}
	}
	gone, err := k.retire()
	if err != nil {
		return nil, err
	}
	return k.report(fmt.Sprintf("%d previous root(s) are no longer trusted, their keys are removed", gone)), nil
}

func (k *Keeper) retire() (int, error) {
	others := k.others()
	if err := k.saveRoots(slices.DeleteFunc(slices.Clone(k.roots), func(r *x509.Certificate) bool { return contains(others, r) })); err != nil {
		return 0, err
	}
	k.rot = rotation{}
	return len(others), errors.Join(k.removeKeys(), k.dropLists(), remove(k.path(rotationFile)))
}

// RevokeKey replaces the key that signs at once: it has leaked. Whatever it
// signed is refused as soon as proxies learn of it.
func (k *Keeper) RevokeKey() (*Report, error) {
	if err := k.own("revoke-key"); err != nil {
		return nil, err
	}
	leaked := k.cert
	if k.next != nil { // its key was beside the leaked one
		if _, err := k.Abandon(); err != nil {
			return nil, err
		}
	}
	if err := k.add(); err != nil {
		return nil, err
	}
	if err := k.promote(); err != nil {
		return nil, err
	}
	if _, err := k.retire(); err != nil {
		return nil, err
	}
	r := k.report("CA " + Fingerprint(leaked) + " is no longer trusted and " + Fingerprint(k.cert) + " signs; connections under the old one are cut, calls may fail until both proxies have another certificate")
	r.Next = "copy " + k.path(RootFile) + " to proxies that read it elsewhere, and restart proxies of other projects: they trust the old root until they renew"
	return r, nil
}

// Restore puts a saved key back.
func (k *Keeper) Restore(keyPath string) (*Report, error) {
	if err := k.own("restore"); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(keyPath)
	if err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("restore: %s %w", keyPath, err)
	}
	if !belongs(key, k.cert) {
		return nil, &RefusedError{Step: "restore", Why: fmt.Sprintf("%s is not the key of %s, %s: give the key that was saved with it; if there is none, `ambitd ca rotate` and then `ambitd ca promote --force`",
			keyPath, certFile, Fingerprint(k.cert))}
	}
	pem, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	path := k.path(keyFileOf(k.cert))
	if err := writeFile(path, pem, 0o600); err != nil {
		return nil, err
	}
	return k.report("key of " + Fingerprint(k.cert) + " is back, in " + path), nil
}

// removeKeys deletes keys that belong to nothing that is trusted.
func (k *Keeper) removeKeys() error {
	paths, err := filepath.Glob(k.path(keyPattern))
	if err != nil {
		return fmt.Errorf("find keys: %w", err)
	}
	var errs []error
	for _, path := range append(paths, k.path(keyFile)) {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if key, err := parseKey(data); err == nil && belongs(key, k.cert) {
			continue
		}
		errs = append(errs, remove(path))
	}
	return errors.Join(errs...)
}

func (k *Keeper) saveRoots(roots []*x509.Certificate) error {
	k.roots = roots
	return writeFile(k.path(RootFile), encodeCerts(roots...), 0o644)
}

func (k *Keeper) saveRotation() error {
	data, err := json.Marshal(k.rot)
	if err != nil {
		return fmt.Errorf("encode %s: %w", rotationFile, err)
	}
	return writeFile(k.path(rotationFile), data, 0o644)
}

// remove deletes a file that may be gone already.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}
