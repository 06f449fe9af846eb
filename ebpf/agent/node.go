package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// NodeStatus is what is true of all the node's pods: the file node/status.json in
// the status directory.
type NodeStatus struct {
	Redirector string `json:"redirector"` // ebpf or nftables
	Requested  string `json:"requested"`  // the flag: auto, ebpf, nftables
	Reason     string `json:"reason"`     // why that redirector

	// Limits are what this redirector cannot hold, Obstacles what of others'
	// stands in its way, Missing what rights the agent lacks.
	Limits    []string  `json:"limits,omitempty"`
	Obstacles []string  `json:"obstacles,omitempty"`
	Missing   []string  `json:"missingCapabilities,omitempty"`
	Since     time.Time `json:"since"` // when the redirector was chosen
}

// Equal compares all but the time.
func (s NodeStatus) Equal(o NodeStatus) bool {
	return s.Redirector == o.Redirector && s.Requested == o.Requested && s.Reason == o.Reason &&
		slices.Equal(s.Limits, o.Limits) && slices.Equal(s.Obstacles, o.Obstacles) && slices.Equal(s.Missing, o.Missing)
}

// A directory of its own: every file beside the pods' is a pod's.
const nodeDir, nodeFile = "node", "status.json"

// WriteNode replaces the node's status.
func (d *StatusDir) WriteNode(s NodeStatus) error {
	dir := filepath.Join(d.dir, nodeDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write node status: %w", err)
	}
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode node status: %w", err)
	}
	temp := filepath.Join(dir, tempPrefix+nodeFile)
	if err := os.WriteFile(temp, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write node status: %w", err)
	}
	if err := os.Rename(temp, filepath.Join(dir, nodeFile)); err != nil {
		return fmt.Errorf("write node status: %w", err)
	}
	return nil
}

// Node reads the node's status: the zero one if there is none.
func (d *StatusDir) Node() (NodeStatus, error) {
	data, err := os.ReadFile(filepath.Join(d.dir, nodeDir, nodeFile))
	if errors.Is(err, fs.ErrNotExist) {
		return NodeStatus{}, nil
	}
	var s NodeStatus
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		return NodeStatus{}, fmt.Errorf("read node status: %w", err)
	}
	return s, nil
}

// RemoveNode removes the node's status, if there is one.
func (d *StatusDir) RemoveNode() error {
	if err := os.RemoveAll(filepath.Join(d.dir, nodeDir)); err != nil {
		return fmt.Errorf("remove node status: %w", err)
	}
	return nil
}
