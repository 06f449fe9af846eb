package dir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ambit-mesh/ambit/xds/crd"
)

// memory keeps the last good version of policies on disk, one file each, under
// <namespace>/<kind>/<name>. While the process runs, a policy that is edited into
// something invalid stays in force as it was; with a memory this holds over a
// restart too, which else would drop a DENY because of a typing mistake. The same
// goes for what leads traffic through a waypoint. Other objects are not kept:
// without them less is reachable, not more.
//
// An entry goes when its object does. It is an aid, so a fault in it is logged
// and never fatal.
type memory struct {
	dir  string // "": no memory
	log  *slog.Logger
	disk map[id]bool // what is there

	roots []string // as they are on disk
}

func openMemory(dir string, log *slog.Logger) *memory {
	return &memory{dir: dir, log: log, disk: map[id]bool{}}
}

// useWaypointLabel sends an object's traffic through a waypoint.
const useWaypointLabel = "istio.io/use-waypoint"

// remembered reports whether losing an object could allow more. Traffic that no
// longer goes through its waypoint goes past the policy there.
func remembered(o *Object) bool {
	switch o.GVK.Kind {
	case "AuthorizationPolicy", "PeerAuthentication", crd.MeshConfigKind, "Gateway", "GatewayClass":
		return true
	case "Namespace", "Service", "ServiceEntry":
		name := o.Value.(metav1.Object).GetLabels()[useWaypointLabel]
		return name != "" && name != "none"
	}
	return false
}

// rootsPath is beside the entries: which directories said something, one a line.
func (m *memory) rootsPath() string { return m.dir + "-sources" }

// loadRoots returns the directories that said something before the restart.
func (m *memory) loadRoots() []string {
	if m.dir == "" {
		return nil
	}
	data, err := os.ReadFile(m.rootsPath())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.log.Warn("which directories had objects before the restart cannot be read", "err", err)
	}
	for line := range strings.Lines(string(data)) {
		m.roots = append(m.roots, strings.TrimSuffix(line, "\n"))
	}
	return m.roots
}

func (m *memory) keepRoots(roots []string) {
	if m.dir == "" || slices.Equal(m.roots, roots) {
		return
	}
	var b strings.Builder
	for _, r := range roots {
		b.WriteString(r + "\n")
	}
	if err := m.replace(m.rootsPath(), []byte(b.String())); err != nil {
		m.log.Error("which directories have objects is not kept for a restart", "err", err)
		return
	}
	m.roots = slices.Clone(roots)
}

// memoryEntry is the content of a file.
type memoryEntry struct {
	File   string `json:"file"` // of the source, where the object was
	Object any    `json:"object"`
}

func (m *memory) path(k id) string { return filepath.Join(m.dir, k.namespace, k.kind, k.name) }

// load reads every entry, as strictly as it was read the first time.
func (m *memory) load() []*Object {
	if m.dir == "" {
		return nil
	}
	var out []*Object
	err := filepath.WalkDir(m.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		o, err := readEntry(path)
		if err != nil {
			m.log.Warn("last good version of an object cannot be used", "path", path, "err", err)
			return nil
		}
		m.disk[o.id()] = true
		out = append(out, o)
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.log.Warn("last good versions of objects cannot be read", "err", err)
	}
	return out
}

func readEntry(path string) (*Object, error) {
	data, err := read(path)
	if err != nil {
		return nil, err
	}
	var raw struct {
		File   string          `json:"file"`
		Object json.RawMessage `json:"object"`
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return nil, err
	}
	c := decodeChunk(raw.File, raw.Object)
	if len(c.problems) > 0 {
		return nil, errors.New(c.problems[0].String())
	}
	for i, o := range c.objects {
		if c.use[i] == enforced && remembered(o) {
			return o, nil
		}
	}
	return nil, errors.New("holds no policy")
}

// keep brings the disk in step with what is in force.
func (m *memory) keep(t *Table) {
	if m.dir == "" {
		return
	}
	for _, o := range t.fresh {
		if !remembered(o) {
			if m.disk[o.id()] { // it was, in an earlier version
				m.forget(o.id())
			}
			continue
		}
		if err := m.write(o); err != nil {
			m.log.Error("last good version of an object is not kept for a restart", "object", o.Key().String(), "err", err)
			continue
		}
		m.disk[o.id()] = true
	}
	for k := range m.disk {
		if t.inForce[k] == nil {
			m.forget(k)
		}
	}
}

func (m *memory) forget(k id) {
	if err := os.Remove(m.path(k)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.log.Warn("last good version of an object that is gone stays", "path", m.path(k), "err", err)
	}
	delete(m.disk, k)
}

func (m *memory) write(o *Object) error {
	whole, err := asDocument(o)
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(memoryEntry{o.File, whole}, "", "  ")
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	return m.replace(m.path(o.id()), append(data, '\n'))
}

// replace writes a file at once.
func (m *memory) replace(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(m.dir), ".last-good.*") // outside what load walks
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // after the rename there is nothing to remove
	_, err = tmp.Write(data)
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// asDocument is the object as a file would have it.
func asDocument(o *Object) (any, error) {
	if mesh, ok := o.Value.(*crd.Mesh); ok {
		text, err := json.Marshal(mesh.Config)
		if err != nil {
			return nil, fmt.Errorf("encode: %w", err)
		}
		return map[string]any{
			"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": o.Name, "namespace": o.Namespace},
			"data": map[string]string{"mesh": string(text)},
		}, nil
	}
	data, err := json.Marshal(o.Value)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	whole := map[string]any{}
	if err := json.Unmarshal(data, &whole); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	// Items of a list may leave these out.
	whole["apiVersion"], whole["kind"] = o.GVK.GroupVersion().String(), o.GVK.Kind
	return whole, nil
}
