// Package golden runs tests written as txtar archives: inputs and expected
// outputs of one scenario in one readable file.
//
//	commands, one a line            <- the archive's comment; # starts a comment
//	-- some/input.yaml --
//	...
//	-- want/1 --                    <- compared with what the test made
//
// `go test -update` rewrites the expected sections; the diff is then reviewed
// like code. An expected section that no command made is an error.
package golden

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
)

var update = flag.Bool("update", false, "rewrite the expected sections of golden files")

// Archive is one scenario.
type Archive struct {
	Commands [][]string // fields of each line
	t        *testing.T
	ar       *txtar.Archive
	made     map[string]bool
	changed  bool
}

// Run runs f as a subtest for every archive that matches the pattern.
func Run(t *testing.T, pattern string, f func(*testing.T, *Archive)) {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("no file matches %s (%v)", pattern, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			a := &Archive{t: t, ar: ar, made: map[string]bool{}}
			for line := range strings.Lines(string(ar.Comment)) {
				line, _, _ = strings.Cut(line, "#")
				if fields := strings.Fields(line); len(fields) > 0 {
					a.Commands = append(a.Commands, fields)
				}
			}
			f(t, a)
			a.finish(file)
		})
	}
}

// File returns an input section; a missing one ends the test.
func (a *Archive) File(name string) []byte {
	a.t.Helper()
	i := a.find(name)
	if i < 0 {
		a.t.Fatalf("there is no section %q", name)
	}
	return a.ar.Files[i].Data
}

func (a *Archive) find(name string) int {
	return slices.IndexFunc(a.ar.Files, func(f txtar.File) bool { return f.Name == name })
}

// Want compares got with section want/<name>, or writes it with -update.
func (a *Archive) Want(name, got string) {
	a.t.Helper()
	name = "want/" + name
	a.made[name] = true
	if !strings.HasSuffix(got, "\n") && got != "" {
		got += "\n"
	}
	i := a.find(name)
	switch {
	case i >= 0 && string(a.ar.Files[i].Data) == got:
	case *update && i >= 0:
		a.ar.Files[i].Data, a.changed = []byte(got), true
	case *update:
		a.ar.Files, a.changed = append(a.ar.Files, txtar.File{Name: name, Data: []byte(got)}), true
	case i < 0:
		a.t.Errorf("there is no section %s; made:\n%s", name, got)
	default:
		a.t.Errorf("%s (-want +made):\n%s", name, cmp.Diff(string(a.ar.Files[i].Data), got))
	}
}

func (a *Archive) finish(file string) {
	a.t.Helper()
	keep := a.ar.Files[:0:0]
	for _, f := range a.ar.Files {
		if strings.HasPrefix(f.Name, "want/") && !a.made[f.Name] {
			if !*update {
				a.t.Errorf("section %s was not made", f.Name)
			}
			a.changed = true
			continue
		}
		keep = append(keep, f)
	}
	if !*update || !a.changed || a.t.Failed() {
		return
	}
	a.ar.Files = keep
	if err := os.WriteFile(file, bytes.TrimLeft(txtar.Format(a.ar), "\n"), 0o644); err != nil {
		a.t.Fatal(err)
	}
	a.t.Logf("%s was rewritten", file)
}
