package ca

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A command that was killed leaves no copy of a key for ever, and its successor
// touches nothing else.
func TestUnfinishedKeysAreRemoved(t *testing.T) {
	k := newKeeper(t)
	for _, name := range []string{".key-0123456789abcdef.pem.123", ".ca-key.pem.4", ".token-key.pem.5", ".root-cert.pem.6", "other-key.pem.7"} {
		write(t, k.dir, name, []byte("-----BEGIN PRIVATE KEY-----"))
	}
	before := files(t, k.dir)
	k.status()
	after := files(t, k.dir)
	for name := range before {
		_, there := after[name]
		if unfinished := strings.HasPrefix(name, ".") && strings.Contains(name, "key"); unfinished == there {
			t.Errorf("%s is there: %v", name, there)
		}
	}
}

// Whoever gives the wrong file must not take the whole mesh down.
func TestTheCAItselfIsNotRevoked(t *testing.T) {
	k := newKeeper(t)
	root := must(parseCerts(must(os.ReadFile(filepath.Join(k.dir, RootFile)))))[0]
	for name, revoke := range map[string]func(*Keeper) (*Report, error){
		"by file":   func(c *Keeper) (*Report, error) { return c.RevokeCertificate(filepath.Join(k.dir, RootFile)) },
		"by number": func(c *Keeper) (*Report, error) { return c.Revoke(root.SerialNumber) },
	} {
		_, err := k.try(revoke)
		if _, refused := errors.AsType[*RefusedError](err); !refused {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(k.dir, crlFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a list was written: %v", err)
	}
}
