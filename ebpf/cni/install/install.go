// Package install puts the CNI plugin into a node's chain of plugins and keeps it
// there.
//
//	program ─▶ --cni-bin-dir/ambit-cni
//	entry   ─▶ the first configuration of --cni-conf-dir, which is the one that
//	           runtimes use, behind all other plugins
//
// Files are replaced as a whole. A configuration is edited as text, so that nothing
// of it changes but the entry, and taking the entry out again restores it. With
// Watch the directory is looked at whenever something in it changes, since other
// plugins write their configuration anew when they start; a pod that starts in
// between joins the mesh as running pods do.
//
// A directory has one Installer at a time, owned by one goroutine.
package install

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/ambit-mesh/ambit/ebpf/cni"
)

const (
	// settleTime lets a burst of changes end.
	settleTime = 100 * time.Millisecond
	// pollInterval is for directories that are not there yet, or whose changes
	// nobody reports.
	pollInterval = 10 * time.Second

	// originalSuffix marks the configuration of a single plugin that a list took the
	// place of. No runtime reads files that end like this.
	originalSuffix = ".ambit-original"

	// maxConfig bounds a configuration. Arbitrary; they have a few KiB.
	maxConfig = 1 << 20
)

// ErrNoConfig reports a directory without a configuration that the plugin could be
// chained to: the node's primary plugin has not written it yet.
var ErrNoConfig = errors.New("no network configuration to chain to yet")

// Config is what an Installer is made of.
type Config struct {
	Program string // path of the plugin's program, usually the running one
	BinDir  string // where runtimes look for plugins
	ConfDir string // where they look for network configurations
	Entry   cni.Config
	Logger  *slog.Logger // nil: none
}

func (c Config) validate() error {
	var errs []error
	for _, f := range []struct{ flag, value string }{{"cni-bin-dir", c.BinDir}, {"cni-conf-dir", c.ConfDir}} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("--%s is required", f.flag))
		}
	}
	return errors.Join(append(errs, c.Entry.Validate())...)
}

// Installer keeps one node's installation.
type Installer struct {
	cfg      Config
	entry    []byte
	problems map[string]bool // told already
}

// New returns an Installer that has done nothing yet.
func New(cfg Config) (*Installer, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Entry.Type = cni.Type
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	entry, err := json.Marshal(cfg.Entry)
	if err != nil {
		return nil, fmt.Errorf("encode the plugin's entry: %w", err)
	}
	return &Installer{cfg: cfg, entry: entry, problems: map[string]bool{}}, nil
}

// Install brings program and entry to where they belong, in this order: an entry
// without a program keeps every pod from starting. What is right is left alone.
func (i *Installer) Install() error {
	if err := i.program(); err != nil {
		return err
	}
	files, err := configFiles(i.cfg.ConfDir)
	if err != nil {
		return err
	}
	var problems []string
	for _, path := range i.renewed(files) {
		err := i.chain(path)
		if err == nil {
			i.tell(problems)
			return nil
		}
		if w, ok := errors.AsType[*writeError](err); ok {
			return w
		}
		// Runtimes pass it over too, or refuse all of them until somebody mends it.
		problems = append(problems, fmt.Sprintf("%s: %v", path, err))
	}
	i.tell(problems)
	return errors.Join(fmt.Errorf("%w in %s", ErrNoConfig, i.cfg.ConfDir), problemError(problems))
}

// renewed brings forward the configuration of a single plugin that was written again
// after a list had taken its place: it is its author's last word, whether or not the
// list stands before it.
func (i *Installer) renewed(files []string) []string {
	for n, path := range files {
		if _, err := os.Lstat(path + originalSuffix); err != nil {
			continue
		}
		if list := slices.Index(files, listPath(path)); list >= 0 && list < n {
			files = slices.Insert(slices.Delete(slices.Clone(files), n, n+1), list, path)
		}
	}
	return files
}

func problemError(problems []string) error {
	if len(problems) == 0 {
		return nil
	}
	return errors.New("passed over: " + strings.Join(problems, "; "))
}

// tell logs each problem once, as long as it lasts.
func (i *Installer) tell(problems []string) {
	now := map[string]bool{}
	for _, p := range problems {
		now[p] = true
		if !i.problems[p] {
			i.cfg.Logger.Warn("network configuration is passed over", "problem", p)
		}
	}
	i.problems = now
}

// program copies the program unless it is there already.
func (i *Installer) program() error {
	data, err := os.ReadFile(i.cfg.Program)
	if err != nil {
		return fmt.Errorf("read the plugin's program: %w", err)
	}
	to := filepath.Join(i.cfg.BinDir, cni.Type)
	if st, err := os.Stat(to); err == nil && st.Size() == int64(len(data)) && st.Mode().Perm() == 0o755 {
		if have, err := os.ReadFile(to); err == nil && bytes.Equal(have, data) {
			return nil
		}
	}
	if err := os.MkdirAll(i.cfg.BinDir, 0o755); err != nil {
		return fmt.Errorf("make the plugins' directory: %w", err)
	}
	if err := replace(to, data, 0o755, nil); err != nil {
		return fmt.Errorf("install the plugin's program: %w", err)
	}
	i.cfg.Logger.Info("plugin installed", "path", to)
	return nil
}

// configFiles lists the configurations in the order in which runtimes read them.
func configFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s does not exist", ErrNoConfig, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("list network configurations: %w", err)
	}
	var files []string
	for _, e := range entries {
		if !e.IsDir() && slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(e.Name())) {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	return files, nil
}

// writeError is a failure that another file would meet as well.
type writeError struct{ err error }

func (e *writeError) Error() string { return e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// chain puts our entry into the configuration at path.
func (i *Installer) chain(path string) error {
	data, st, err := readConfig(path)
	if err != nil {
		return err
	}
	to := path
	if filepath.Ext(path) != ".conflist" {
		list, err := listOf(data)
		if err != nil {
			return err
		}
		data, to = list, listPath(path)
	}
	list, err := parse(data)
	if err != nil {
		return err
	}
	edited, err := list.with(i.entry)
	if err != nil {
		return err
	}
	if to == path && bytes.Equal(edited, data) {
		return nil
	}
	if _, err := parse(edited); err != nil {
		return fmt.Errorf("BUG: the edited configuration cannot be read: %w", err)
	}
	if err := replace(to, edited, st.Mode().Perm(), st); err != nil {
		return &writeError{fmt.Errorf("write network configuration: %w", err)}
	}
	if to != path {
		// The old one stands before the list in the directory and counts until now.
		if err := os.Rename(path, path+originalSuffix); err != nil {
			return &writeError{fmt.Errorf("replace network configuration by its list: %w", err)}
		}
	}
	i.cfg.Logger.Info("plugin chained", "path", to)
	return nil
}

func listPath(path string) string {
	return strings.TrimSuffix(path, filepath.Ext(path)) + ".conflist"
}

func readConfig(path string) ([]byte, fs.FileInfo, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, nil, errors.New("it is not a regular file")
	}
	if st.Size() > maxConfig {
		return nil, nil, fmt.Errorf("it has more than %d bytes", maxConfig)
	}
	data, err := os.ReadFile(path)
	return data, st, err
}

// Uninstall takes the entry out of every configuration and then the program away. It
// goes on after a failure, but keeps the program while an entry names it.
func (i *Installer) Uninstall() error {
	entries, err := configFiles(i.cfg.ConfDir)
	if errors.Is(err, ErrNoConfig) {
		err = nil
	}
	errs := []error{err}
	for _, path := range entries {
		if filepath.Ext(path) != ".conflist" {
			continue
		}
		if err := i.unchain(path); err != nil {
			errs = append(errs, fmt.Errorf("take %s out of %s: %w", cni.Type, path, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(i.cfg.BinDir, cni.Type)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the plugin's program: %w", err)
	}
	return nil
}

func (i *Installer) unchain(path string) error {
	data, st, err := readConfig(path)
	if err != nil {
		return err
	}
	list, err := parse(data)
	if err != nil {
		if bytes.Contains(data, []byte(cni.Type)) {
			return err
		}
		return nil // nobody's chain, and not ours to judge
	}
	if len(list.ours) == 0 {
		return nil
	}
	rest, err := list.without()
	if err != nil {
		return err
	}
	if restored, err := restore(path, rest); restored || err != nil {
		return err
	}
	return replace(path, rest, st.Mode().Perm(), st)
}

// restore brings back the configuration of a single plugin if the list still is what
// was made of it.
func restore(path string, rest []byte) (bool, error) {
	for _, ext := range []string{".conf", ".json"} {
		single := strings.TrimSuffix(path, ".conflist") + ext
		conf, err := os.ReadFile(single + originalSuffix)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, err
		}
		list, err := listOf(conf)
		if err != nil || !same(list, rest) {
			// Somebody has changed the list since: it is the truth now.
			if err := os.Remove(single + originalSuffix); err != nil {
				return false, err
			}
			continue
		}
		if err := os.Rename(single+originalSuffix, single); err != nil {
			return false, err
		}
		return true, os.Remove(path)
	}
	return false, nil
}

// replace puts data at path as a whole, with the owner of the file that was there.
func replace(path string, data []byte, mode fs.FileMode, owner fs.FileInfo) error {
	temp, err := os.CreateTemp(filepath.Dir(path), ".ambit-*") // ends like no configuration
	if err != nil {
		return err
	}
	_, err = temp.Write(data)
	if err == nil {
		err = temp.Chmod(mode)
	}
	if err == nil && owner != nil {
		_ = chown(temp, owner) // as root it works, and otherwise nothing is lost
	}
	if err == nil {
		err = temp.Sync()
	}
	if err = errors.Join(err, temp.Close()); err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(temp.Name()) // err says more
	}
	return err
}

// Watch installs, and again whenever that is undone, until ctx ends. The
// installation stays: pods must not start outside the mesh because the agent is
// being replaced.
func (i *Installer) Watch(ctx context.Context) error {
	var watching sync.WaitGroup
	defer watching.Wait()
	var changed <-chan struct{}
	last := ""
	for {
		text := ""
		if err := i.Install(); err != nil {
			text = err.Error()
		}
		if text != last && text != "" {
			i.cfg.Logger.Warn("plugin is not installed", "err", text)
		}
		last = text
		if changed == nil {
			var err error
			if changed, err = i.notify(ctx, &watching); err == nil {
				continue // look once more, for what happened before
			}
			i.cfg.Logger.Debug("directories are looked at every now and then only", "every", pollInterval, "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pollInterval): // also finds directories that were made anew
		case <-changed:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(settleTime):
			}
		}
	}
}

// notify reports changes in both directories, merged, until ctx ends.
func (i *Installer) notify(ctx context.Context, watching *sync.WaitGroup) (<-chan struct{}, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch directories: %w", err)
	}
	if err := errors.Join(w.Add(i.cfg.ConfDir), w.Add(i.cfg.BinDir)); err != nil {
		return nil, errors.Join(fmt.Errorf("watch directories: %w", err), w.Close())
	}
	changed := make(chan struct{}, 1)
	watching.Go(func() {
		defer func() { _ = w.Close() }() // nothing was written
		for {
			select {
			case <-ctx.Done():
				return
			case _, ok := <-w.Events:
				if !ok {
					return
				}
			case _, ok := <-w.Errors:
				if !ok {
					return
				}
			}
			select {
			case changed <- struct{}{}:
			default: // it will look anyway
			}
		}
	})
	return changed, nil
}
