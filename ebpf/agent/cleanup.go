package agent

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/ambit-mesh/ambit/ebpf/netns"
)

// Cleanup takes all pods named in the status directory out of the mesh, for an
// uninstall: no agent may run meanwhile. unpin ends what captures pods from
// outside; nil: nothing does. It goes on after a failure and returns all of them.
func Cleanup(status *StatusDir, rules Rules, unpin func() error) (int, error) {
	pods, err := status.List()
	errs := []error{err}
	// Peers stop first to believe in the pods' proxy, and capture ends before the
	// way back of what was captured does.
	failed := map[string]bool{}
	for _, p := range pods {
		if err := status.Remove(p.UID); err != nil {
			errs, failed[p.UID] = append(errs, err), true
		}
	}
	if unpin != nil {
		errs = append(errs, unpin())
	}
	cleaned := 0
	for _, p := range pods {
		if err := removeAt(p.NetNS, rules); err != nil {
			errs = append(errs, fmt.Errorf("clean up pod %s/%s: %w", p.Namespace, p.Name, err))
			continue
		}
		if !failed[p.UID] {
			cleaned++
		}
	}
	errs = append(errs, status.RemoveNode())
	return cleaned, errors.Join(errs...)
}

func removeAt(path string, rules Rules) error {
	if path == "" {
		return nil
	}
	ns, err := netns.Open(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, netns.ErrNotNetNS) {
		return nil // the rules went with the namespace
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	return rules.Remove(ns)
}
