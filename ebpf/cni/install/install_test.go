package install

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ambit-mesh/ambit/ebpf/cni"
	"github.com/ambit-mesh/ambit/test/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }

// node is a node's two directories.
type node struct {
	t   *testing.T
	dir string
	log syncBuffer
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}
func (s *syncBuffer) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.b.String() }

func newNode(t *testing.T) *node {
	n := &node{t: t, dir: t.TempDir()}
	n.write("program", "#!/bin/true\n")
	if err := os.Mkdir(n.path("net.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

func (n *node) write(name, text string) {
	n.t.Helper()
	if err := os.WriteFile(n.path(name), []byte(text), 0o640); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) read(name string) string {
	n.t.Helper()
	data, err := os.ReadFile(n.path(name))
	if err != nil {
		n.t.Fatal(err)
	}
	return string(data)
}

// conf lists the configurations.
func (n *node) conf() map[string]string {
	n.t.Helper()
	entries, err := os.ReadDir(n.path("net.d"))
	if err != nil {
		n.t.Fatal(err)
	}
	all := map[string]string{}
	for _, e := range entries {
		all[e.Name()] = n.read("net.d/" + e.Name())
	}
	return all
}

func (n *node) installer() *Installer {
	n.t.Helper()
	i, err := New(Config{
		Program: n.path("program"), BinDir: n.path("bin"), ConfDir: n.path("net.d"),
		Entry: cni.Config{TimeoutSeconds: 30}, Logger: slog.New(slog.NewTextHandler(&n.log, nil)),
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return i
}

func (n *node) install() error { return n.installer().Install() }

const single = `{"cniVersion":"0.4.0","name":"net","type":"bridge"}`

func TestInstallAndUninstall(t *testing.T) {
	n := newNode(t)
	n.write("net.d/10-flannel.conflist", flannel)
	n.write("net.d/20-other.conflist", flannel)
	n.write("net.d/README", "not a configuration")
	before := n.conf()
	if err := n.install(); err != nil {
		t.Fatal(err)
	}
	got := n.read("net.d/10-flannel.conflist")
	if !strings.Contains(got, entry) || strings.Count(got, "ambit-cni") != 1 {
		t.Errorf("chained as %s", got)
	}
	if n.read("net.d/20-other.conflist") != flannel {
		t.Error("a configuration that no runtime uses was changed")
	}
	st, err := os.Stat(n.path("bin/ambit-cni"))
	if err != nil || st.Mode().Perm() != 0o755 || n.read("bin/ambit-cni") != n.read("program") {
		t.Errorf("program: %v, %v", st, err)
	}
	if st, err := os.Stat(n.path("net.d/10-flannel.conflist")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("configuration: %v, %v; want its mode kept", st, err)
	}
	chained, first := n.conf(), stat(t, n.path("net.d/10-flannel.conflist"))
	if err := n.install(); err != nil || !maps.Equal(n.conf(), chained) {
		t.Errorf("a second time: %v, %v", err, n.conf())
	}
	if !os.SameFile(first, stat(t, n.path("net.d/10-flannel.conflist"))) {
		t.Error("what was right was written again")
	}
	n.write("program", "#!/bin/false\n")
	if err := n.install(); err != nil || n.read("bin/ambit-cni") != n.read("program") {
		t.Errorf("another version: %v, program %q", err, n.read("bin/ambit-cni"))
	}
	for range 2 {
		if err := n.installer().Uninstall(); err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(n.conf(), before) {
			t.Errorf("uninstalled: %v, want what was before", n.conf())
		}
		if entries, err := os.ReadDir(n.path("bin")); err != nil || len(entries) != 0 {
			t.Errorf("left in the plugins' directory: %v, %v", entries, err)
		}
	}
}

func stat(t *testing.T, path string) os.FileInfo {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestSingleConfigurationBecomesAList(t *testing.T) {
	for _, ext := range []string{".conf", ".json"} {
		n := newNode(t)
		n.write("net.d/10-net"+ext, single)
		if err := n.install(); err != nil {
			t.Fatal(err)
		}
		if got := slices.Sorted(maps.Keys(n.conf())); !slices.Equal(got, []string{"10-net" + ext + ".ambit-original", "10-net.conflist"}) && !slices.Equal(got, []string{"10-net.conflist", "10-net" + ext + ".ambit-original"}) {
			t.Errorf("files %v", got)
		}
		if got := n.conf()["10-net.conflist"]; !strings.Contains(got, single) || !strings.Contains(got, entry) {
			t.Errorf("list %s", got)
		}
		// The primary plugin writes its own again, with a change.
		changed := strings.Replace(single, "bridge", "ptp", 1)
		n.write("net.d/10-net"+ext, changed)
		if err := n.install(); err != nil {
			t.Fatal(err)
		}
		if got := n.conf()["10-net.conflist"]; !strings.Contains(got, changed) {
			t.Errorf("list %s, want the primary's last word", got)
		}
		if err := n.installer().Uninstall(); err != nil {
			t.Fatal(err)
		}
		if got := n.conf(); !maps.Equal(got, map[string]string{"10-net" + ext: changed}) {
			t.Errorf("uninstalled: %v", got)
		}
	}
}

// A list that somebody else extended meanwhile stays.
func TestUninstallKeepsOthersChanges(t *testing.T) {
	n := newNode(t)
	n.write("net.d/10-net.conf", single)
	if err := n.install(); err != nil {
		t.Fatal(err)
	}
	list := strings.Replace(n.read("net.d/10-net.conflist"), single, single+`,{"type":"tuning"}`, 1)
	n.write("net.d/10-net.conflist", list)
	if err := n.installer().Uninstall(); err != nil {
		t.Fatal(err)
	}
	got := n.conf()
	if len(got) != 1 || !strings.Contains(got["10-net.conflist"], "tuning") || strings.Contains(got["10-net.conflist"], "ambit-cni") {
		t.Errorf("uninstalled: %v", got)
	}
}

func TestBadConfigurationsArePassedOverByName(t *testing.T) {
	n := newNode(t)
	n.write("net.d/00-broken.conflist", `{"name":"x","plug`)
	n.write("net.d/01-old.conf", `{"cniVersion":"0.1.0","name":"net","type":"bridge"}`)
	n.write("net.d/02-list.conf", flannel)
	if err := os.Mkdir(n.path("net.d/03-dir.conflist"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/nowhere", n.path("net.d/04-link.conflist")); err != nil {
		t.Fatal(err)
	}
	err := n.install()
	if !errors.Is(err, ErrNoConfig) {
		t.Fatalf("got %v, want %v", err, ErrNoConfig)
	}
	for _, text := range []string{"00-broken.conflist: it is not JSON", `01-old.conf: its cniVersion "0.1.0"`, "02-list.conf: it is not the configuration of a single plugin", "04-link.conflist"} {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%v does not name %s", err, text)
		}
	}
	n.write("net.d/10-flannel.conflist", flannel)
	i := n.installer()
	for range 2 {
		if err := i.Install(); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(n.read("net.d/10-flannel.conflist"), "ambit-cni") || n.read("net.d/00-broken.conflist") != `{"name":"x","plug` {
		t.Errorf("configurations %v", n.read("net.d/10-flannel.conflist"))
	}
	if got := strings.Count(n.log.String(), "00-broken"); got != 2 {
		t.Errorf("the broken file was logged %d times, want once per installer", got)
	}
}

// An entry without a program keeps every pod from starting.
func TestProgramStaysWhileAnEntryNamesIt(t *testing.T) {
	n := newNode(t)
	n.write("net.d/10-flannel.conflist", flannel)
	if err := n.install(); err != nil {
		t.Fatal(err)
	}
	n.write("net.d/10-flannel.conflist", `{"plugins":[{"type":"ambit-cni"},`)
	if err := n.installer().Uninstall(); err == nil || !strings.Contains(err.Error(), "10-flannel.conflist") {
		t.Errorf("got %v, want an error that names the file", err)
	}
	stat(t, n.path("bin/ambit-cni"))
}

func TestNothingIsChainedWithoutTheProgram(t *testing.T) {
	n := newNode(t)
	n.write("net.d/10-flannel.conflist", flannel)
	n.write("bin", "a file where the directory should be")
	if err := n.install(); err == nil || n.read("net.d/10-flannel.conflist") != flannel {
		t.Errorf("%v, configuration %s", err, n.read("net.d/10-flannel.conflist"))
	}
}

func TestWatch(t *testing.T) {
	n := newNode(t)
	i := n.installer()
	ctx, cancel := context.WithCancel(t.Context())
	donec := make(chan error, 1)
	go func() { donec <- i.Watch(ctx) }()
	defer func() {
		cancel()
		if err := <-donec; err != nil {
			t.Error(err)
		}
	}()
	chained := func(why, name string) {
		t.Helper()
		for range 12000 {
			data, err := os.ReadFile(n.path(name))
			if err == nil && strings.Contains(string(data), entry) {
				return
			}
			time.Sleep(5 * time.Millisecond) // the kernel reports changes in its own time
		}
		t.Fatalf("%s: %s has no entry; log:\n%s", why, name, n.log.String())
	}
	for range 12000 {
		if strings.Contains(n.log.String(), "no network configuration") {
			break
		}
		time.Sleep(5 * time.Millisecond) // until the installer waits
	}
	n.write("net.d/10-flannel.conflist", flannel)
	chained("the primary comes later", "net.d/10-flannel.conflist")
	n.write("net.d/10-flannel.conflist", flannel)
	chained("the primary writes it again", "net.d/10-flannel.conflist")
	n.write("net.d/temp", flannel)
	if err := os.Rename(n.path("net.d/temp"), n.path("net.d/05-calico.conflist")); err != nil {
		t.Fatal(err)
	}
	chained("another primary, by rename", "net.d/05-calico.conflist")
	if err := os.Remove(n.path("bin/ambit-cni")); err != nil {
		t.Fatal(err)
	}
	for range 12000 {
		if _, err := os.Stat(n.path("bin/ambit-cni")); err == nil {
			return
		}
		time.Sleep(5 * time.Millisecond) // as above
	}
	t.Error("the program was removed and stays away")
}
