package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"slices"
	"strings"
	"time"
)

// crlLifetime is far: ambitd writes a list when something is revoked and not by
// the clock, and the mesh's proxies take an old one as well. Tools such as
// `openssl verify -crl_check` refuse a list that is past its next update.
const crlLifetime = 365 * 24 * time.Hour

// ParseSerial reads a serial number as tools print it: hexadecimal with 0x,
// colons or letters, otherwise decimal.
func ParseSerial(s string) (*big.Int, error) {
	text, base := strings.ToLower(strings.TrimSpace(s)), 10
	text = strings.TrimPrefix(text, "serial=") // of `openssl x509 -serial`
	switch {
	case strings.HasPrefix(text, "0x"):
		text, base = text[2:], 16
	case strings.ContainsAny(text, ":abcdef"):
		text, base = strings.ReplaceAll(text, ":", ""), 16
	}
	n, ok := new(big.Int).SetString(text, base)
	if !ok || n.Sign() <= 0 || n.BitLen() > 160 {
		return nil, fmt.Errorf("serial number %q: give a decimal one, or a hexadecimal one that begins with 0x", s)
	}
	return n, nil
}

// Revoke puts a certificate on the lists of the CAs that can have issued it.
func (k *Keeper) Revoke(serial *big.Int) (*Report, error) {
	return k.revoke(serial, func(*x509.Certificate) bool { return true })
}

// RevokeCertificate puts a certificate on its issuer's list.
func (k *Keeper) RevokeCertificate(path string) (*Report, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("revoke: %w", err)
	}
	certs, err := parseCerts(data)
	if err != nil {
		return nil, fmt.Errorf("revoke: %s %w", path, err)
	}
	return k.revoke(certs[0].SerialNumber, func(by *x509.Certificate) bool { return certs[0].CheckSignatureFrom(by) == nil })
}

func (k *Keeper) revoke(serial *big.Int, issued func(*x509.Certificate) bool) (*Report, error) {
	if i := slices.IndexFunc(k.issuers(), func(c *x509.Certificate) bool { return c.SerialNumber.Cmp(serial) == 0 }); i >= 0 {
		return nil, &RefusedError{Step: "revoke", Why: "that is the certificate of the CA " + Fingerprint(k.issuers()[i]) + ", not one that it issued: if its key has leaked use `ambitd ca revoke-key`, else `ambitd ca rotate`"}
	}
	lists, err := readCRLs(k.cfg.StateDir)
	if err != nil {
		return nil, err
	}
	var did []string
	var errs []error
	for _, by := range k.issuers() {
		if !issued(by) {
			continue
		}
		key, err := loadKey(k.dir, by, k.readKey)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if lists, err = k.list(lists, by, key, serial); err != nil {
			return nil, err
		}
		did = append(did, Fingerprint(by))
	}
	if len(did) == 0 {
		return nil, errors.Join(append([]error{fmt.Errorf("revoke %s: no CA of this state directory with a key has issued it", serial.Text(16))}, errs...)...)
	}
	if err := k.saveLists(lists); err != nil {
		return nil, err
	}
	r := k.report("certificate " + serial.Text(16) + " revoked by " + strings.Join(did, " and "))
	r.Next = "nothing for proxies that follow ambitd; others read " + k.path(crlFile) + " as CRL_PATH, for example from a ConfigMap"
	return r, nil
}

// issuers are the CAs of the directory, what signs first.
func (k *Keeper) issuers() []*x509.Certificate {
	out := []*x509.Certificate{k.cert}
	for _, c := range k.roots {
		if !contains(out, c) && (k.next == nil || !c.Equal(k.next)) {
			out = append(out, c)
		}
	}
	return out
}

// list adds an entry to the issuer's list, which begins with the first.
func (k *Keeper) list(lists []*x509.RevocationList, by *x509.Certificate, key crypto.Signer, serial *big.Int) ([]*x509.RevocationList, error) {
	now := k.cfg.Now()
	tmpl := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now.Add(-clockSkew), NextUpdate: now.Add(crlLifetime)}
	at := slices.IndexFunc(lists, func(l *x509.RevocationList) bool { return l.CheckSignatureFrom(by) == nil })
	if at >= 0 {
		tmpl.RevokedCertificateEntries = lists[at].RevokedCertificateEntries
		if lists[at].Number != nil {
			tmpl.Number.Add(tmpl.Number, lists[at].Number)
		}
	}
	if !slices.ContainsFunc(tmpl.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(serial) == 0 }) {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: serial, RevocationTime: now})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, by, key)
	if err != nil {
		return nil, fmt.Errorf("sign revocation list: %w", err)
	}
	l, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("sign revocation list: %w", err)
	}
	if at < 0 {
		return append(lists, l), nil
	}
	lists[at] = l
	return lists, nil
}

// dropLists removes the lists of CAs that are not trusted any more.
func (k *Keeper) dropLists() error {
	lists, err := readCRLs(k.cfg.StateDir)
	if err != nil || len(lists) == 0 {
		return err
	}
	kept := slices.DeleteFunc(lists, func(l *x509.RevocationList) bool {
		return !slices.ContainsFunc(k.issuers(), func(c *x509.Certificate) bool { return l.CheckSignatureFrom(c) == nil })
	})
	return k.saveLists(kept)
}

func (k *Keeper) saveLists(lists []*x509.RevocationList) error {
	if len(lists) == 0 {
		if err := os.Remove(k.path(crlFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove revocation lists: %w", err)
		}
		return nil
	}
	var b []byte
	for _, l := range lists {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: l.Raw})...)
	}
	return writeFile(k.path(crlFile), b, 0o644)
}
