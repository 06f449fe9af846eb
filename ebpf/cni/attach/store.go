package attach

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

const attachmentSuffix = ".json"

// Store keeps attachments in a directory, one file each, so that an agent that
// starts later finds the namespaces of pods that run. Its methods may run at the
// same time for different containers.
type Store struct{ dir string }

// OpenStore makes the directory below the state directory if it is not there.
func OpenStore(stateDir string) (*Store, error) {
	dir := filepath.Join(stateDir, "attachments")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of attachments: %w", err)
	}
	return &Store{dir: dir}, nil
}

// Put keeps a.
func (s *Store) Put(a Attachment) error {
	if !fileName(a.ContainerID) {
		return fmt.Errorf("keep attachment of pod %s: container id %.80q cannot name a file", a.Pod(), a.ContainerID)
	}
	data, err := json.Marshal(a)
	if err == nil {
		// A reboot ends the namespace too, so nothing is lost with the file.
		err = replace(filepath.Join(s.dir, a.ContainerID+attachmentSuffix), data, false)
	}
	if err != nil {
		return fmt.Errorf("keep attachment of pod %s: %w", a.Pod(), err)
	}
	return nil
}

// Remove forgets the container's attachment, if there is one.
func (s *Store) Remove(containerID string) error {
	if !fileName(containerID) {
		return nil // it was never kept
	}
	if err := remove(filepath.Join(s.dir, containerID+attachmentSuffix)); err != nil {
		return fmt.Errorf("forget attachment: %w", err)
	}
	return nil
}

// List returns the attachments whose namespaces are still there, and forgets the
// others. Files that cannot be read are the error; the rest is returned all the
// same.
func (s *Store) List() ([]Attachment, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	var all []Attachment
	var errs []error
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		if strings.HasPrefix(e.Name(), ".") {
			errs = append(errs, remove(path)) // half written when its agent ended
			continue
		}
		a, err := readAttachment(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("read attachment %s: %w", path, err))
			continue
		}
		// Some runtimes name namespaces by process, and a path can be another's now.
		if inode, err := netns.Inode(a.NetNS); err != nil || inode != a.Inode {
			errs = append(errs, remove(path))
			continue
		}
		all = append(all, a)
	}
	return all, errors.Join(errs...)
}

func readAttachment(path string) (Attachment, error) {
	var a Attachment
	st, err := os.Stat(path)
	if err != nil {
		return a, err
	}
	if st.Size() > maxFrame {
		return a, fmt.Errorf("%d bytes are more than %d", st.Size(), maxFrame)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return a, err
	}
	if err := json.Unmarshal(data, &a); err != nil {
		return a, err
	}
	return a, a.Validate()
}
