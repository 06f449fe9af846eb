package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/ambit-mesh/ambit/ebpf/bpf"
	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Listening reports whether the proxy's listeners in ns are known. Those that it
// made before its cgroup was (see Proxy), or for maps that were rebuilt since, are
// not: it has to listen again.
func (h *Hooks) Listening(ns *netns.NS) (bool, error) {
	c, err := ns.Cookie()
	if err != nil {
		return false, err
	}
	for _, port := range []uint32{PortOutbound, PortInbound, PortHBONE} {
		found := false
		for _, family := range []uint32{unix.AF_INET, unix.AF_INET6} {
			var socket uint64
			err := h.maps[bpf.CgroupMapMeshListeners].Lookup(bpf.CgroupListener{Netns: c, Family: family, Port: port}, &socket)
			if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return false, fmt.Errorf("look for the proxy's listener on port %d: %w", port, err)
			}
			found = found || err == nil
		}
		if !found {
			return false, nil
		}
	}
	return true, nil
}

// Pinned reports whether dir holds state of an earlier OpenHooks, and of how many
// pods.
func Pinned(dir string) (found bool, pods int, err error) {
	if !onBPFFS(dir) {
		return false, 0, nil // names alone are no pins
	}
	for _, sub := range []string{mapsDir, nextDir, rootDir, leaseDir, proxyDir, podsDir} {
		_, err := os.Stat(filepath.Join(dir, sub))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, 0, fmt.Errorf("look for pinned programs: %w", err)
		}
		found = found || err == nil
	}
	list, err := os.ReadDir(filepath.Join(dir, podsDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, 0, fmt.Errorf("look for pinned programs: %w", err)
	}
	return found, len(list), nil
}

func onBPFFS(dir string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && fs.Type == unix.BPF_FS_MAGIC
}

// Unpin is Uninstall for those that cannot or need not open the state in dir.
func Unpin(dir string) error {
	if !onBPFFS(dir) {
		return nil
	}
	return (&Hooks{cfg: HooksConfig{Dir: dir}}).Uninstall()
}

// CleanPod takes away what Hooks left in a pod whose programs are unpinned.
func CleanPod(ns *netns.NS) error {
	if err := removeAliases(ns); err != nil {
		return err
	}
	// A filter at the node's end lets everything pass: enrolments are gone.
	if err := (&Hooks{}).removeGates(ns); err != nil {
		return err
	}
	return removeRoutes(ns)
}
