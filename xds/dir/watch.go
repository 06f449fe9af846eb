package dir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// Quiet time before files are read: an editor's save is several events.
	debounce = 50 * time.Millisecond
	// A file that is written all the time is still read this often.
	debounceMax = 500 * time.Millisecond
	// A file that is empty or does not end in a newline may be half written; its
	// writer gets this long before the file is taken at its word.
	settle = 400 * time.Millisecond
	// Events get lost (network file systems, queue overflow); looking at every
	// file's size and time is cheap.
	rescan = 10 * time.Second
	// etcd takes 1.5 MiB per object; a dump of a whole cluster fits in this.
	maxFile = 64 << 20
	// Deeper trees are somebody's home directory, not configuration.
	maxTree = 8
)

// Source is directories to read and to watch.
type Source struct {
	Dirs []string
	// LastGood, when set, is a directory of this package's own, kept over
	// restarts: see memory.
	LastGood string
	Log      *slog.Logger
}

// Watch watches dirs without a memory of earlier runs, see Source.Watch.
func Watch(ctx context.Context, dirs []string, log *slog.Logger, changed func(Change)) error {
	return Source{Dirs: dirs, Log: log}.Watch(ctx, changed)
}

// Watch reads the directories and reports every change until ctx ends. The first
// call of changed carries the full state, also when there is nothing yet. All
// calls come from the goroutine that called Watch. A directory that cannot be
// read at the start is an error; later it is a Problem and what it said stays in
// force. So it is with a directory that had files and has none, as one that is
// not mounted: without the cluster in it, every proxy would forget its policies
// and peers. At a start nothing is reported before it has some. One file that
// says nothing makes an empty directory a deliberate one.
func (src Source) Watch(ctx context.Context, changed func(Change)) error {
	if len(src.Dirs) == 0 {
		return errors.New("watch directories: none given")
	}
	for _, d := range src.Dirs {
		if _, err := os.ReadDir(d); err != nil {
			return fmt.Errorf("watch directory: %w", err)
		}
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch directories: %w", err)
	}
	defer w.Close()
	s := &scanner{roots: src.Dirs, log: src.Log, notify: w, table: NewTable(), stats: map[string]stat{}, watched: map[string]bool{}}
	if err := s.first(ctx); err != nil {
		return err
	}
	mem := openMemory(src.LastGood, src.Log)
	if err := s.awaitFiles(ctx, mem.loadRoots()); err != nil {
		return err
	}
	for _, o := range s.table.recall(mem.load()) {
		src.Log.Warn("what the file says cannot be used, its last good version is taken from before the restart", "object", o.Key().String(), "file", o.File)
	}
	report := func() {
		changed(s.table.Change())
		mem.keep(s.table)
		mem.keepRoots(s.filled())
	}
	report()
	return s.loop(ctx, report)
}

// scanner keeps the table in step with the files.
type scanner struct {
	roots   []string
	log     *slog.Logger
	notify  *fsnotify.Watcher
	table   *Table
	stats   map[string]stat   // of the files as they were last read
	watched map[string]bool   // directories
	forced  map[string]bool   // files named by an event: their time may not have moved
	faults  map[string]string // directories that cannot be read
}

// stat is what changes when a file does.
type stat struct {
	size int64
	mod  time.Time
	info fs.FileInfo // compared with os.SameFile
}

// first reads everything. It waits for files that are being written, or their
// objects would be missing from a state that is taken for whole.
func (s *scanner) first(ctx context.Context) error {
	for range 3 { // a file that is written all the time is taken as it is
		if _, again := s.scan(false); !again {
			return nil
		}
		select {
		case <-time.After(settle):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	s.scan(true)
	return nil
}

// emptied is what is wrong with a directory that had files and has none.
const emptied = "directory has no .yaml, .yml or .json files any more: is it mounted?"

const emptiedHint = "what it said before stays in force; if nothing is meant, put a file there that says nothing"

// awaitFiles waits for directories that had files before a restart.
func (s *scanner) awaitFiles(ctx context.Context, had []string) error {
	told := false
	for {
		empty := slices.DeleteFunc(slices.Clone(had), func(root string) bool {
			return !slices.Contains(s.roots, root) || s.hasFiles(root)
		})
		if len(empty) == 0 {
			return nil
		}
		if !told {
			s.log.Warn("source "+emptied+" Nothing is served until it has some; if nothing is meant, put a file there that says nothing", "dirs", empty)
			told = true
		}
		select {
		case <-time.After(settle):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err := s.first(ctx); err != nil {
			return err
		}
	}
}

func (s *scanner) hasFiles(root string) bool {
	for path := range s.table.files {
		if within(path, root) {
			return true
		}
	}
	return false
}

// filled lists the directories that say something.
func (s *scanner) filled() (roots []string) {
	for _, root := range s.roots {
		if s.saysSomething(root) {
			roots = append(roots, root)
		}
	}
	return roots
}

func (s *scanner) saysSomething(root string) bool {
	for path, f := range s.table.files {
		if within(path, root) && len(f.objects) > 0 {
			return true
		}
	}
	return false
}

func within(path, dir string) bool {
	dir = filepath.Clean(dir)
	return dir == "." && !filepath.IsAbs(path) || strings.HasPrefix(path, strings.TrimSuffix(dir, string(filepath.Separator))+string(filepath.Separator))
}

func (s *scanner) loop(ctx context.Context, changed func()) error {
	tick := time.NewTicker(rescan)
	defer tick.Stop()
	quiet := time.NewTimer(0)
	<-quiet.C
	var since time.Time // first event not yet looked at
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case ev, ok := <-s.notify.Events:
			if !ok {
				return errors.New("watch directories: the watcher ended")
			}
			if s.forced == nil {
				s.forced = map[string]bool{}
			}
			s.forced[filepath.Clean(ev.Name)] = true
			if since.IsZero() {
				since = time.Now()
			}
			quiet.Reset(max(0, min(debounce, debounceMax-time.Since(since))))
			continue
		case err := <-s.notify.Errors:
			s.log.Warn("watch directories: events were lost, looking at every file", "err", err)
		case <-quiet.C:
		case <-tick.C:
		}
		since = time.Time{}
		differs, again := s.scan(false)
		if again {
			quiet.Reset(settle)
		}
		if differs {
			changed()
		}
	}
}

// scan looks at every file and reads those that changed. again asks for another
// look soon, because a file may be half written; atOnce takes files as they are.
func (s *scanner) scan(atOnce bool) (differs, again bool) {
	forced := s.forced
	s.forced = nil
	seen := map[string]bool{}
	unreadable := map[string]string{}
	for _, root := range s.roots {
		s.tree(root, 0, seen, unreadable)
		root = filepath.Clean(root)
		if _, bad := unreadable[root]; !bad && !anyWithin(seen, root) && !anyWithin(unreadable, root) && s.saysSomething(root) {
			unreadable[root] = emptied
		}
	}
	for path := range seen {
		d, a := s.look(path, atOnce, forced[path] || s.faults[path] != "")
		differs, again = differs || d, again || a
		if a { // the event is not answered yet
			if s.forced == nil {
				s.forced = map[string]bool{}
			}
			s.forced[path] = true
		}
	}
	for path := range s.table.files {
		if !seen[path] && !under(path, unreadable) {
			s.table.Remove(path)
			delete(s.stats, path)
			differs = true
		}
	}
	for dir, msg := range unreadable {
		if s.faults[dir] != msg {
			hint := "what it said before stays in force"
			if msg == emptied {
				hint = emptiedHint
			}
			s.table.cannotRead(dir, msg, hint)
			differs = true
		}
	}
	s.faults = unreadable
	return differs, again
}

func anyWithin[V any](paths map[string]V, root string) bool {
	for path := range paths {
		if within(path, root) {
			return true
		}
	}
	return false
}

// under reports whether path is, or is in, one of dirs.
func under(path string, dirs map[string]string) bool {
	for d := range dirs {
		if path == d || strings.HasPrefix(path, d+string(filepath.Separator)) {
			return true
		}
	}
	return false
}

// tree collects the files to read and watches every directory on the way.
func (s *scanner) tree(dir string, depth int, files map[string]bool, unreadable map[string]string) {
	dir = filepath.Clean(dir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		delete(s.watched, dir)
		if depth == 0 || !errors.Is(err, fs.ErrNotExist) {
			unreadable[dir] = fmt.Sprintf("directory cannot be read: %v", err)
		}
		return
	}
	// Added again on every scan: a directory that was replaced is another inode,
	// and adding twice costs one system call.
	if err := s.notify.Add(dir); err != nil && !s.watched[dir] {
		s.log.Warn("watch directory: changes will be seen with a delay", "dir", dir, "delay", rescan, "err", err)
	}
	s.watched[dir] = true
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") || strings.HasSuffix(name, "~") {
			continue // editors' files, and the generations of a mounted ConfigMap
		}
		path := filepath.Join(dir, name)
		info, err := os.Stat(path) // follows symbolic links
		switch {
		case errors.Is(err, fs.ErrNotExist): // gone since it was listed, or a link to nothing
		case err != nil:
			if e.IsDir() || isConfig(name) {
				unreadable[path] = err.Error()
			}
		case info.IsDir() && depth < maxTree:
			s.tree(path, depth+1, files, unreadable)
		case info.Mode().IsRegular() && isConfig(name):
			files[path] = true
		}
	}
}

func isConfig(name string) bool {
	return slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name))
}

// look reads a file if it changed since the last time.
func (s *scanner) look(path string, atOnce, forced bool) (differs, again bool) {
	info, err := os.Stat(path)
	if err != nil {
		return false, true // gone since it was listed
	}
	now := stat{info.Size(), info.ModTime(), info}
	was, known := s.stats[path]
	if known && !forced && was.size == now.size && was.mod.Equal(now.mod) && os.SameFile(was.info, now.info) {
		return false, false
	}
	if now.size > maxFile {
		s.stats[path] = now
		s.table.cannotRead(path, fmt.Sprintf("has %d MiB, at most %d are read", now.size>>20, maxFile>>20), "split it")
		return true, false
	}
	data, err := read(path)
	if err != nil {
		s.stats[path] = now
		s.table.cannotRead(path, err.Error(), "")
		return true, false
	}
	if !atOnce && halfWritten(data) && time.Since(now.mod) < settle {
		return false, true
	}
	s.stats[path] = now
	s.table.Put(path, data)
	return true, false
}

func halfWritten(data []byte) bool { return len(data) == 0 || data[len(data)-1] != '\n' }

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, errors.New("grew while it was read")
	}
	return data, nil
}
