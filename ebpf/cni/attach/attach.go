// Package attach is what the CNI plugin and the node agent say to each other: that
// a pod has just been attached to its network, and whether it may start.
//
//	plugin (Client)                            agent (Server)
//	   ── request: add | del | check | ... ──▶
//	                                            waits for the pod's redirection
//	   ◀── answer: in the mesh or not, or why the pod must wait ──
//
// One connection on a unix socket carries one request and one answer, each a
// length of four bytes, big endian, and that many bytes of JSON. Unknown fields are
// ignored and an unknown command is refused by name, so that a plugin and an agent
// of different versions understand each other while a node is upgraded. A plugin
// that hangs up ends what was done for it.
//
// What the agent has to remember lies below a directory that outlives a reboot: the
// attachments (Store), so that another agent finds the pods' namespaces, and the
// last known Facts, by which the plugin decides while no agent runs.
package attach

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
)

// DefaultSocket is where the agent listens unless told otherwise.
const DefaultSocket = "/var/run/ambit/cni.sock"

// DefaultStateDir is where facts and attachments are kept unless told otherwise. It
// has to outlive a reboot, so it is not below /run.
const DefaultStateDir = "/var/lib/ambit/cni"

// Attachment is a pod's place in the network, as the container runtime tells it.
type Attachment struct {
	Network     string       `json:"network"`     // name of the network configuration
	ContainerID string       `json:"containerID"` // of the pod's sandbox
	UID         string       `json:"uid"`         // as the runtime knows it; "" if it does not
	Namespace   string       `json:"namespace"`
	Name        string       `json:"name"`
	NetNS       string       `json:"netns"` // path of the network namespace
	Inode       uint64       `json:"inode,omitempty"`
	Addrs       []netip.Addr `json:"addrs,omitempty"`
}

// Pod names the attachment's pod in messages.
func (a Attachment) Pod() string { return a.Namespace + "/" + a.Name }

const (
	// maxName bounds every string of an attachment. Kubernetes' names have at most
	// 253 bytes; paths are longer.
	maxName = 1024
	// maxAddrs bounds a pod's addresses. Arbitrary; a dual-stack pod has two.
	maxAddrs = 64
)

// Validate reports what keeps a from being used. The words come from a runtime that
// may be mistaken, and some of them become names of files.
func (a Attachment) Validate() error {
	var errs []error
	for _, f := range []struct{ name, value string }{
		{"container id", a.ContainerID}, {"namespace", a.Namespace}, {"name", a.Name}, {"netns", a.NetNS},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("%s is missing", f.name))
		}
	}
	for _, f := range []struct{ name, value string }{
		{"network", a.Network}, {"container id", a.ContainerID}, {"uid", a.UID}, {"namespace", a.Namespace}, {"name", a.Name}, {"netns", a.NetNS},
	} {
		if len(f.value) > maxName || strings.ContainsRune(f.value, 0) {
			errs = append(errs, fmt.Errorf("%s is too long or has a zero byte", f.name))
		}
	}
	if a.ContainerID != "" && !fileName(a.ContainerID) {
		errs = append(errs, fmt.Errorf("container id %.80q has characters other than letters, digits, '-', '_' and '.'", a.ContainerID))
	}
	if a.NetNS != "" && !filepath.IsAbs(a.NetNS) {
		errs = append(errs, fmt.Errorf("netns %.80q is not an absolute path", a.NetNS))
	}
	if len(a.Addrs) > maxAddrs {
		errs = append(errs, fmt.Errorf("%d addresses are more than %d", len(a.Addrs), maxAddrs))
	}
	return errors.Join(errs...)
}

// fileName reports whether s can name a file of its own, and nothing else.
func fileName(s string) bool {
	if s == "" || len(s) > 200 || s[0] == '.' {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return r != '-' && r != '_' && r != '.' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	})
}
