package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/ambit-mesh/ambit/ebpf/cni/attach"
)

// Type is the plugin's name in a network configuration, and its program's.
const Type = "ambit-cni"

// Config is the plugin's entry in a network configuration.
type Config struct {
	CNIVersion string `json:"cniVersion,omitempty"` // the runtime's, for each call
	Name       string `json:"name,omitempty"`       // the network's, for each call
	Type       string `json:"type"`

	Socket   string `json:"socket,omitempty"`   // the agent's; default attach.DefaultSocket
	StateDir string `json:"stateDir,omitempty"` // what the agent knows; default attach.DefaultStateDir

	// TimeoutSeconds bounds how long a pod's start waits for its redirection before
	// the runtime is told to try again; default 30.
	TimeoutSeconds int `json:"timeoutSeconds,omitempty"`

	// ExcludeNamespaces start whatever the agent is doing: its own above all.
	// Default DefaultExcluded.
	ExcludeNamespaces []string `json:"excludeNamespaces,omitempty"`

	// StrictStatus makes STATUS fail while the agent is away. See Plugin.Status for
	// what that does to a node.
	StrictStatus bool `json:"strictStatus,omitempty"`
}

const (
	defaultTimeout = 30
	// maxTimeout is below what kubelet waits for a sandbox (4 minutes), so that it
	// reads our sentence instead of its own.
	maxTimeout = 200
)

// DefaultExcluded are the namespaces that hold what pods wait for.
func DefaultExcluded() []string { return []string{"kube-system", "ambit-system", "istio-system"} }

// call is a Config together with what the runtime put into it.
type call struct {
	Config
	PrevResult json.RawMessage      `json:"prevResult,omitempty"`
	Valid      []types.GCAttachment `json:"cni.dev/valid-attachments,omitempty"`
}

func parseCall(stdin []byte) (*call, error) {
	var c call
	if err := json.Unmarshal(stdin, &c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read the network configuration: "+err.Error(), "")
	}
	if c.Socket == "" {
		c.Socket = attach.DefaultSocket
	}
	if c.StateDir == "" {
		c.StateDir = attach.DefaultStateDir
	}
	if c.TimeoutSeconds == 0 {
		c.TimeoutSeconds = defaultTimeout
	}
	if c.ExcludeNamespaces == nil {
		c.ExcludeNamespaces = DefaultExcluded()
	}
	if err := c.Config.Validate(); err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "network "+c.Name+": "+err.Error(), "correct the plugin's entry in the CNI configuration directory, or run ambit-cni install again")
	}
	return &c, nil
}

// Validate reports every value that cannot be used.
func (c Config) Validate() error {
	var errs []error
	if c.Type != Type && c.Type != "" {
		errs = append(errs, fmt.Errorf("type: this program is %s, not %.80q", Type, c.Type))
	}
	if c.TimeoutSeconds < 0 || c.TimeoutSeconds > maxTimeout {
		errs = append(errs, fmt.Errorf("timeoutSeconds: %d is not between 1 and %d", c.TimeoutSeconds, maxTimeout))
	}
	for _, p := range []struct{ field, path string }{{"socket", c.Socket}, {"stateDir", c.StateDir}} {
		if p.path != "" && !filepath.IsAbs(p.path) {
			errs = append(errs, fmt.Errorf("%s: %q is not an absolute path", p.field, p.path))
		}
	}
	return errors.Join(errs...)
}

func (c *call) timeout() time.Duration { return time.Duration(c.TimeoutSeconds) * time.Second }

func (c *call) hasResult() bool {
	return len(c.PrevResult) > 0 && string(c.PrevResult) != "null"
}
