package derive

import (
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/ambit-mesh/ambit/xds/dir"
)

// TestMutatedFilesAreDerivable edits the files of the scripts at random: what
// passes validation must be derivable, and several steps must lead where one
// does. (Coverage-guided fuzzing finds little here: the order of maps makes every
// run look different to it.)
func TestMutatedFilesAreDerivable(t *testing.T) {
	var files [][]byte
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range scripts {
		ar, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range ar.Files {
			if filepath.Ext(f.Name) == ".yaml" {
				files = append(files, f.Data)
			}
		}
	}
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 1))
		table, e := dir.NewTable(), New(Config{})
		before, after := mutate(r, files), mutate(r, files)
		for _, data := range [][]byte{before, after, nil, after} {
			table.Put("a.yaml", data)
			e.Apply(table.Change())
		}
		if sameAsFromScratch(t, e); t.Failed() {
			t.Fatalf("seed %d:\n%q\n%q", seed, before, after)
		}
	}
}

// mutate returns one of the files with a few bytes changed, dropped or taken from
// another one.
func mutate(r *rand.Rand, files [][]byte) []byte {
	b := slices.Clone(files[r.IntN(len(files))])
	for range r.IntN(6) {
		i := r.IntN(len(b))
		switch r.IntN(4) {
		case 0:
			b[i] = byte(r.IntN(256))
		case 1:
			b[i] = " \n:-[]{}\"'*&!#|>%"[r.IntN(17)]
		case 2:
			b = slices.Delete(b, i, min(len(b)-1, i+r.IntN(20)))
		default:
			from := files[r.IntN(len(files))]
			j := r.IntN(len(from))
			b = slices.Insert(b, i, from[j:min(len(from), j+r.IntN(200))]...)
		}
	}
	return b
}
