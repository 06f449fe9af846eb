package dir

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
)

// testWatch watches a directory of its own.
type testWatch struct {
	t       *testing.T
	dir     string
	changes chan Change
}

func newTestWatch(t *testing.T, dir string) *testWatch {
	w, stop := startTestWatch(t, dir, "")
	t.Cleanup(stop)
	return w
}

func startTestWatch(t *testing.T, dir, lastGood string) (w *testWatch, stop func()) {
	w = &testWatch{t: t, dir: dir, changes: make(chan Change, 100)}
	ctx, cancel := context.WithCancel(t.Context())
	donec := make(chan error, 1)
	src := Source{Dirs: []string{dir}, LastGood: lastGood, Log: slog.New(slog.DiscardHandler)}
	go func() { donec <- src.Watch(ctx, func(c Change) { w.changes <- c }) }()
	return w, func() {
		cancel()
		if err := <-donec; !errors.Is(err, context.Canceled) {
			t.Errorf("watch ended with %v", err)
		}
	}
}

func (w *testWatch) write(name, text string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// replace writes as editors and kubectl-like tools do: a temporary file, renamed.
func (w *testWatch) replace(name, text string) {
	w.t.Helper()
	w.write(".tmp", text)
	if err := os.Rename(filepath.Join(w.dir, ".tmp"), filepath.Join(w.dir, name)); err != nil {
		w.t.Fatal(err)
	}
}

// want waits until the sum of changes is upserts and deletes, in words, and the
// last change has these problems.
func (w *testWatch) want(why, objects, problems string) {
	w.t.Helper()
	var got []string
	timeout := time.After(60 * time.Second)
	for {
		select {
		case c := <-w.changes:
			for _, o := range c.Upserts {
				got = append(got, "+"+o.Name)
			}
			for _, k := range c.Deletes {
				got = append(got, "-"+k.Name)
			}
			slices.Sort(got)
			var ps []string
			for _, p := range c.Problems {
				ps = append(ps, strings.TrimPrefix(p.String(), w.dir+"/"))
			}
			if strings.Join(got, " ") == objects && strings.HasPrefix(strings.Join(ps, "\n"), problems) && (problems != "") == (len(ps) > 0) {
				return
			}
			w.t.Logf("%s: so far %q, problems %q", why, got, ps)
		case <-timeout:
			w.t.Fatalf("%s: want %q and problems %q, saw %q", why, objects, problems, got)
		}
	}
}

func ns(name string, labels ...string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {%s}}\n", name, strings.Join(labels, ", "))
}

func TestWatchFollowsFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte(ns("a")), 0o644); err != nil {
		t.Fatal(err)
	}
	w := newTestWatch(t, dir)
	w.want("start", "+a", "")
	w.write("b.yaml", ns("b")+"---\n"+ns("c"))
	w.want("a file", "+b +c", "")
	w.replace("b.yaml", ns("b", "x: y")+"---\n"+ns("c"))
	w.want("replaced: one of its two objects differs", "+b", "")
	w.write("b.yaml", ns("c"))
	w.want("edited in place", "-b", "")
	w.write("b.yaml", "kind: [\n")
	w.want("a syntax error keeps what was good", "", "b.yaml:1: YAML syntax")
	w.write("b.yaml", ns("c", "x: y"))
	w.want("repaired", "+c", "")
	w.write("b.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {nam: c}\n")
	w.want("an object without a name keeps what was good", "", "b.yaml:1 Namespace metadata: name is missing\nb.yaml:3 Namespace metadata.nam: unknown field")
	w.write("b.yaml", ns("c", "x: 1"))
	w.want("a wrong type keeps what was good", "", "b.yaml:3 Namespace c metadata.labels[x]: expected a string")
	w.write("z.yaml", ns("a", "from: z"))
	w.want("a duplicate", "", "b.yaml:3 Namespace c metadata.labels[x]: expected a string, found integer 1, write \"1\" in quotes\nz.yaml:1 Namespace a: is also defined in "+dir+"/a.yaml:1, which is in force, remove one of the two")
	if err := os.Remove(filepath.Join(dir, "b.yaml")); err != nil {
		t.Fatal(err)
	}
	w.want("a file is gone, with its last good version", "-c", "z.yaml:1 Namespace a: is also defined")
	if err := os.Remove(filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	w.want("the duplicate takes over", "+a", "")
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	w.write("sub/d.json", `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "d"}}`)
	w.want("a directory below", "+d", "")
	if err := os.RemoveAll(filepath.Join(dir, "sub")); err != nil {
		t.Fatal(err)
	}
	w.want("a directory is gone", "-d", "")
	w.write("big.yaml", "")
	if err := os.Truncate(filepath.Join(dir, "big.yaml"), maxFile+1); err != nil {
		t.Fatal(err)
	}
	w.want("a file too big to read", "", "big.yaml: has 64 MiB, at most 64 are read")
}

func TestWatchHalfWrittenFile(t *testing.T) {
	dir := t.TempDir()
	w := newTestWatch(t, dir)
	w.want("start", "", "")
	w.write("a.yaml", ns("a"))
	w.want("whole", "+a", "")
	// Truncated, as a writer leaves it for a moment: nothing may go.
	w.write("a.yaml", "")
	w.write("a.yaml", ns("a", "x: y"))
	select {
	case c := <-w.changes:
		if len(c.Deletes) > 0 {
			t.Error("an object went while its file was being written")
		}
		w.changes <- c
	case <-t.Context().Done():
	}
	w.want("whole again", "+a", "")
}

// A file that is being written at the start would be a state without its objects.
func TestWatchWaitsForAHalfWrittenFileAtTheStart(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s := &scanner{roots: []string{dir}, table: NewTable(), stats: map[string]stat{}, watched: map[string]bool{}}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	s.notify, s.log = w, slog.New(slog.DiscardHandler)
	if _, again := s.scan(false); !again || len(s.table.files) > 0 {
		t.Fatalf("an empty file of this moment is taken for whole (again: %v)", again)
	}
	if err := os.WriteFile(path, []byte(ns("a")), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.first(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c := s.table.Change(); len(c.Upserts) != 1 {
		t.Errorf("the first state is %v", c.Upserts)
	}
}

// Only what does not exist is gone: what cannot be looked at stays in force.
func TestWatchKeepsAFileThatCannotBeLookedAt(t *testing.T) {
	dir := t.TempDir()
	w := newTestWatch(t, dir)
	w.want("start", "", "")
	w.write("a.yaml", ns("a"))
	w.want("whole", "+a", "")
	path := filepath.Join(dir, "a.yaml")
	if err := errors.Join(os.Symlink(path, filepath.Join(dir, ".loop")), os.Rename(filepath.Join(dir, ".loop"), path)); err != nil {
		t.Fatal(err)
	}
	w.want("a link to itself", "", "a.yaml: stat "+path+": too many levels of symbolic links")
	w.replace("a.yaml", ns("a", "x: y"))
	w.want("a file again", "+a", "")
}

func TestWatchNeedsDirectories(t *testing.T) {
	for _, dirs := range [][]string{nil, {filepath.Join(t.TempDir(), "missing")}} {
		if err := Watch(t.Context(), dirs, slog.New(slog.DiscardHandler), func(Change) {}); err == nil {
			t.Errorf("watching %q is no error", dirs)
		}
	}
}

func TestTableDecodesOnlyWhatChanged(t *testing.T) {
	table := NewTable()
	var docs []string
	for i := range 100 {
		docs = append(docs, ns(fmt.Sprintf("n%d", i)))
	}
	table.Put("f.yaml", []byte(strings.Join(docs, "---\n")))
	if c := table.Change(); len(c.Upserts) != 100 {
		t.Fatalf("%d objects", len(c.Upserts))
	}
	before := table.files["f.yaml"].objects
	docs[50] = ns("n50", "x: y")
	table.Put("f.yaml", []byte("# shifted\n"+strings.Join(docs, "---\n")))
	if c := table.Change(); len(c.Upserts) != 1 || c.Upserts[0].Name != "n50" {
		t.Fatalf("upserts %v", c.Upserts)
	}
	same := 0
	for k, o := range table.files["f.yaml"].objects {
		if before[k] == o {
			same++
		}
	}
	if same < 98 { // the first document got a comment, one changed
		t.Errorf("%d documents were decoded again", 100-same)
	}
}

func TestUnenforcedIsCounted(t *testing.T) {
	table := NewTable()
	table.Put("a.yaml", []byte(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: a}
spec: {anything: [goes, here]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: a}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: a}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: x}
data: {mesh: "enableTracing: true"}
`))
	c := table.Change()
	for _, p := range c.Problems {
		t.Error(p)
	}
	if got, want := fmt.Sprint(c.Unenforced), "map[Gateway.networking.istio.io:1 MeshConfig.enableTracing:1 VirtualService:1]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if len(c.Upserts) != 1 || c.Upserts[0].GVK.Kind != "MeshConfig" {
		t.Errorf("upserts %v", c.Upserts)
	}
	table.Remove("a.yaml")
	if c := table.Change(); len(c.Unenforced) != 0 || len(c.Deletes) != 1 {
		t.Errorf("after removal %+v", c)
	}
}

func BenchmarkOneOfManyDocuments(b *testing.B) {
	table := NewTable()
	var docs []string
	for i := range 10_000 {
		docs = append(docs, ns(fmt.Sprintf("n%d", i)))
	}
	i := 0
	for b.Loop() {
		i++
		docs[50] = ns("n50", fmt.Sprintf("x: y%d", i))
		table.Put("f.yaml", []byte(strings.Join(docs, "---\n")))
		table.Change()
	}
}
