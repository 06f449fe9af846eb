package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Redirection is a pod's state, as in the annotation ambient.istio.io/redirection.
type Redirection string

const (
	Enabled Redirection = "enabled" // rules are in and the proxy serves the pod
	Pending Redirection = "pending" // the pod shall be in the mesh and is not yet
)

// Status is one pod's file in the status directory.
type Status struct {
	UID         string      `json:"uid"`
	Namespace   string      `json:"namespace"`
	Name        string      `json:"name"`
	Redirection Redirection `json:"redirection"`
	Reason      string      `json:"reason"`
	Via         string      `json:"via,omitempty"` // the redirector that captures it: ebpf, nftables
	Since       time.Time   `json:"since"`
	NetNS       string      `json:"netns,omitempty"` // for cleanup

	PreEnrolment int    `json:"preEnrolment,omitempty"` // connections older than the enrolment, see StatusDir.Older
	OnEnrol      string `json:"onEnrol,omitempty"`      // what becomes of them
}

// StatusDir holds one file per enrolled pod, each replaced as a whole. Methods may
// run at the same time for different pods.
type StatusDir struct{ dir string }

// OpenStatusDir makes dir if it is not there.
func OpenStatusDir(dir string) (*StatusDir, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make status directory: %w", err)
	}
	return &StatusDir{dir: dir}, nil
}

const (
	statusSuffix = ".json"
	tempPrefix   = "."
)

// validUID keeps a pod's UID from naming a file elsewhere.
func validUID(uid string) bool {
	if uid == "" || len(uid) > 128 || strings.HasPrefix(uid, tempPrefix) {
		return false
	}
	return !strings.ContainsFunc(uid, func(r rune) bool {
		return r != '-' && r != '_' && r != '.' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	})
}

func (d *StatusDir) path(uid string) (string, error) {
	if !validUID(uid) {
		return "", fmt.Errorf("pod uid %q cannot name a status file", uid)
	}
	return filepath.Join(d.dir, uid+statusSuffix), nil
}

// Write replaces the pod's file.
func (d *StatusDir) Write(s Status) error {
	path, err := d.path(s.UID)
	if err != nil {
		return err
	}
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode pod status: %w", err)
	}
	temp := filepath.Join(d.dir, tempPrefix+s.UID)
	if err := os.WriteFile(temp, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write pod status: %w", err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("write pod status: %w", err)
	}
	return nil
}

// Remove removes the pod's files, if there are any.
func (d *StatusDir) Remove(uid string) error {
	path, err := d.path(uid)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pod status: %w", err)
	}
	return d.removeOlder(uid)
}

// RemoveExcept removes the files of all other pods, and what a crash left half written.
func (d *StatusDir) RemoveExcept(keep map[string]bool) error {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return fmt.Errorf("read status directory: %w", err)
	}
	var errs []error
	for _, e := range entries {
		uid, isStatus := strings.CutSuffix(e.Name(), statusSuffix)
		if !isStatus {
			uid, isStatus = strings.CutSuffix(e.Name(), olderSuffix)
		}
		half := strings.HasPrefix(e.Name(), tempPrefix)
		if e.IsDir() || !half && (!isStatus || keep[uid]) {
			continue
		}
		if err := os.Remove(filepath.Join(d.dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove pod status: %w", err))
		}
	}
	return errors.Join(errs...)
}

// List reads all statuses, sorted by namespace and name. Files that cannot be
// read are the error; the others are listed all the same.
func (d *StatusDir) List() ([]Status, error) {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, fmt.Errorf("read status directory: %w", err)
	}
	var all []Status
	var errs []error
	for _, e := range entries {
		if e.IsDir() || strings.HasPrefix(e.Name(), tempPrefix) || !strings.HasSuffix(e.Name(), statusSuffix) {
			continue
		}
		path := filepath.Join(d.dir, e.Name())
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		var s Status
		if err == nil {
			err = json.Unmarshal(data, &s)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("read pod status %s: %w", path, err))
			continue
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b Status) int {
		return strings.Compare(a.Namespace+"/"+a.Name+"/"+a.UID, b.Namespace+"/"+b.Name+"/"+b.UID)
	})
	return all, errors.Join(errs...)
}
