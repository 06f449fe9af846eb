package dir

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestEmptiedDirectory: a directory that had objects and has no files is taken
// for one that is not mounted, unless a file says that nothing is meant.
func TestEmptiedDirectory(t *testing.T) {
	dir, lastGood := t.TempDir(), filepath.Join(t.TempDir(), "last-good")
	remove := func(name string) {
		t.Helper()
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	const gone = emptied + ", " + emptiedHint
	w, stop := startTestWatch(t, dir, lastGood)
	w.want("nothing yet is no fault", "", "")
	w.write("a.yaml", ns("a"))
	w.write("b.yaml", deny)
	w.want("objects", "+a +deny", "")
	remove("a.yaml")
	w.want("one of two files", "-a", "")
	remove("b.yaml")
	w.want("the last file", "", dir+": "+gone)
	w.write("b.yaml", deny)
	w.want("it is back", "", "")
	remove("b.yaml")
	w.want("and away", "", dir+": "+gone)
	w.write("readme.txt", "no configuration")
	stop()

	// Nothing is reported of what may not be all, and what is kept stays.
	w, stop = startTestWatch(t, dir, lastGood)
	select {
	case c := <-w.changes:
		t.Errorf("after a restart without files %d objects and %d deletions were reported", len(c.Upserts), len(c.Deletes))
	case <-time.After(3 * settle / 2):
	}
	if n := countFiles(t, lastGood); n != 1 {
		t.Errorf("%d last good versions, want the policy's", n)
	}
	w.write("b.yaml", deny)
	w.want("files after a restart", "+deny", "")
	remove("b.yaml")
	w.want("away once more", "", dir+": "+gone)
	w.write("nothing.yaml", "# on purpose\n")
	w.want("a file that says nothing", "-deny", "")
	stop()
	remove("nothing.yaml")
	w, stop = startTestWatch(t, dir, lastGood)
	w.want("after a restart of what was empty on purpose", "", "")
	stop()
}
