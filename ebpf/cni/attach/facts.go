package attach

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// factsLayout is raised when an older reader would misunderstand the file. A reader
// that does not know the layout knows nothing, and pods wait.
const factsLayout = 1

const (
	factsFile = "facts.json"
	// maxFacts bounds what is read: 40k namespaces.
	maxFacts = 8 << 20
)

// Facts are what the agent last knew about who belongs to the mesh. The plugin reads
// them when no agent answers, after a reboot above all.
type Facts struct {
	Layout     int                  `json:"layout"`
	Node       string               `json:"node"`
	Excluded   []string             `json:"excludedNamespaces"`
	Namespaces map[string]Namespace `json:"namespaces"`
	// Pods are those of this node, by UID, true for the mesh. A reboot does not
	// change who they are.
	Pods map[string]bool `json:"pods"`
}

// Namespace is what is known about a namespace.
type Namespace struct {
	InMesh bool `json:"inMesh"` // its label says so
	// Mixed: its label does not, but a pod's of its own did. The next pod may have
	// that label as well.
	Mixed bool `json:"mixed,omitempty"`
}

// Decide reports whether the pod may start without asking the agent, and why. In
// doubt it may not.
func (f *Facts) Decide(namespace, uid string) (pass bool, why string) {
	if f == nil {
		return false, "nothing is known about the mesh on this node yet"
	}
	if slices.Contains(f.Excluded, namespace) {
		return true, "the namespace is excluded"
	}
	if inMesh, known := f.Pods[uid]; known && uid != "" {
		if inMesh {
			return false, "the pod is in the mesh"
		}
		return true, "the pod is not in the mesh"
	}
	ns, known := f.Namespaces[namespace]
	switch {
	case !known:
		return false, "the namespace is not known yet"
	case ns.InMesh:
		return false, "the namespace is in the mesh"
	case ns.Mixed:
		return false, "the namespace has pods in the mesh"
	}
	return true, "the namespace is not in the mesh"
}

// FactsFile keeps the facts of one node. It is owned by one goroutine.
type FactsFile struct {
	dir  string
	last []byte
}

// OpenFacts makes the directory if it is not there.
func OpenFacts(dir string) (*FactsFile, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	return &FactsFile{dir: dir}, nil
}

// Write replaces the facts if they are others, so that they survive the loss of
// power. If that fails there are none: old facts could let a pod start that has
// joined the mesh since.
func (f *FactsFile) Write(facts Facts) error {
	facts.Layout = factsLayout
	data, err := json.Marshal(facts)
	if err != nil {
		return fmt.Errorf("encode facts: %w", err)
	}
	if bytes.Equal(data, f.last) {
		return nil
	}
	path := filepath.Join(f.dir, factsFile)
	if err = replace(path, data, true); err == nil && len(data) > maxFacts {
		err = fmt.Errorf("%d bytes are more than %d", len(data), maxFacts)
	}
	if err != nil {
		f.last = nil
		return fmt.Errorf("write facts about the mesh: %w", errors.Join(err, remove(path)))
	}
	f.last = data
	return nil
}

// ReadFacts reads what the agent of this node last knew. Without a file, or with
// one that cannot be used, there is an error, and nothing is known.
func ReadFacts(dir string) (*Facts, error) {
	path := filepath.Join(dir, factsFile)
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read facts about the mesh: %w", err)
	}
	defer func() { _ = file.Close() }() // only read
	data, err := io.ReadAll(io.LimitReader(file, maxFacts+1))
	if err != nil {
		return nil, fmt.Errorf("read facts about the mesh: %w", err)
	}
	facts, err := parseFacts(data)
	if err != nil {
		return nil, fmt.Errorf("read facts about the mesh in %s: %w", path, err)
	}
	return facts, nil
}

func parseFacts(data []byte) (*Facts, error) {
	if len(data) > maxFacts {
		return nil, fmt.Errorf("more than %d bytes", maxFacts)
	}
	var f Facts
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, err
	}
	if f.Layout != factsLayout {
		return nil, fmt.Errorf("its layout is %d, this program knows %d", f.Layout, factsLayout)
	}
	return &f, nil
}

// replace puts data at path as a whole. Durable data is on the disk afterwards.
func replace(path string, data []byte, durable bool) error {
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(dir, ".ambit-*")
	if err != nil {
		return err
	}
	_, err = temp.Write(data)
	if err == nil && durable {
		err = temp.Sync()
	}
	if err = errors.Join(err, temp.Close()); err == nil {
		err = os.Rename(temp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(temp.Name()) // err says more
		return err
	}
	if !durable {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
